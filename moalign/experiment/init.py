"""``moalign init``: a task card, a scorer file, a recipe and prompts of one's own that train as they are.

What the user reads and edits is in ``templates/``; everything is checked, as ``check`` would, before a file appears,
and either all files appear or none.
"""

from __future__ import annotations

import builtins
import difflib
import importlib.util
import keyword
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.config import find
from moalign.config.card import taken
from moalign.config.describe import yaml_form
from moalign.core.errors import RequestError
from moalign.core.text import command
from moalign.experiment.templates import render
from moalign.lm import builtin
from moalign.rewards.rules import RULES
from moalign.runs import atomic

BUILT_IN = "smollm2-135m-instruct"
"""The model of a card when none is named: it comes with the project (``make llm``)."""
OBJECTIVES = ("brevity", "variety")
FILES = ("scorers.py", "prompts.jsonl", "mo-odpo.yaml", "task.yaml")
"""In the order in which they are written: the card, which names the others, comes last."""
NEW_TOKENS = 40
LONGEST_PROMPT = 256
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_TYPO = 0.8
"""A name this near to a rule's is taken for a misspelt rule, not for an objective of one's own."""
_READY = ("variety", "on-topic")
"""Objectives that are no rule and come ready to use."""
_TAKEN = {"math", "re", "words", "word_share", "empty", *dir(builtins)}
"""What ``scorers.py`` defines or calls itself."""
_RARE = ("dialogue-share", "ends-with")
"""Rules that may score all of a base's short answers alike, and so be refused as constant."""


@dataclass(frozen=True)
class Started:
    """What was written."""

    folder: Path
    task: str
    model: str
    objectives: list[str]
    prompts: int
    files: list[str]
    notes: list[str]


def init(folder: Path, model: str | None = None, data: Path | None = None, objectives: str | None = None) -> Started:
    """Write the files of a new task into ``folder``, which must be new or empty.

    Args:
        model: a model folder, hub id or built-in name; None: :data:`BUILT_IN`.
        data: a file with a column ``prompt``; None: everyday questions are written beside the card.
        objectives: names parted by commas; None: :data:`OBJECTIVES`. A rule's name is that rule; any other becomes a
            function in ``scorers.py``.

    Raises:
        RequestError: the folder holds something; the model, the data or an objective cannot be used.
    """
    folder = Path(os.path.expanduser(folder))
    check_free(folder, f"FOLDER {folder}", ", and nothing is overwritten; name a new folder")
    names = _objectives(objectives)
    model = BUILT_IN if model is None else model
    place = _model_folder(model)
    own = [name for name in names if name not in RULES]
    base = Path(os.path.realpath(folder))
    texts = {
        "scorers.py": render("scorers.py.j2", functions={name: _function(name) for name in own}),
        "mo-odpo.yaml": render("mo-odpo.yaml.j2", command=_train(folder)),
        "task.yaml": _card(folder, base, names, model, data, place),
    }
    if data is None:
        texts["prompts.jsonl"] = render("prompts.jsonl")
    with _written(folder, texts) as where:
        prompts = _checked(where, names)
    notes = [
        f"{name} is yours to define: {_function(name)}() in {folder / 'scorers.py'} counts a list of words until then"
        for name in own
        if name not in _READY
    ]
    notes += [
        f"{name} may score all of the model's answers alike, and a constant objective is refused: training tells it "
        "when it samples the base; then raise generation.max_new_tokens, or choose another rule"
        for name in names
        if name in _RARE
    ]
    if place is None and builtin.installed(model) is None:
        notes.append(f"the model {model} is not on this machine yet; get it with: {builtin.MODELS[model].command}")
    files = [str(folder / name) for name in FILES if name in texts]
    return Started(folder, task_name(base), model, names, prompts, files, notes)


def check_free(folder: Path, where: str, remedy: str) -> None:
    """Raise RequestError unless ``folder`` is missing or an empty folder."""
    if folder.is_dir() and atomic.is_free(folder):
        return
    if folder.exists() or folder.is_symlink():
        what = "the folder is not empty" if folder.is_dir() else "it is not a folder"
        raise RequestError(f"{where}: {what}{remedy}")


@contextmanager
def _written(folder: Path, texts: dict[str, str]) -> Iterator[Path]:
    """Write the texts, yield the folder that holds them, and keep them only when the block ends well."""
    from moalign.runs import atomic

    remedy = "name another FOLDER"
    names = [name for name in FILES if name in texts]
    if not folder.exists():
        with atomic.directory(folder, replace=False, remedy=remedy) as place:
            for name in names:
                (place / name).write_text(texts[name], encoding="utf-8")
            yield place
        return
    try:  # an empty folder stays the folder it is: somebody may stand in it
        for name in names:
            atomic.write_text(folder / name, texts[name], remedy)
        yield folder
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise


def _checked(folder: Path, objectives: Sequence[str]) -> int:
    """Read what was written as training would; return the number of prompts."""
    from moalign.config import load
    from moalign.data import load as records
    from moalign.data import splits
    from moalign.methods import registry
    from moalign.rewards.scorer import build_scorers

    config = registry.get("mo-odpo").Config
    card = load.load_recipe(folder / "mo-odpo.yaml", "mo-odpo", folder / "task.yaml", (), config).card
    assert card.data is not None and card.objective_names == list(objectives)
    build_scorers(card.objectives, folder)
    prompts = records.load_prompts(card.data)
    splits.check_leaks(splits.split(prompts, card.splits))
    return len(prompts)


# -- objectives ----------------------------------------------------------------------------------------------------


def _objectives(text: str | None) -> list[str]:
    names = list(OBJECTIVES) if text is None else [part.strip() for part in text.split(",") if part.strip()]
    where = "--objectives"
    if len(names) < 2:
        raise RequestError(f"{where}: two or more names are needed, parted by commas; found {text!r}")
    problems = [f"{where}: {problem}" for problem in taken(names).values()]
    known = [*RULES, *_READY]
    for name in names:
        near = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=_TYPO)
        if not _NAME.fullmatch(name):
            problems.append(f"{where}: {name!r}: a name has letters, digits, - and _, and begins with a letter")
        elif name not in known and near:
            problems.append(
                f"{where}: {name!r} is no rule; did you mean {near[0]!r}? (an objective of your own needs a name that "
                f"is not so near; rules: {', '.join(sorted(RULES))})"
            )
        elif name == "vader" and importlib.util.find_spec("vaderSentiment") is None:
            problems.append(f"{where}: vader needs a library; install it with: pip install moalign[text]")
    kinds: tuple[tuple[Callable[[str], str], str], ...] = ((str, "names"), (_function, "names of functions"))
    for key, what in kinds:
        made = [key(name) for name in names]
        twice = sorted({name for name in made if made.count(name) > 1})
        if twice and not problems:
            problems.append(f"{where}: {what} must differ; found twice: {', '.join(twice)}")
    if problems:
        raise RequestError(*problems)
    return names


def _function(name: str) -> str:
    """Return the name of an objective's function in ``scorers.py``."""
    function = name.replace("-", "_").lower()
    return f"{function}_" if keyword.iskeyword(function) or function in _TAKEN else function


_RULES: dict[str, tuple[str, str]] = {
    "brevity": ("options: {unit: characters}", "minus the length"),
    "length": ("options: {unit: words, target: 20}", "best at 20 words"),
    "repetition": ("options: {n: 2}, maximise: false", "share of repeated pairs of words"),
    "keyword-density": ("options: {keywords: [you, your]}", "how often these words occur; put in your own"),
    "regex-count": (r"options: {pattern: '[,;:]'}", "how often the pattern occurs; put in your own"),
}
"""Options and comment of rules that have better ones than their defaults, or need some."""


def _objective_line(name: str) -> str:
    if name not in RULES:
        return f"{{name: {name}, kind: python, function: 'scorers.py:{_function(name)}'}}"
    options, comment = _RULES.get(name, ("", RULES[name].summary.rstrip(".")))
    fields = ", ".join(filter(None, [f"name: {name}, kind: rule, rule: {name}", options]))
    return f"{{{fields}}}  # {comment}"


# -- the model -----------------------------------------------------------------------------------------------------


def _model_folder(model: str) -> Path | None:
    """Return a folder with the files of the model's tokenizer; None: a built-in one that is not converted yet."""
    from moalign.lm import model_folder

    where = "--model"
    if model in builtin.MODELS and not Path(model).is_dir():
        return builtin.converted(model)  # converting it takes half a minute: the first use does it
    local = model_folder.local_folder(model, Path.cwd(), where)
    if local is not None:
        model_folder.require_complete(local, where)
        return local
    from huggingface_hub import snapshot_download

    model_folder.fetch(model, None, where, config_only=True)  # its messages say what is wrong with an id
    # The config and the tokenizer; the weights are left for training.
    return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja", "tokenizer*"], ignore_patterns=["*/*"]))


def _longest_prompt(model: str, folder: Path | None) -> int:
    """Return the most tokens of a prompt that the model's context has room for."""
    context = None if folder is None else _json(folder / "config.json").get("max_position_embeddings")
    if not isinstance(context, int):
        return LONGEST_PROMPT
    if context - NEW_TOKENS < 16:
        raise RequestError(
            f"--model {model}: its context of {context} tokens is too short for a prompt and {NEW_TOKENS} new tokens"
        )
    return min(LONGEST_PROMPT, context - NEW_TOKENS)


def _has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer saved in a folder has a chat template; reads its files, loads nothing."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_json(folder / "tokenizer_config.json").get("chat_template"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = atomic.parsed_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# -- the card ------------------------------------------------------------------------------------------------------


def task_name(base: Path) -> str:
    """Return a task's name from its folder's: small letters, digits, dots and dashes.

    >>> task_name(Path("/home/me/My Task"))
    'my-task'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", base.name.lower()).strip("-._") or "my-task"


def task_option(folder: Path) -> str:
    """Return how ``--task`` names the card in a folder: a plain name would be taken for a task of moalign's."""
    name = str(folder)
    return f"./{name}" if not find.is_path(name) and name in find.list_tasks() else name


def _train(folder: Path) -> str:
    return command("train", "mo-odpo", "--task", task_option(folder))


def _from_card(base: Path, path: Path | str) -> str:
    """Return how a card in ``base`` names a file that the user named from here."""
    given = Path(os.path.expanduser(path))
    if given.is_absolute():
        return str(given)
    relative = os.path.relpath(os.path.realpath(given), base)
    return relative if relative.startswith("..") else f"./{relative}"


def _card(
    folder: Path, base: Path, objectives: Sequence[str], model: str, data: Path | None, place: Path | None
) -> str:
    if data is not None and not os.path.isfile(os.path.expanduser(data)):
        raise RequestError(f"--data {data}: there is no such file; a .jsonl, .csv or .parquet file is needed")
    chat, count = place is None or _has_chat_template(place), len(objectives)
    return render(
        "task.yaml.j2",
        command=_train(folder),
        name=task_name(base),
        objectives=[_objective_line(name) for name in objectives],
        model=yaml_form(_from_card(base, model) if os.path.isdir(os.path.expanduser(model)) else model),
        prompts=None if data is None else yaml_form(_from_card(base, data)),
        chat=chat,
        words=chat and tuple(objectives) == OBJECTIVES,
        longest=_longest_prompt(model, place),
        new=NEW_TOKENS,
        # Of more than two objectives the corners and the middles between two: the even grid in steps of a half.
        grid=5 if count == 2 else count * (count + 1) // 2,
    )
