"""Commands that are killed at a random moment, once or several times, and given again: nothing computed may differ.

SIGKILL mostly; SIGTERM and SIGINT must be answered with a word and their exit codes.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import warm
from bench import Bench
from tally import Case, fault

VERBS = ("eval", "compare", "generate", "export", "score", "reward train")
MOST_KILLS = 3
OF_THE_MACHINE = {"seconds", "peak_memory_bytes", "created", "finished", "environment", "made", "since"}
"""Keys of JSON files that say when, how long and where."""
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


def kinds() -> list[str]:
    """Return what is killed: the training of every method, and verbs on what is finished."""
    from moalign.methods import registry

    return [*(f"train {name}" for name in registry.names()), *VERBS]


def command(bench: Bench, kind: str) -> list[str]:
    """Return the arguments of a kind."""
    run = "sft" if kind in ("eval", "generate", "export") else ""
    if run:
        (run,) = (str(path.parent.relative_to(bench.finished())) for path in _sft(bench))
    return {
        "eval": ["eval", run, "--samples", "3", "--json"],
        "generate": ["generate", run, "--prefs", "0.5,0.5", "--json"],
        "export": ["export", run, "--merged", "--out", "out", "--prefs", "0.5,0.5"],
        "score": ["score", "--task", "sandbox", "--in", "rows.jsonl", "--out", "scores.parquet", *bench.small],
        "compare": bench.compare(),
        "reward train": bench.reward(),
    }.get(kind) or bench.train(kind.removeprefix("train "))


def _sft(bench: Bench) -> list[Path]:
    return sorted((bench.finished() / "results/runs/sandbox/sft").glob("*/run.json"))[:1]


def _fill(bench: Bench, kind: str, folder: Path) -> None:
    """Put into a folder what a command needs."""
    if kind in ("eval", "generate", "export"):
        shutil.copytree(bench.finished() / "results", folder / "results")
    if kind == "score":
        rows = [{"prompt": f"prompt {i}", "response": f"answer {i} and more"} for i in range(200)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def result(folder: Path) -> dict[str, str]:
    """Return a digest of everything that a command left, but for what only tells the time and the machine."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name.startswith(".") or path.name.endswith(".lock") or ".sqlite" in path.name:
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps(_plain(json.loads(data)), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            data = json.dumps([_plain(json.loads(line)) for line in data.splitlines()]).encode()
        elif path.suffix in (".md", ".html", ".png", ".csv"):
            data = b""  # made of the JSON; they tell times
        digests[name] = sha256(data).hexdigest()
    return digests


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if key not in OF_THE_MACHINE}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def reference(bench: Bench, kind: str) -> dict[str, Any]:
    """Return seconds, digests and output of a kind when nobody interrupts it; made once."""
    file = bench.work / "references" / f"{kind.replace(' ', '-')}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        with bench.folder() as folder:
            _fill(bench, kind, folder)
            ended = warm.run(command(bench, kind), folder, seconds=300)
            assert ended.code == 0, f"{kind}: {ended.err}"
            made = {"seconds": ended.seconds, "files": result(folder), "out": _output(ended)}
        file.write_text(json.dumps(made))
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _output(ended: warm.Ended) -> str:
    return json.dumps(_plain(json.loads(ended.out)), sort_keys=True) if "--json" in ended.arguments else ""


def case(bench: Bench, number: int) -> Case:
    """Kill a command one to three times, give it again, and compare what it made with what it makes undisturbed."""
    rng = bench.rng("kills", number)
    kind = kinds()[number % len(kinds())]
    whole = reference(bench, kind)
    arguments = command(bench, kind)
    story: list[str] = []
    with bench.folder() as folder:
        _fill(bench, kind, folder)
        for _ in range(rng.randint(1, MOST_KILLS)):
            number_of = rng.choices(list(CODES), (6, 1, 1))[0]
            moment = rng.uniform(0.05, whole["seconds"])
            ended = warm.run(arguments, folder, signals=[(moment, number_of)], seconds=300)
            if not ended.stopped:
                break  # it was done before
            story.append(f"{ended.stopped} at {moment:.2f} s of {whole['seconds']:.1f} s")
            what = f"{kind}: {'; '.join(story)}"
            if problem := _after(ended, number_of, folder):
                return Case("kills", number, "escaped", what, problem, len(story))
        if kind == "export" and (folder / "out").exists():  # it was done, and would not write there again
            arguments = ["ls", "runs"]
        ended = warm.run(arguments, folder, seconds=300)
        what, kills = f"{kind}: {'; '.join(story)}", len(story)
        if problem := fault(ended):
            return Case("kills", number, "escaped", what, f"given again: {problem}", kills)
        if ended.code:
            return Case(
                "kills", number, "lost", what, f"given again: exit code {ended.code}: {ended.errors[:1]}", kills
            )
        if problem := _difference(whole, folder, ended):
            return Case("kills", number, "lost", what, problem, kills)
    return Case("kills", number, "worked", what, tried=kills)


def _after(ended: warm.Ended, number: int, folder: Path) -> str:
    """Return what is wrong right after a signal: its answer, half-written JSON, or the list of runs."""
    if ended.code not in (CODES[signal.Signals(number)], 0):  # 0: it was done at that moment
        return f"{ended.stopped}: " + (fault(ended) or f"exit code {ended.code}")
    if number != signal.SIGKILL and (problem := fault(ended)):
        return f"{ended.stopped}: {problem}"
    for path in folder.rglob("*.json"):
        inside = path.relative_to(folder).parts
        if any(part.startswith(".") for part in inside):
            continue
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return f"{'/'.join(inside)} is half-written"
    listed = warm.run(["ls", "runs", "--json"], folder)
    return fault(listed) or (f"ls runs: exit code {listed.code}" if listed.code else "")


def _difference(whole: dict[str, Any], folder: Path, ended: warm.Ended) -> str:
    files = result(folder)
    for name in sorted(whole["files"].keys() | files.keys()):
        if whole["files"].get(name) != files.get(name):
            state = "is missing" if name not in files else "is left over" if name not in whole["files"] else "differs"
            return f"{re.sub('[0-9a-f]{12,}', 'ID', name)} {state}"
    return "" if _output(ended) == whole["out"] else "the output differs"
