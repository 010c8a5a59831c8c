"""``moalign reward``: train reward models on preference pairs, and judge how right and how calibrated they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moalign.config import load as config
from moalign.config import overrides, validate
from moalign.config.card import SourceSpec, TaskCard
from moalign.config.objectives import ClassifierObjective
from moalign.core import errors
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.reward_models import evaluation, pairs, runs
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.runs import RewardRequest, RewardStore
from moalign.reward_models.settings import RewardSettings
from moalign.runs import atomic, record
from moalign.runs.run import Run
from moalign.tasks.load import make_task
from moalign.tasks.sandbox.task import SandboxTask

EVALUATION = "eval"


@dataclass(frozen=True)
class Asked:
    """What the user asked for; the same for training and judging."""

    pairs: Sequence[str] = ()
    """``[NAME=]FILE`` each."""
    task: str | None = None
    """A task whose pairs (and whose base, as backbone) are used instead."""
    model: str | None = None
    revision: str | None = None
    loss: str | None = None
    overrides: Sequence[str] = ()
    seed: int = 0
    results: Path = Path("results")


# -- training ------------------------------------------------------------------------------------------------------


def plan(asked: Asked, progress: Progress = silent) -> RewardRequest:
    """Check a request to train and read its pairs; raises RequestError with every problem."""
    card, more = _card(asked)
    settings = _settings(asked, more, card)
    sets = _sets(asked, card, progress)
    name = card.name if card is not None else "+".join(one.name for one in sets)
    return runs.make(
        _slug(name),
        settings,
        _backbone(asked, card, progress),
        sets,
        revision=asked.revision if asked.model or card is None else card.model_revision,
        seed=asked.seed,
        results=asked.results,
        as_given={
            "pairs": [_absolute(text) for text in asked.pairs],
            "task": asked.task,
            "model": asked.model,
            "set": list(asked.overrides),
        },
    )


def train(
    request: RewardRequest, progress: Progress = silent, judge: bool = True
) -> tuple[Run, bool, dict[str, Any] | None]:
    """Train a reward model, or find it trained, and judge it on its held-out pairs.

    Returns the run, whether it was found, and the content of its ``eval.json`` (None without ``judge``).
    """
    run, found = runs.obtain(request, progress)
    path = run.path / f"{EVALUATION}.json"
    if path.is_file():
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return run, found, told
    if not judge:
        return run, found, None
    progress("judging", 0, 1)
    judged = evaluation.evaluate(runs.objective(run), request.parts["eval"], request.parts["calibration"])
    return run, found, _finish({**_about(run), "split": "eval", **judged}, run.path, progress)


def _card(asked: Asked) -> tuple[TaskCard | None, list[str]]:
    """Return the task's card and the options that are not for it."""
    own = [text for text in asked.overrides if text.startswith("task.")]
    rest = [text for text in asked.overrides if not text.startswith("task.")]
    if asked.task is None:
        if own:
            raise RequestError(f"--set {own[0]}: there is no task; name one with --task")
        if not asked.pairs:
            raise RequestError("no pairs: give --pairs [NAME=]FILE, or --task NAME for a task's own")
        return None, rest
    if asked.pairs:
        raise RequestError("--pairs and --task exclude each other: name files, or the task whose pairs are used")
    return config.load_card(asked.task, own), rest


def _settings(asked: Asked, texts: Sequence[str], card: TaskCard | None) -> RewardSettings:
    data: dict[str, Any] = {}
    labels: dict[tuple[str, ...], str] = {}
    if card is not None:
        data["splits"] = card.splits.model_dump()
        if card.kind == "sandbox":
            # Longest text of the world: 76 tokens; a word stands apart from the next.
            data |= {"template": "{prompt} {response}", "max_tokens": 128}
    problems: list[str] = []
    allowed = list(RewardSettings.model_fields)
    for text in texts:
        keys, value = overrides.parse(text)
        if keys[0] not in allowed:
            problems.append(
                f"--set {'.'.join(keys)}: unknown setting; allowed: {', '.join(allowed)}"
                f"{errors.did_you_mean(keys[0], allowed)}"
            )
            continue
        label = f"--set {'.'.join(keys)}"
        if problem := overrides.put(data, keys, value):
            problems.append(f"{label}: {problem}")
        labels[keys] = label
    if asked.loss is not None:
        data["loss"] = asked.loss
        labels[("loss",)] = "--loss"
    origin = validate.Origin("reward train", None, (), labels)
    found, more = validate.check(RewardSettings, data, origin)
    if problems or more or found is None:
        raise RequestError(*problems, *more)
    return found


def _sets(asked: Asked, card: TaskCard | None, progress: Progress) -> list[PairSet]:
    if card is None:
        return pairs.read([_source(text) for text in asked.pairs], Path.cwd())
    task = make_task(card, asked.results, progress)
    if isinstance(task, SandboxTask):
        return task.labelled_pairs()
    assert card.data is not None  # the card's own check
    given = card.data.pairs
    if given is None:
        raise RequestError(f"task {card.name}: its card has no data.pairs; give files with --pairs instead")
    sources = given if isinstance(given, dict) else {card.name: given}
    return pairs.read(list(sources.items()), Path.cwd())


def _source(text: str) -> tuple[str | None, SourceSpec]:
    """Parse ``[NAME=]FILE``; a file that exists under the whole text is that file."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, SourceSpec(path=text)
    if not name or not path:
        raise RequestError(f"--pairs {text}: found an empty {'name' if not name else 'file'}; allowed: [NAME=]FILE")
    return name, SourceSpec(path=path)


def _absolute(text: str) -> str:
    """Return ``[NAME=]FILE`` as it can be read from any folder."""
    name, source = _source(text)
    path = Path(source.path)
    where = str(path.resolve()) if path.exists() else source.path
    return where if name is None else f"{name}={where}"


def _backbone(asked: Asked, card: TaskCard | None, progress: Progress) -> str:
    if asked.model is not None:
        return asked.model
    if card is not None:
        task = make_task(card, asked.results, progress)
        if isinstance(task, SandboxTask):
            return task.base_folder
        if card.model is not None:
            return card.model
    raise RequestError("--model: missing; a folder or hub id of a causal language model or classifier is needed")


def _slug(name: str) -> str:
    """Return a name that does for a folder."""
    kept = "".join(letter if letter.isalnum() or letter in "._+-" else "-" for letter in name).replace("+", "-")
    return kept.strip(".-_")[:60] or "pairs"


# -- judging -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """How a given reward model is read."""

    label: str | int | None = None
    template: str | None = None
    max_length: int | None = None
    minimise: bool = False
    split: str = "eval"
    """eval, calibration, train, or all."""
    out: Path | None = None
    """Folder for the numbers and figures; None: the run's own, or nowhere."""


def judge(model: str, asked: Asked, how: Judged, progress: Progress = silent) -> dict[str, Any]:
    """Judge a reward model: a run of ``moalign reward train``, or any classifier's folder or hub id.

    Without pairs a run is judged on its own held-out ones. Raises RequestError for a model or pairs that cannot be
    read.
    """
    run = _run(model, asked.results)
    if run is None:
        if not asked.pairs and asked.task is None:
            raise RequestError(f"{model}: it is no run of moalign reward train, so it has no pairs of its own; --pairs")
        spec = ClassifierObjective(
            name="reward", kind="hf-classifier", model=model, revision=asked.revision, label=how.label
        )
    else:
        if run.status != "done":
            raise RequestError(f"run {run.path}: it is {run.status}, not done; finish it with the same train command")
        spec = runs.objective(run).model_copy(update={"label": how.label})
    changed: dict[str, Any] = {"maximise": not how.minimise}
    changed |= {"template": how.template} if how.template is not None else {}
    changed |= {"max_length": how.max_length} if how.max_length is not None else {}
    spec = spec.model_copy(update=changed)
    own = run is not None and not asked.pairs and asked.task is None
    parts = _parts(run if own else None, asked, how, progress)
    progress("judging", 0, 1)
    judged = evaluation.evaluate(spec, parts[0], parts[1])
    told = {**(_about(run) if run is not None else {"model": model}), "split": how.split, **judged}
    plain = own and how == Judged(out=how.out)
    folder = how.out or (run.path if run is not None and plain else None)
    return _finish(told, folder, progress)


def _run(model: str, results: Path) -> Run | None:
    """Return the run that ``model`` names, None when it is a folder or a hub id."""
    path = Path(model)
    if (path / record.FILE).is_file():
        return Run.load(path)
    if path.name == "model" and (path.parent / record.FILE).is_file():
        return Run.load(path.parent)
    if path.is_dir() or "/" in model:
        return None
    return RewardStore(results).find(model)


def _parts(run: Run | None, asked: Asked, how: Judged, progress: Progress) -> tuple[list[PairSet], list[PairSet]]:
    """Return the pairs to judge on and those to fit a temperature on."""
    if run is not None:
        given = run.record.as_given
        asked = replace(asked, pairs=given.get("pairs", ()), task=given.get("task"), overrides=given.get("set", ()))
        if asked.task is None and not asked.pairs:
            raise RequestError(f"run {run.path}: it does not say where its pairs are; name them with --pairs or --task")
    card, texts = _card(asked)
    sets = _sets(asked, card, progress)
    if how.split == "all":
        return sets, []
    if run is not None:
        spec = RewardSettings.model_validate(run.record.recipe["settings"]).splits
    else:
        spec = _settings(asked, texts, card).splits
    parts = pairs.split_all(sets, spec)
    if how.split not in parts:
        raise errors.unknown("split", how.split, [*parts, "all"], "--split")
    if run is not None and runs.content(parts) != run.record.card_hash:
        raise RequestError(f"run {run.path}: its pairs have changed since it was trained; name the pairs with --pairs")
    return parts[how.split], parts["calibration"] if how.split == "eval" else []


def _about(run: Run) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "run_id": run.record.run_id,
        "model": str(run.path / "model"),
        "loss": run.record.method,
        "seed": run.record.seed,
        "said": run.record.notes.get("said"),
    }


def _finish(told: dict[str, Any], folder: Path | None, progress: Progress) -> dict[str, Any]:
    """Draw one reliability diagram per data set and write the numbers, when there is a folder for them."""
    told["figures"] = []
    if folder is not None:
        from moalign.report.reliability import reliability_figure

        folder.mkdir(parents=True, exist_ok=True)
        for row in told["datasets"]:
            path = folder / f"reliability-{_slug(row['name'])}.png"
            title = f"{row['name']}: accuracy {row['accuracy']:.3f}, ECE {row['ece']['10']:.3f}, {row['pairs']} pairs"
            reliability_figure(row["reliability"], title, path)
            told["figures"].append(str(path))
        atomic.write_json(folder / f"{EVALUATION}.json", told)
    progress("judging", 1, 1)
    return told
