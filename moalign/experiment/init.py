"""``moalign init``: a task card, a scorer file, a recipe and prompts of one's own that train as they are.

The templates below are what the user reads and edits; everything in them is checked, as ``check`` would, before a file
appears, and either all files appear or none.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import keyword
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.config.card import SplitSpec
from moalign.config.describe import yaml_form
from moalign.core.errors import RequestError
from moalign.lm import builtin

BUILT_IN = "smollm2-135m-instruct"
"""The model of a card when none is named: it comes with the project (``make llm``)."""
OBJECTIVES = ("brevity", "variety")
FILES = ("scorers.py", "prompts.jsonl", "mo-odpo.yaml", "task.yaml")
"""In the order in which they are written: the card, which names the others, comes last."""
NEW_TOKENS = 40
LONGEST_PROMPT = 256
SPLITS = SplitSpec(train=0.6, calibration=0.2, eval=0.2)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_TYPO = 0.8
"""A name this near to a rule's is taken for a misspelt rule, not for an objective of one's own."""


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
    folder = folder.expanduser()
    check_free(folder)
    wanted = _objectives(objectives)
    named, place = _model(BUILT_IN if model is None else model)
    facts = _facts(named, place)
    base = Path(os.path.realpath(folder))
    texts = {
        "scorers.py": _scorers(wanted),
        "mo-odpo.yaml": _RECIPE.format(folder=folder),
        "task.yaml": _card(folder, base, wanted, named, data, facts),
    }
    if data is None:
        texts["prompts.jsonl"] = "".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS)
    with _written(folder, texts) as where:
        prompts = _checked(where, wanted)
    notes = [
        f"{name} is yours to define: {_function(name)}() in {folder / 'scorers.py'} counts a list of words until then"
        for name in wanted
        if not _is_rule(name) and name not in _READY
    ]
    if place is None and builtin.installed(named) is None:
        notes.append(f"the model {named} is not on this machine yet; get it with: {builtin.MODELS[named].command}")
    files = [str(folder / name) for name in FILES if name in texts]
    return Started(folder, _task_name(base), named, wanted, prompts, files, notes)


def check_free(folder: Path) -> None:
    """Raise RequestError unless ``folder`` is missing or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        what = "the folder is not empty" if folder.is_dir() else "it is not a folder"
        raise RequestError(f"FOLDER {folder}: {what}, and nothing is overwritten; name a new folder")


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
    parts = splits.split(prompts, card.splits)
    splits.check_leaks(parts)
    return len(prompts)


# -- objectives ----------------------------------------------------------------------------------------------------


def _objectives(text: str | None) -> list[str]:
    from moalign.rewards.rules import RULES

    names = list(OBJECTIVES) if text is None else [part.strip() for part in text.split(",") if part.strip()]
    where = "--objectives"
    if len(names) < 2:
        raise RequestError(f"{where}: two or more names are needed, parted by commas; found {text!r}")
    problems = []
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
    for key, what in ((str, "names"), (_function, "names of functions")):
        made = [key(name) for name in names]
        twice = sorted({one for one in made if made.count(one) > 1})
        if twice and not problems:
            problems.append(f"{where}: {what} must differ; found twice: {', '.join(twice)}")
    if problems:
        raise RequestError(*problems)
    return names


def _is_rule(name: str) -> bool:
    from moalign.rewards.rules import RULES

    return name in RULES


def _function(name: str) -> str:
    """Return the name of an objective's function in ``scorers.py``."""
    found = name.replace("-", "_").lower()
    return f"{found}_" if keyword.iskeyword(found) or found in _TAKEN else found


_TAKEN = {"math", "re", "words", "word_share", "empty"}
"""What ``scorers.py`` defines itself."""

_RULES: dict[str, tuple[str, str]] = {
    "brevity": ("options: {unit: characters}", "minus the length"),
    "length": ("options: {unit: words, target: 20}", "best at 20 words"),
    "repetition": ("options: {n: 2}, maximise: false", "share of repeated pairs of words"),
    "keyword-density": ("options: {keywords: [you, your]}", "how often these words occur; put in your own"),
    "regex-count": (r"options: {pattern: '[,;:]'}", "how often the pattern occurs; put in your own"),
}
"""Options and comment of rules that have better ones than their defaults, or need some."""


def _objective_line(name: str) -> str:
    from moalign.rewards.rules import RULES

    if name in RULES:
        options, comment = _RULES.get(name, ("", RULES[name].summary.rstrip(".")))
        told = ", ".join(filter(None, [f"name: {name}, kind: rule, rule: {name}", options]))
        return f"  - {{{told}}}  # {comment}"
    return f"  - {{name: {name}, kind: python, function: 'scorers.py:{_function(name)}'}}"


def _scorers(names: Sequence[str]) -> str:
    own = [name for name in names if not _is_rule(name)]
    unused = "" if own else "task.yaml has rules alone so far: variety, below, is an example that nothing uses.\n"
    parts = [_SCORERS_HEAD.format(unused=unused)]
    for name in own or ["variety"]:
        constant = _function(name).upper() + "_WORDS"
        parts.append(_READY.get(name) or _OWN.format(name=name, function=_function(name), constant=constant))
    return "\n\n".join(parts)


# -- the model -----------------------------------------------------------------------------------------------------


def _model(model: str) -> tuple[str, Path | None]:
    """Return (the model as the user named it, a folder with its tokenizer's files or None when it is not here)."""
    from moalign.lm import model_folder

    where = "--model"
    if model in builtin.MODELS and not Path(model).is_dir():
        return model, builtin.converted(model)  # converting it takes half a minute: the first use does it
    local = model_folder.local_folder(model, Path.cwd(), where)
    if local is not None:
        model_folder.require_complete(local, where)
        return model, local
    return model, _tokenizer_of_hub(model, where)


def _tokenizer_of_hub(model: str, where: str) -> Path:
    """Return a folder with the config and the tokenizer of a hub model; its weights are left for training."""
    from huggingface_hub import snapshot_download

    from moalign.lm import model_folder

    model_folder.fetch(model, None, where, config_only=True)  # its messages say what is wrong with an id
    return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja", "tokenizer*"], ignore_patterns=["*/*"]))


@dataclass(frozen=True)
class _Facts:
    """What the card needs to know of a model."""

    chat: bool
    longest: int
    """Most tokens of a prompt."""


def _facts(model: str, folder: Path | None) -> _Facts:
    if folder is None:
        return _Facts(chat=True, longest=LONGEST_PROMPT)
    context = _json(folder / "config.json").get("max_position_embeddings")
    room = context - NEW_TOKENS if isinstance(context, int) else LONGEST_PROMPT
    if room < 16:
        raise RequestError(
            f"--model {model}: its context of {context} tokens is too short for a prompt and {NEW_TOKENS} new tokens"
        )
    return _Facts(has_chat_template(folder), min(LONGEST_PROMPT, room))


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer saved in a folder has a chat template; reads its files, loads nothing."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_json(folder / "tokenizer_config.json").get("chat_template"))


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


# -- the card ------------------------------------------------------------------------------------------------------


def _task_name(base: Path) -> str:
    """Return a task's name from its folder's: small letters, digits, dots and dashes.

    >>> _task_name(Path("/home/me/My Task"))
    'my-task'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", base.name.lower()).strip("-._") or "my-task"


def _from_card(base: Path, path: Path | str) -> str:
    """Return how a card in ``base`` names a file that the user named from here."""
    given = Path(path).expanduser()
    if given.is_absolute():
        return str(given)
    found = os.path.relpath(os.path.realpath(given), base)
    return found if found.startswith("..") else f"./{found}"


def _card(
    folder: Path,
    base: Path,
    objectives: Sequence[str],
    model: str,
    data: Path | None,
    facts: _Facts,
) -> str:
    if data is not None and not data.expanduser().is_file():
        raise RequestError(f"--data {data}: there is no such file; a .jsonl, .csv or .parquet file is needed")
    local = Path(model).expanduser().is_dir()
    count = len(objectives)
    words = _WORDS if tuple(objectives) == OBJECTIVES and facts.chat else ""
    text = _CARD.format(
        folder=folder,
        name=_task_name(base),
        objectives="\n".join(map(_objective_line, objectives)),
        model=yaml_form(_from_card(base, model) if local else model),
        prompts=yaml_form("prompts.jsonl" if data is None else _from_card(base, data)),
        of_data="\n  # a file with the column prompt; other names: columns: {prompt: question}" if data else "",
        splits=f"{{train: {SPLITS.train:g}, calibration: {SPLITS.calibration:g}, eval: {SPLITS.eval:g}}}",
        chat=str(facts.chat).lower(),
        chat_comment=_CHAT if facts.chat else _NO_CHAT,
        preference=yaml_form("{prompt} {preference}" if words else "[{preference}] {prompt}"),
        words=words,
        marker="" if facts.chat else '\n  marker: "\\nAnswer:"  # ends every prompt',
        longest=facts.longest,
        new=NEW_TOKENS,
        reference=yaml_form([0] * count),
        sensitivity=yaml_form([-0.1] * count),
        grid=5 if count == 2 else _small_grid(count),
    )
    return text


def _small_grid(objectives: int) -> int:
    """Return the size of the even grid in steps of a half: corners and the middles between two."""
    return objectives * (objectives + 1) // 2


_CHAT = "the model's tokenizer has a chat template: a prompt becomes the user's turn"
_NO_CHAT = "the model's tokenizer has no chat template"

_CARD = """\
# A task of your own: the model, what its answers are judged by, and how they are compared.
# command: moalign train mo-odpo --task {folder}
# Every run of this card is comparable with every other; change a line that matters, and it is another task.
name: {name}
kind: text
description: answers of a model of my own
model: {model}  # a model folder (safetensors), a hub id or a built-in name
objectives:
  # What answers are judged by: two or more that conflict. Larger is better (smaller: maximise: false).
  #   kind: rule           ready made, see "moalign show TASK" of any task and the README for the list
  #   kind: python         a function of your own in scorers.py
  #   kind: hf-classifier  a reward model: {{name: helpful, kind: hf-classifier, model: owner/name}}
  #   kind: lm             how likely a language model finds an answer (fluency), or that it is one (relevance)
{objectives}
data:
  prompts: {{path: {prompts}}}{of_data}
  # responses: {{path: responses.jsonl}}  # columns prompt, response: answers to learn from (offline methods)
splits: {splits}  # by a hash of the prompt: train, fit the scales of the scores, judge
template:
  chat: {chat}  # {chat_comment}
  preference: {preference}  # how the policy reads what is wanted{words}{marker}
generation: {{max_prompt_tokens: {longest}, max_new_tokens: {new}, temperature: 0.7, batch_size: 32}}
# Small numbers, so that a first run takes minutes on a CPU. Before you believe a table: evaluation.prompts 128 or more.
pool: {{prompts: 32, per_prompt: 4, calibration_per_prompt: 4}}  # answers of the base: to scale scores and learn from
evaluation: {{prompts: 8, samples: 1, bootstrap: 200}}
grid: {grid}  # how many preferences are judged, evenly spread
reference_point: {reference}  # of the hypervolume; 0 is what the base's worst answers score
sensitivity_point: {sensitivity}  # a second one, to see whether the ranking hangs on the first
suite: [prompting, best-of-n, mo-odpo]  # what "moalign compare" trains
"""

_WORDS = """
  words:  # by weight: what is said instead of "brevity 25.0% variety 75.0%"; a chat model does as it is told
    brevity:
      - {up_to: 0.2, text: "Answer in one long sentence with many details."}
      - {up_to: 0.4, text: "Answer in one sentence with some details."}
      - {up_to: 0.6, text: "Answer in one sentence."}
      - {up_to: 0.8, text: "Answer in one short sentence."}
      - {up_to: 1.0, text: "Answer in one very short sentence."}
  plain: "{prompt} Answer in one sentence."  # how the base is asked: bare questions are answered at length
  scores: "{prompt} Answer in one sentence. {scores}"  # for methods that ask for rewards (RiC)"""

_RECIPE = """\
# MO-ODPO on this task: a first run of minutes on a CPU; raise steps and batch once it works.
# command: moalign train mo-odpo --task {folder}
# needs: CPU for a model of up to about 200 million parameters
method: mo-odpo
task: ./task.yaml
description: a small first run
policy:
  lora: {{r: 8, alpha: 16, dropout: 0.0}}
config:
  steps: 8
  batch: 4  # prompts per step
  samples: 4  # answers per prompt: the best by the drawn preference is set against the worst
  lr: 0.0003
  beta: 0.1  # smaller: further away from the base
  temperature: 0.7
  micro_batch: 8  # rows in memory at once
sources:
  policy: choice; small, as the run is
  config.steps: choice; minutes on a CPU
  config.batch: choice; as steps
  config.samples: choice; best against worst of four
  config.lr: choice; higher than for a long run
  config.beta: methods/mo-odpo, 0.1
  config.temperature: choice; as the card's generation
"""

_SCORERS_HEAD = '''\
"""What answers are judged by: plain functions ``f(prompts, responses) -> list of float``, larger is better.

task.yaml names one as ``function: scorers.py:NAME``. prompts[i] is the bare prompt of responses[i], without preference
or chat turns. A call scores many texts at once, so a model of your own can be loaded once and score in batches.
Whatever changes in this file makes another task: runs before and after are not compared. Try a change with
``moalign check FOLDER`` and ``moalign score``.
{unused}"""

import math
import re


def words(text: str) -> list[str]:
    """Return the words of a text in small letters."""
    return re.findall(r"[a-z0-9']+", text.lower())
'''

_READY = {
    "variety": '''\
def variety(prompts: list[str], responses: list[str]) -> list[float]:
    """How much an answer says: log of 1 + the number of different words of four letters or more."""
    return [math.log(1 + len({word for word in words(text) if len(word) > 3})) for text in responses]
''',
    "on-topic": '''\
def on_topic(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of an answer's words (four letters or more) that its prompt uses, too."""
    scores = []
    for prompt, response in zip(prompts, responses):
        asked = set(words(prompt))
        said = [word for word in words(response) if len(word) > 3]
        scores.append(sum(word in asked for word in said) / max(1, len(said)))
    return scores
''',
}
"""Objectives that are no rule and come ready to use."""

_OWN = '''\
# Change this: nobody but you knows what "{name}" is. As it stands, the words below are counted.
{constant} = {{"you", "your", "we", "i", "it", "the", "a"}}


def {function}(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of an answer's words that are in {constant}; 0 for an answer without words."""
    return [sum(word in {constant} for word in words(text)) / max(1, len(words(text))) for text in responses]
'''

QUESTIONS = [
    f"{start} {activity}?"
    for start in ("How do I", "What should I know before I")
    for activity in (
        "bake bread",
        "repair a bicycle tyre",
        "plant tomatoes",
        "learn to swim",
        "write a letter of thanks",
        "choose a laptop",
        "fall asleep faster",
        "save money every month",
        "train a puppy",
        "paint a room",
        "make a good cup of coffee",
        "plan a week of meals",
        "prepare for an interview",
        "clean a window",
        "start running",
        "take better photos",
        "pack for a short trip",
        "grow herbs indoors",
        "mend a torn shirt",
        "make a new friend",
    )
]
"""Prompts of a task without data of its own."""
