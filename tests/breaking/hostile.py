"""Hostile texts through every output: nothing that a terminal obeys may reach it, no line may be forged.

The texts stand in prompts, tokens of the model, data, cards, records of runs, exceptions, names of folders and options.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import warm
from bench import Bench
from tally import HIDDEN, Case, case_of

PIECES = (
    "\x1b[31mred", "\x1b]0;title\x07", "\x07", "\u202etxt.exe\u202c", "\u2066", "\x9b2J", "\r", "\x08\x08", "\x7f",
    "\x00", "\nerror: FORGED", "\nFORGED | 1.0 |", "\n| FORGED | 9 |", "<script>FORGED()</script>", "[bold]", "[/]",
    "`x`", "**b**", "|", "\u2028", "\ufeff", "{prompt}", "%s", "\\x1b", "&lt;", "é", "🙂", "plain words",
)  # fmt: skip
FORGED = re.compile(r"^(error: FORGED|\|? ?FORGED \|)", re.MULTILINE)


def text(rng: random.Random, most: int = 4) -> str:
    """Return a hostile text."""
    return "so " + "".join(rng.choice(PIECES) for _ in range(rng.randint(1, most)))


def ready(bench: Bench) -> Path:
    """Return a folder with a task whose model answers in hostile tokens, and finished runs on it; made once."""
    place = bench.work / "hostile"
    if (place / "whole").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    _ = bench.small
    shutil.copytree(bench.base, place / "base")
    file, rng = place / "base" / "tokenizer.json", random.Random(0)
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {
        (f"{word}{text(rng, 2)}" if number > 9 and number % 3 == 0 else word): number
        for word, number in vocabulary.items()
    }
    file.write_text(json.dumps(content))
    rows = [{"prompt": f"{i} {text(rng)}", "response": text(rng), "finished": True} for i in range(40)]
    for command in (
        ["init", "my", "--model", "base"],
        ["train", "prompting", "--task", "./my", *FEW],
        ["train", "best-of-n", "--task", "./my", *FEW, "--set", "n=2"],
    ):
        ended = warm.run(command, place, seconds=300)
        assert ended.code == 0, f"{command}: {ended.err}"
        if command[0] == "init":
            (place / "my/prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "whole").touch()
    return place


FEW = ("--set", "task.grid=2", "--set", "task.evaluation.bootstrap=100", "--set", "task.generation.max_new_tokens=6")


def _run(folder: Path) -> Path:
    return sorted((folder / "results/runs/my").glob("*/*/run.json"))[0].parent


def _edit(file: Path, rng: random.Random, *keys: str) -> None:
    """Put hostile text into the fields of these names, wherever they stand in a JSON file."""
    content = json.loads(file.read_text())

    def change(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: text(rng) if key in keys and isinstance(inner, str | None) else change(inner)
                for key, inner in value.items()
            }
        return [change(inner) for inner in value] if isinstance(value, list) else value

    file.write_text(json.dumps(change(content)))


def generate(rng: random.Random, folder: Path) -> list[str]:
    """A prompt on the command line, or the task's; the answers are the model's."""
    prompts = rng.choice(([], [text(rng).replace("\0", "")], ["-"]))
    return ["generate", str(_run(folder)), *prompts, "--prefs", "0.5,0.5"]


def show_run(rng: random.Random, folder: Path) -> list[str]:
    """The record of a run that somebody else sent."""
    _edit(
        _run(folder) / "run.json",
        rng,
        "error",
        "task",
        "method",
        "description",
        "cpu",
        "moalign_version",
        "recipe_file",
        "model",
    )
    return rng.choice(
        (["show", str(_run(folder))], ["ls", "runs"], ["eval", str(_run(folder))], ["compare", str(_run(folder))])
    )


def show_evaluation(rng: random.Random, folder: Path) -> list[str]:
    """The results of a run that somebody else sent."""
    file = _run(folder) / "eval.json"
    _edit(file, rng, "run", "method", "task")
    content = json.loads(file.read_text())
    if rng.random() < 0.5:
        content["objectives"] = [text(rng) for _ in content["objectives"]]
        file.write_text(json.dumps(content))
    return rng.choice(
        (["show", str(_run(folder))], ["ls", "runs"], ["eval", str(_run(folder))], ["compare", str(_run(folder))])
    )


def compare(rng: random.Random, folder: Path) -> list[str]:
    """Prompts and answers in the pages of a comparison."""
    runs = [str(path.parent) for path in sorted((folder / "results/runs/my").glob("*/*/run.json"))]
    return ["compare", *runs, "--markdown", "a.md", "--html", "a.html"]


def score(rng: random.Random, folder: Path) -> list[str]:
    """Rows of a file."""
    rows = [{"prompt": text(rng), "response": text(rng)} for _ in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["score", "--task", "./my", "--in", "rows.jsonl", *FEW]


def scorer(rng: random.Random, folder: Path) -> list[str]:
    """The exception or the number of a scorer."""
    file = folder / "my/scorers.py"
    bad = rng.choice((f"raise ValueError({text(rng)!r})", f"return [{text(rng)!r}]", f"raise KeyError({text(rng)!r})"))
    file.write_text(file.read_text().replace("    return [math.log", f"    {bad}\n    return [math.log"))
    return rng.choice((["train", "prompting", "--task", "./my", *FEW], ["check", "my"], score(rng, folder)))


def card(rng: random.Random, folder: Path) -> list[str]:
    """Texts of a card, each where it may stand."""
    file = folder / "my/task.yaml"
    lines = file.read_text().split("\n")
    places = [number for number, line in enumerate(lines) if re.match(r"(  )?\w+: [^{\[]", line)]
    number = rng.choice(places)
    lines[number] = f"{lines[number].split(': ')[0]}: {json.dumps(text(rng))}"
    file.write_text("\n".join(lines))
    return rng.choice(
        (
            ["show", "my"],
            ["check", "my"],
            ["preview", "--task", "./my"],
            ["train", "sft", "--task", "./my", "--dry-run"],
        )
    )


def recipe(rng: random.Random, folder: Path) -> list[str]:
    """Texts of a recipe."""
    file = folder / "my/mo-odpo.yaml"
    key = rng.choice(("description", "method", "task", "seed", json.dumps(text(rng))))
    kept = [line for line in file.read_text().split("\n") if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*kept, f"{key}: {json.dumps(text(rng))}"]))
    return rng.choice((["show", str(file.relative_to(folder))], ["check", str(file.relative_to(folder))]))


def preview(rng: random.Random, folder: Path) -> list[str]:
    """A prompt and a response."""
    prompt, response = (text(rng).replace("\0", "") for _ in range(2))
    return ["preview", prompt, "--task", "./my", "--response", response]


def points(rng: random.Random, folder: Path) -> list[str]:
    """The names and cells of a table."""
    quoted = ['"' + text(rng).replace('"', "") + '"' for _ in range(2)]
    (folder / "points.csv").write_text(rng.choice((f"{quoted[0]},{quoted[1]}\n1,2\n", f"a,b\n{quoted[0]},1\n")))
    return ["eval", "--points", "points.csv", "--ref", "0,0"]


def pairs(rng: random.Random, folder: Path) -> list[str]:
    """Pairs whose labellers have hostile names."""
    rows = [{"prompt": str(i), "chosen": text(rng), "rejected": "x" + text(rng), "group": text(rng)} for i in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = text(rng).replace("\0", "").replace("=", "")
    return [
        "reward",
        "train",
        "--pairs",
        rng.choice((f"{name}=pairs.jsonl", "pairs.jsonl")),
        "--model",
        "base",
        "--dry-run",
        "--loss",
        "more",
    ]


def names(rng: random.Random, folder: Path) -> list[str]:
    """Folders with hostile names."""
    name = text(rng).replace("\0", "").replace("/", "")
    (folder / "results").rename(folder / name)
    return rng.choice(
        (["ls", "runs", "--results", name], ["eval", "--results", name], ["show", f"{name}/runs/my"], ["check", name])
    )


WAYS: tuple[Callable[[random.Random, Path], list[str]], ...] = (
    generate, show_run, show_evaluation, compare, score, scorer, card, recipe, preview, points, pairs, names,
)  # fmt: skip


def case(bench: Bench, number: int) -> Case:
    """Bring hostile texts into one place, and read what is shown."""
    rng = bench.rng("hostile", number)
    way = WAYS[number % len(WAYS)]
    with bench.folder() as folder:
        shutil.copytree(ready(bench), folder, dirs_exist_ok=True)
        arguments = way(rng, folder)
        ended = warm.run(arguments, folder, stdin=text(rng).replace("\n", " ").encode(), seconds=120)
        why = "a forged line" if FORGED.search(f"{ended.err}\n{ended.out}") else ""
        for path in (folder / "a.md", folder / "a.html"):
            content = path.read_text(encoding="utf-8") if path.exists() else ""
            if path.suffix == ".md" and (hidden := HIDDEN.search(content)):
                why = f"the character U+{ord(hidden[0]):04X} raw in Markdown"
            if "<script>FORGED" in content or FORGED.search(content):
                why = f"markup or a line of a text's own in {path.name}"
    return case_of("hostile", number, ended, f"{way.__doc__} {' '.join(map(repr, arguments[:6]))}", why)
