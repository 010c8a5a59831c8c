"""Wrong requests: drawn from the grammar of options, and from shipped cards and recipes with something wrong in them.

The grammar is the command line's own tree of commands, so that a new option is tried as soon as it is there. What is
refused must leave the folder as it was.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import typer
import warm
from bench import CHECKOUT, Bench, tree
from tally import Case, case_of

TEXTS = (
    "", " ", "x", "0", "-1", "1", "3", "1e400", "nan", "inf", "-0.0", "1e-320", "99999999999999999999999", "1_000",
    "0x10", "null", "true", "[]", "{}", "[1, 2", "'", '"', "\\", "a=b", "=", "=1", "a=", "..", "/", ".", "~", "-",
    "--", "%s", "{prompt}", "é", "日本", "🙂", "\ud83d", "\u202etxt", "\x1b[31mred", "\x07", "two\nlines", "tab\there",
    "x" * 300, "x" * 5000, "/dev/null", "here.txt", "folder", "no/such/file.yaml", "locked", "loop", "dangling",
    "$HOME", "`id`", "; ls", "\x7f", "NUL", "*", "[b]", "@file",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "1", "2", "3", "nan", "1e9", "99999999999999999999", "1.5", "", "x", "٣", "1e400", "-0", "0x3", " 4 ",
)  # fmt: skip
PREFS = (
    "0.3,0.7", "3,7", "0.5,0.5", "1,0", "nan,1", "inf,-inf", "1e400,0", "-1,2", "0.3", "0.2,0.3,0.5", "", ",", "a,b",
    "0.3;0.7", "0.3, 0.7", "0.30000001,0.7", "1e-320,1", "٠.٥,٠.٥", "0.5,0.5,", "½,½", "0_1,0", "0.3,0.7\n",
    "\x1b[2J,1",
)  # fmt: skip
LEAVES = ("train", "compare", "bench", "reward")
"""Verbs that work for long when a request happens to be right: they get the options of a task of seconds first."""
SECONDS = 15
"""A request that is still at work then is interrupted: it was no wrong one."""


@cache
def grammar() -> dict[tuple[str, ...], Any]:
    """Return every command by the words that name it."""
    from moalign.cli.main import app

    found: dict[tuple[str, ...], Any] = {}

    def walk(words: tuple[str, ...], command: Any) -> None:
        for name, below in getattr(command, "commands", {}).items():
            walk((*words, name), below)
        if words and not hasattr(command, "commands"):
            found[words] = command

    walk((), typer.main.get_command(app))
    return found


@cache
def names(kind: str) -> list[str]:
    """Return the names of methods, or of tasks."""
    from moalign.config import find
    from moalign.methods import registry

    return registry.names() if kind == "method" else [*find.list_tasks(), "card.yaml", "folder"]


@cache
def settings() -> list[str]:
    """Return dotted names of settings: of every card and recipe that is shipped."""
    from moalign.cli.output import flat
    from moalign.config import yaml_lines

    found = set()
    for path in sorted((CHECKOUT / "recipes").rglob("*.yaml")):
        prefix = "task." if path.name == "task.yaml" else ""
        found |= {prefix + re.sub(r"\.\d+", "", key) for key, _ in flat(yaml_lines.load(path).data)}
    return sorted(found)


def right(rng: random.Random, parameter: Any, runs: list[str]) -> str:
    """Return a value of a parameter that is right, or nearly."""
    name, metavar = parameter.name or "", parameter.metavar or ""
    known = [
        ("set", [f"{key}={rng.choice((*TEXTS, *NUMBERS))}" for key in rng.sample(settings(), 1)]),
        ("prefs_text", ["helpful", "harmless and helpful", "both"]),
        ("method", names("method")),
        ("task", names("task")),
        ("run", runs or ["abc"]),
        ("kind", ["methods", "tasks", "runs", "recipes", "models"]),
        ("recipe", ["recipe.yaml", *names("task")] if metavar == "FILE" else [*names("task"), "sandbox/ric"]),
        ("name", [*runs, *names("task"), "ric"]),
        ("prefs", ["0.5,0.5", "0.3,0.7", "1,0"]),
        ("ref", ["0,0", "-0.1,-0.1"]),
        ("points", ["here.csv"]),
        ("source", ["here.jsonl"]),
        ("pairs", ["here.jsonl", "a=here.jsonl"]),
        ("model", [*runs, "folder"]),
        ("loss", ["bt", "more", "multitask"]),
        ("results", ["results", "new"]),
    ]
    for start, values in known:
        if name.startswith(start):
            return rng.choice(values)
    return rng.choice(
        ("1", "2", "3") if metavar in ("N", "T") else ("here.txt", "new.json", "here.jsonl", "folder", "a word")
    )


def value(rng: random.Random, parameter: Any, runs: list[str]) -> str:
    """Return a value of a parameter: mostly right, else anything, a number, a preference, or a slip of the finger."""
    if rng.random() < 0.7:
        return right(rng, parameter, runs)
    if parameter.metavar in ("N", "T"):
        return rng.choice(NUMBERS)
    if parameter.name in ("prefs", "ref"):
        return rng.choice(PREFS)
    return rng.choice(TEXTS) if rng.random() < 0.6 else misspelt(rng, right(rng, parameter, runs))


def misspelt(rng: random.Random, word: str) -> str:
    """Return a word with one slip of the finger."""
    place = rng.randrange(len(word) + 1)
    return rng.choice((word[:place] + word[place + 1 :], word[:place] + "q" + word[place:], word.upper(), word + " "))


def request(rng: random.Random, small: list[str], runs: list[str]) -> list[str]:
    """Return the arguments of a request."""
    words = rng.choice(sorted(grammar()))
    command = grammar()[words]
    arguments: list[str] = [] if rng.random() > 0.02 else [rng.choice(TEXTS)]
    arguments += words if rng.random() > 0.03 else [misspelt(rng, words[0])]
    if words[0] in LEAVES and words != ("reward", "eval"):
        arguments += [*small, "--set", "task.suite=[best-of-n]", *(["--steps", "2"] if words[0] == "bench" else [])]
    for parameter in command.params:
        needed = parameter.required or parameter.param_type_name == "argument"
        for _ in range(rng.choice((1, 1, 1, 1, 0, 2)) if needed else rng.random() < 0.25):
            option = rng.choice(parameter.opts)
            option = misspelt(rng, option) if rng.random() < 0.02 else option
            if parameter.param_type_name == "argument":
                arguments.append(value(rng, parameter, runs))
            elif getattr(parameter, "is_flag", False):
                arguments.append(option)
            else:
                arguments += [option, value(rng, parameter, runs)] if rng.random() < 0.97 else [option]
    if rng.random() < 0.05:
        rng.shuffle(arguments)
    # What no command line can hold: a null byte, and half a character unless it stands for a byte that is not UTF-8.
    return [text.replace("\0", "").replace("\ud83d", "\udcff") for text in arguments]


# -- cards and recipes -----------------------------------------------------------------------------------------------


def _lines(change: Callable[[random.Random, list[str]], None]) -> Callable[[random.Random, str], str]:
    def changed(rng: random.Random, text: str) -> str:
        lines = text.split("\n")
        change(rng, lines)
        return "\n".join(lines)

    return changed


def _drop(rng: random.Random, lines: list[str]) -> None:
    del lines[rng.randrange(len(lines))]


def _double(rng: random.Random, lines: list[str]) -> None:
    place = rng.randrange(len(lines))
    lines.insert(rng.randrange(len(lines)), lines[place])


def _indent(rng: random.Random, lines: list[str]) -> None:
    place = rng.randrange(len(lines))
    lines[place] = rng.choice(("\t", " ", "  ", "- ", "? ", "\u00a0", "&a ", "*a ", "!!x ")) + lines[place]


def _rename(rng: random.Random, text: str) -> str:
    found = list(re.finditer(r"[\w-]+(?=:)", text))
    if not found:
        return text
    key = rng.choice(found)
    return text[: key.start()] + rng.choice((misspelt(rng, key[0]), rng.choice(VALUES), "<<")) + text[key.end() :]


def _revalue(rng: random.Random, text: str) -> str:
    found = [place for place in re.finditer(r"(?<=: )[^,{}\[\]\n]+", text)]
    if not found:
        return text
    place = rng.choice(found)
    return text[: place.start()] + rng.choice(VALUES) + text[place.end() :]


def _cut(rng: random.Random, text: str) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _insert(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return (
        text[:place]
        + rng.choice((*VALUES, "\r", "\x00", "\x1b", "\ufeff", "\u2028", "'", '"', "{", "["))
        + text[place:]
    )


VALUES = (
    *TEXTS[:40], "1e400", "-1", "0", "1.5", ".nan", ".inf", "1" * 5000, "0x" + "f" * 5000, "[[[[]]]]", "{a: {b: c}}",
    "&x 1", "*x", "!!python/object:os.system x", "[1, 'a', null]", "1e20", "9223372036854775808", "2026-01-01", "yes",
    "[0.5, 0.5]", "[1]", "sandbox", "hf-classifier", "function", "|\n  text", ">", "'\\e[31m'", '"\\e[31m"',
    '"\\u202e"', '"a\\nerror: forged"', "no_such_module:f", "../../etc/passwd",
)  # fmt: skip
CHANGES = (
    _lines(_drop),
    _lines(_double),
    _lines(_indent),
    _rename,
    _rename,
    _revalue,
    _revalue,
    _revalue,
    _cut,
    _insert,
)


def broken_file(rng: random.Random, folder: Path) -> tuple[list[str], str]:
    """Write a card or recipe with one to three changes into the folder; return a request that reads it, and it."""
    shipped = rng.choice(sorted((CHECKOUT / "recipes").rglob("*.yaml")))
    text = re.sub(r"(?m)^#.*\n| +#.*$", "", shipped.read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text = rng.choice(CHANGES)(rng, text) or text
    is_card = shipped.name == "task.yaml"
    name = "card.yaml" if is_card else "recipe.yaml"
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    method = rng.choice(names("method")) if is_card else shipped.stem
    how = ["check", "show", "dry"] + (["preview", "score", "pairs"] if is_card else [])
    return {
        "check": ["check", name],
        "show": ["show", name],
        "dry": ["train", method, "--task" if is_card else "--recipe", name, "--dry-run"],
        "preview": ["preview", "--task", name],
        "score": ["score", "--task", name, "--in", "here.jsonl"],
        "pairs": ["reward", "train", "--task", name, "--dry-run"],
    }[rng.choice(how)], text


# -- cases -----------------------------------------------------------------------------------------------------------


def furnish(folder: Path) -> None:
    """Put into a folder what a request may name."""
    for name, text in {
        "here.txt": "text\n",
        "here.jsonl": '{"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}\n',
        "here.csv": "a,b\n1,2\n",
        "card.yaml": "name: mine\n",
        "recipe.yaml": "method: sft\ntask: sandbox\n",
        "folder/file": "",
        "locked": "secret",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "locked").chmod(0)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")


def case(bench: Bench, number: int) -> Case:
    """Try one request."""
    rng = bench.rng("wrong", number)
    with bench.folder() as folder:
        furnish(folder)
        text, runs = "", []
        if rng.random() < 0.3:
            shutil.copytree(bench.finished() / "results", folder / "results")
            runs = [str(path.parent.relative_to(folder)) for path in sorted(folder.rglob("run.json"))]
            runs += [Path(run).name for run in runs]
        if not runs and rng.random() < 0.5:
            arguments, text = broken_file(rng, folder)
        else:
            arguments = request(rng, bench.small, runs)
        before = tree_of(folder)
        ended = warm.run(arguments, folder, signals=[(SECONDS, signal.SIGINT)], seconds=60)
        left = sorted(tree_of(folder).items() ^ before.items())
        why = ""
        if ended.code == 2 and not ended.stopped and left:
            why = f"refused, but it left {', '.join(name for name, _ in left[:3])}"
    shown = [text for text in arguments if text not in bench.small or text == "--set"]
    what = " ".join(repr(word) if len(word) < 200 else f"{word[:20]!r}..." for word in shown)
    return case_of("wrong", number, ended, what + (f"  # {_difference(arguments, text)}" if text else ""), why)


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, but for those that nobody may read."""
    return {name: data for name, data in tree(folder).items() if name not in ("locked", "loop")}


def _difference(arguments: list[str], text: str) -> str:
    """Return the changed line of a card or recipe: the first that no shipped file has."""
    shipped = {line for path in (CHECKOUT / "recipes").rglob("*.yaml") for line in path.read_text().split("\n")}
    return next((line[:200] for line in text.split("\n") if line not in shipped), "a line is missing or stands twice")
