"""Inputs to each loader, changed at random from right ones: a loader returns, or raises RequestError with clear lines.

A case is a batch of inputs to one loader, read in one child; 50 rounds of all make 100,000 inputs for each.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import warm
import wrong
from bench import CHECKOUT, Bench
from damage import STRANGE, damage_bytes, damage_json
from tally import RAW, Case, kind_of

SLOW, FAST = 500, 2000
"""Inputs of a case of a slow loader and of another."""


def _yaml_text(rng: random.Random) -> str:
    shipped = rng.choice(sorted((CHECKOUT / "recipes/sandbox").glob("*.yaml")))
    text = shipped.read_text(encoding="utf-8")
    for _ in range(rng.choice((1, 1, 2, 4))):
        text = rng.choice(wrong.CHANGES)(rng, text) or text
    return text


def _written(rng: random.Random, file: Path, text: str) -> Path:
    data = text.encode("utf-8", "surrogatepass")
    file.write_bytes(damage_bytes(rng, data)[0] if rng.random() < 0.2 else data)
    return file


def yaml(rng: random.Random, place: Path) -> None:
    """Parse the text of a YAML file."""
    from moalign.config import yaml_lines

    text = _yaml_text(rng)
    start = rng.randrange(len(text) + 1)
    yaml_lines.load(_written(rng, place / "a.yaml", text[start : start + rng.randrange(400)]))


def card(rng: random.Random, place: Path) -> None:
    """Read a task card."""
    from moalign.config.load import load_card

    text = (CHECKOUT / "recipes" / rng.choice(("sandbox", "sandbox-3", "stories")) / "task.yaml").read_text()
    for _ in range(rng.choice((1, 1, 2))):
        text = rng.choice(wrong.CHANGES)(rng, text) or text
    load_card(_written(rng, place / "task.yaml", text))


def recipe(rng: random.Random, place: Path) -> None:
    """Read a recipe with its method's settings and its card."""
    from moalign.config.load import load_recipe, recipe_names
    from moalign.methods import registry

    file = _written(rng, place / "recipe.yaml", _yaml_text(rng))
    method, _ = recipe_names(file)
    load_recipe(file, method, config_class=registry.get(method).Config)


def override(rng: random.Random, place: Path) -> None:
    """Read what stands after ``--set``."""
    from moalign.config import overrides

    pieces = (
        *wrong.VALUES,
        *wrong.settings()[:50],
        "=",
        ".",
        "[",
        "]",
        "{",
        "}",
        ",",
        ": ",
        "'",
        '"',
        " ",
        "&a ",
        "*a",
        "\n",
    )
    overrides.parse("".join(rng.choice(pieces) for _ in range(rng.randint(1, 7))))


def preferences(rng: random.Random, place: Path) -> None:
    """Read preferences, in numbers and in words."""
    from moalign.core import preferences

    names = ["helpfulness", "harmlessness", "humor"][: rng.randint(1, 3)]
    pieces = (*wrong.NUMBERS, *wrong.PREFS, *wrong.TEXTS, ",", ",", "helpfulness", "and", " ", "not ")
    text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 6)))
    preferences.parse(rng.choice((str, preferences.Words))(text), names)


def jsonl(rng: random.Random, place: Path) -> None:
    """Read responses from lines of JSON."""
    rows = [{"prompt": "a", "response": "b", "helpfulness": 1.5, "finished": True} for _ in range(rng.randint(0, 3))]
    for row in rows:
        if rng.random() < 0.7:
            row[rng.choice([*row, "Helpfulness", "\x1b", ""])] = rng.choice(STRANGE)
    data = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows).encode("utf-8", "surrogatepass")
    _table(rng, place / "a.jsonl", data)


def csv(rng: random.Random, place: Path) -> None:
    """Read responses from comma-separated values."""
    cells = [
        "prompt",
        "response",
        "helpfulness",
        "finished",
        "",
        "1",
        '"',
        'a"b',
        "nan",
        "x,y",
        "\r",
        *wrong.TEXTS[:40],
    ]
    lines = [",".join(rng.choice(cells) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
    lines.insert(0, rng.choice(("prompt,response,helpfulness", "prompt,response", "prompt,prompt", rng.choice(cells))))
    _table(rng, place / "a.csv", "\n".join(lines).encode("utf-8", "surrogatepass"))


def _table(rng: random.Random, file: Path, data: bytes) -> None:
    from moalign.config.card import DataSpec, SourceSpec
    from moalign.data.load import load_pairs, load_responses

    file.write_bytes(damage_bytes(rng, data)[0] if rng.random() < 0.5 else data)
    source = SourceSpec(path=str(file))
    if rng.random() < 0.3:
        list(load_pairs(DataSpec(prompts=["a"], pairs=source)))
    else:
        list(load_responses(DataSpec(prompts=["a"], responses=source)))


def points(rng: random.Random, place: Path) -> None:
    """Read the calculator's table of points."""
    from moalign.pareto import points

    cells = (*wrong.NUMBERS, "a", "b", "", '"', ",", "\n", "\n", "0.5", "1", ";", "\r", "\x00", "\ufeff", "\x1b")
    text = rng.choice(("a,b\n", "", "a\n")) + "".join(
        rng.choice((*cells, ",", "\n")) for _ in range(rng.randint(0, 20))
    )
    points.read_points(_written(rng, place / "points.csv", text))


def safetensors(rng: random.Random, place: Path) -> None:
    """Read the header of a file of weights."""
    from moalign.lm import model_folder

    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}, "a": entry}
    inner, _ = damage_json(rng, json.dumps(head).encode())
    length = rng.choice((len(inner), len(inner), len(inner) + 1, 0, 2**63, 2**64 - 1, 10**9))
    data = struct.pack("<Q", length) + inner + bytes(rng.choice((16, 16, 0, 15, 32)))
    (place / "model.safetensors").write_bytes(damage_bytes(rng, data)[0] if rng.random() < 0.3 else data)
    model_folder.header(place / "model.safetensors", "model")


def results(rng: random.Random, place: Path) -> None:
    """Read the results of an evaluation, of a comparison, a run's record, a normaliser and a model's config."""
    from moalign.comparison.result import CompareResult
    from moalign.evaluation.result import EvalResult
    from moalign.lm import model_folder
    from moalign.rewards.normaliser import Normaliser
    from moalign.runs import record

    readers: dict[str, Callable[[Path], Any]] = {
        "eval.json": EvalResult.load,
        "compare.json": CompareResult.load,
        "run.json": lambda path: record.read(path.parent),
        "normaliser.json": Normaliser.from_json,
        "config.json": lambda path: model_folder.read_config(path.parent, "model"),
    }
    name = rng.choice(list(readers))
    data = rng.choice(_found(place.parents[1] / "ready", name)).read_bytes()
    new = damage_json(rng, data)[0] if rng.random() < 0.8 else damage_bytes(rng, data)[0]
    (place / name).write_bytes(new)
    readers[name](place / name)


_listed: dict[str, list[Path]] = {}


def _found(folder: Path, name: str) -> list[Path]:
    """Return the files of a name in finished runs; of ``eval.json`` those of policies."""
    if name not in _listed:
        _listed[name] = [
            path for path in sorted(folder.rglob(name)) if "reward-models" not in str(path) or name != "eval.json"
        ]
    return _listed[name]


YAML = (yaml, card, recipe)
LOADERS = (*YAML, override, preferences, *YAML, jsonl, csv, *YAML, points, safetensors, *YAML, results)
"""One round: the slow ones four times, each time with a quarter of the inputs."""


def case(bench: Bench, number: int) -> Case:
    """Give a batch of inputs to one loader."""
    loader = LOADERS[number % len(LOADERS)]
    bench.finished()
    inputs = SLOW if loader in YAML else FAST
    with bench.folder() as folder:
        ended = warm.call(lambda: _batch(bench, loader, number, inputs, folder), (), folder, seconds=900)
    if ended.code:
        return Case(
            "loaders", number, "escaped", loader.__name__, f"the child ended with {ended.code}: {ended.err[-300:]}"
        )
    refused, faults = json.loads(ended.out)
    outcome = "escaped" if faults else "worked"
    what = f"{loader.__name__}: {(loader.__doc__ or '').strip()}"
    return Case("loaders", number, outcome, what, " || ".join(faults.values()), inputs, refused, len(faults))


def _parse_once() -> None:
    """Let texts that were parsed before, such as the shipped cards that every recipe names, not be parsed again."""
    from moalign.config import yaml_lines

    parse = functools.lru_cache(maxsize=256)(yaml_lines.parse)
    yaml_lines.parse = lambda text, source: copy.deepcopy(parse(text, source))


def _batch(bench: Bench, loader: Callable[[random.Random, Path], None], number: int, inputs: int, place: Path) -> int:
    """Print how many inputs were refused well, and what escaped, the first of each kind."""
    refused = 0
    faults: dict[str, str] = {}
    _parse_once()
    for count in range(inputs):
        problem = _problem(loader, bench.rng(f"loaders/{number}", count), place)
        if problem is None:
            continue
        if problem:
            faults.setdefault(kind_of(problem), f"input {count}: {problem}")
        refused += not problem
    print(json.dumps([refused, faults]))
    return 0


def _problem(loader: Callable[[random.Random, Path], None], rng: random.Random, place: Path) -> str | None:
    """Return None when an input was read, empty text when it was refused well, else what is wrong."""
    from moalign.core.errors import RequestError

    try:
        loader(rng, place)
    except RequestError as error:
        return _unclear(error.problems)
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/moalign/" in frame.filename]
        if not own:
            raise  # of the harness
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return f"a traceback: {type(error).__name__}: {str(error)[:200]!r} at {where}"
    return None


def _unclear(problems: tuple[str, ...]) -> str:
    """Return what is wrong with a refusal; the command line shortens its lines and escapes control characters."""
    for text in problems or ("",):
        raw = [meaning for mark, meaning in RAW.items() if mark in text]
        if not text.strip() or raw:
            return f"{raw or 'an empty message'}: {text[:200]!r}"
    return ""
