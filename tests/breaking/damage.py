"""Damage to every kind of file of finished runs: what it held may be refused, never the rest, and nothing is lost."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import warm
from bench import TRAINED, Bench, tree
from tally import Case, case_of

STRANGE: tuple[Any, ...] = (
    None,
    [],
    {},
    "",
    "x",
    -1,
    0,
    1e308,
    10**30,
    True,
    [None],
    {"a": 1},
    "\x1b[31m",
    "../..",
    [[[]]],
)
WRITTEN = ("results/tasks/", "results/compare/", "eval.json", "responses.parquet", "metrics.jsonl", ".lock", "out/")
"""What a verb may write again when it works on a run."""


def damage_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Return a file's content with a range of bytes zeroed, cut, flipped, doubled or replaced."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 1, 8, 64, 4096, len(data))))
    part = data[start:end]
    way = rng.choice(("zeroed", "cut out", "flipped", "doubled", "cut off", "emptied", "made text", "made noise"))
    new = {
        "zeroed": data[:start] + bytes(len(part)) + data[end:],
        "cut out": data[:start] + data[end:],
        "flipped": data[:start] + bytes(byte ^ (1 << rng.randrange(8)) for byte in part) + data[end:],
        "doubled": data[:end] + part + data[end:],
        "cut off": data[:start],
        "emptied": b"",
        "made text": b"not what it was\n",
        "made noise": data[:start] + rng.randbytes(len(part)) + data[end:],
    }[way]
    return new, f"bytes {start} to {end} of {len(data)} {way}"


def damage_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Return a JSON file's content with one field replaced, dropped or added."""
    content = json.loads(data)
    fields = list(_fields(content))
    holder, key, name = rng.choice(fields)
    if rng.random() < 0.2:
        del holder[key]
        return json.dumps(content).encode(), f"{name} dropped"
    if rng.random() < 0.05:
        deep = "[" * 20_000 + "]" * 20_000
        holder[key] = "DEEP"
        return json.dumps(content).replace('"DEEP"', deep).encode(), f"{name} nested 20,000 levels deep"
    holder[key] = rng.choice(STRANGE)
    return json.dumps(content).encode(), f"{name} = {holder[key]!r}"


def _fields(value: Any, name: str = "") -> Any:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield value, key, f"{name}.{key}".lstrip(".")
        yield from _fields(below, f"{name}.{key}")


def verbs(rng: random.Random, bench: Bench, run: Path, damaged: str) -> list[str]:
    """Return a command that may read what is damaged."""
    name = str(run)
    if "reward-models" in damaged:
        return rng.choice((["reward", "eval", name, "--task", "sandbox", *bench.small], bench.reward(), ["show", name]))
    if "compare" in damaged:
        folder = str(Path(damaged).parent)
        return rng.choice(
            (["show", folder], ["generate", folder, "hello", "--prefs", "1,0"], bench.compare(), ["compare", folder])
        )
    return rng.choice(
        (
            ["show", name],
            ["ls", "runs"],
            ["ls", "runs", "--json"],
            ["eval", name, "--json"],
            ["eval", name, "--samples", "2"],
            ["generate", name, "hello", "--prefs", "1,0"],
            ["export", name, "--out", "out", "--prefs", "1,0"],
            ["export", name, "--out", "out", "--prefs", "1,0", "--merged"],
            ["compare", name, name],
            ["eval"],
            bench.train(run.parts[3]),
        )
    )


def case(bench: Bench, number: int) -> Case:
    """Damage one file of a run, and give one command that may read it."""
    rng = bench.rng("damage", number)
    with bench.folder() as folder:
        shutil.copytree(bench.finished() / "results", folder / "results")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
        kinds = sorted({(path.name, path.parts[-4]) for path in files})  # every kind of file as often
        kind = rng.choice(kinds)
        path = rng.choice([path for path in files if (path.name, path.parts[-4]) == kind])
        data = path.read_bytes()
        as_json = path.suffix == ".json" and isinstance(json.loads(data), dict) and rng.random() < 0.7
        new, how = damage_json(rng, data) if as_json else damage_bytes(rng, data)
        path.write_bytes(new)
        damaged = str(path.relative_to(folder))
        runs = [record.parent.relative_to(folder) for record in sorted(folder.rglob("run.json"))]
        of_path = [run for run in runs if damaged.startswith(f"{run}/")]
        run = of_path[0] if of_path else rng.choice([run for run in runs if run.parts[3] in TRAINED])
        arguments = verbs(rng, bench, run, damaged)
        before = tree(folder)
        ended = warm.run(arguments, folder, seconds=90)
        lost = [
            name
            for name, content in before.items()
            if name != damaged and not any(part in name for part in WRITTEN) and name not in tree(folder)
        ]
    shown = [text for text in arguments if text not in bench.small]
    what = f"{damaged}: {how}; {' '.join(shown)}"
    if lost:
        return Case("damage", number, "lost", what, f"it removed {', '.join(lost[:3])}")
    why = ""
    if ended.code and arguments[:2] == ["ls", "runs"]:
        why = f"one bad file and no run is listed: {ended.errors[:1]}"
    answers = arguments[0] in ("generate", "export") or "--samples" in arguments  # with the weights of this very run
    answering = path.suffix == ".safetensors" and "stages" not in path.parts  # those only a resume reads
    if not ended.code and answers and answering and new != data and of_path:
        why = "it answered with weights that training did not write"
    return case_of("damage", number, ended, what, why)
