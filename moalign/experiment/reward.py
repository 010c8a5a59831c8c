"""``moalign reward``: train reward models on preference pairs, and judge how right and how calibrated they are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moalign.config import find, overrides, validate
from moalign.config.card import SourceSpec, SplitSpec
from moalign.config.load import load_card
from moalign.config.objectives import ClassifierObjective
from moalign.core import errors
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.core.text import distinct
from moalign.reward_models import evaluation, pairs, runs
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.runs import RewardRequest, RewardStore
from moalign.reward_models.settings import RewardSettings
from moalign.rewards.ensemble import member_folders
from moalign.runs import atomic, record
from moalign.runs.run import Run
from moalign.tasks.load import make_task
from moalign.tasks.task import Task

EVALUATION = "eval.json"


@dataclass(frozen=True)
class PairsRequest:
    """Which pairs, as the user wrote it."""

    pairs: Sequence[str] = ()
    """``[NAME=]FILE`` each."""
    task: str | None = None
    """A task whose pairs (and whose base, as backbone) are used instead."""
    overrides: Sequence[str] = ()
    """``--set`` texts, of the task's card and of the reward model's settings."""
    results: Path = Path("results")

    def loaded_task(self, progress: Progress) -> Task | None:
        """Return the task that was named, None without one; RequestError unless either is named, files or a task."""
        of_card = [text for text in self.overrides if text.startswith("task.")]
        if self.task is None:
            if of_card:
                raise RequestError(f"--set {of_card[0]}: there is no task; name one with --task")
            if not self.pairs:
                raise RequestError("no pairs: give --pairs [NAME=]FILE, or --task NAME for a task's own")
            return None
        if self.pairs:
            raise RequestError("--pairs and --task exclude each other: name files, or the task whose pairs are used")
        return make_task(load_card(self.task, of_card), self.results, progress)

    def pair_sets(self, task: Task | None) -> list[PairSet]:
        """Return the pairs of the files, or of the task."""
        return task.pair_sets() if task is not None else pairs.read([_source(text) for text in self.pairs], Path.cwd())

    def settings(self, task: Task | None, splits: SplitSpec | None = None, **options: Any) -> RewardSettings:
        """Return the checked settings, ``options`` (None: not given) last; RequestError with every problem.

        ``splits`` is the default in place of the task's.
        """
        data: dict[str, Any] = {}
        if task is not None:
            data = {"splits": task.card.splits.model_dump(), **task.reward_settings}
        if splits is not None:
            data["splits"] = splits.model_dump()
        labels: dict[tuple[str, ...], str] = {}
        problems: list[str] = []
        allowed = list(RewardSettings.model_fields)
        for text in self.overrides:
            if text.startswith("task."):
                continue
            keys, value = overrides.parse(text)
            label = f"--set {'.'.join(keys)}"
            if keys[0] not in allowed:
                hint = errors.did_you_mean(keys[0], allowed)
                problems.append(f"{label}: unknown setting; allowed: {', '.join(allowed)}{hint}")
            elif problem := overrides.put(data, keys, value):
                problems.append(f"{label}: {problem}")
            labels[keys] = label
        for key, value in options.items():
            if value is not None:
                data[key] = value
                labels[(key,)] = f"--{key}"
        settings, more = validate.check(RewardSettings, data, validate.Origin("reward train", None, (), labels))
        if problems or settings is None:
            raise RequestError(*problems, *more)
        return settings


def _source(text: str) -> tuple[str | None, SourceSpec]:
    """Parse ``[NAME=]FILE``; a file that exists under the whole text is that file."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, SourceSpec(path=text)
    if not name or not path:
        raise RequestError(f"--pairs {text}: found an empty {'name' if not name else 'file'}; allowed: [NAME=]FILE")
    return name, SourceSpec(path=path)


# -- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardTrainRequest(PairsRequest):
    """What ``moalign reward train`` is to do."""

    model: str | None = None
    """The backbone; None: the task's base."""
    revision: str | None = None
    loss: str | None = None
    seed: int = 0
    members: int | None = None


def plan(request: RewardTrainRequest, progress: Progress = silent) -> RewardRequest:
    """Check a request to train and read its pairs; raises RequestError with every problem."""
    task = request.loaded_task(progress)
    settings = request.settings(task, loss=request.loss, members=request.members)
    sets = request.pair_sets(task)
    if request.model is not None:
        backbone, revision = request.model, request.revision
    elif task is not None:
        backbone, revision = task.base_source()
    else:
        raise RequestError("--model: missing; a folder or hub id of a causal language model or classifier is needed")
    return runs.make(
        _slug(task.card.name if task is not None else "+".join(pair_set.name for pair_set in sets)),
        settings,
        backbone,
        sets,
        revision=revision,
        seed=request.seed,
        results=request.results,
        as_given={
            "pairs": [_absolute(text) for text in request.pairs],
            "task": _of_any_folder(request.task),
            "model": request.model,
            "set": [_absolute_setting(text) for text in request.overrides],
        },
    )


def train(
    request: RewardRequest, progress: Progress = silent, judge: bool = True
) -> tuple[Run, bool, dict[str, Any] | None]:
    """Train a reward model, or find it trained, and judge it on its held-out pairs.

    Returns the run, whether it was there already, and the content of its ``eval.json`` (None without ``judge``).
    """
    run, reused = runs.obtain(request, progress)
    judged = stored_evaluation(run)
    if judged is not None:
        return run, reused, judged
    if not judge:
        return run, reused, None
    progress("judging", 0, 1)
    content = evaluation.evaluate(runs.objective(run), request.parts["eval"], request.parts["calibration"])
    return run, reused, _written({**_about(run), "split": "eval", **content}, run.path, progress)


def stored_evaluation(run: Run) -> dict[str, Any] | None:
    """Return what a reward model's run was judged to be; None where it was not; RequestError for a damaged file."""
    path = run.path / EVALUATION
    remedy = f"remove it and judge again: moalign reward eval {run.path}"
    return evaluation.read(path, remedy) if path.is_file() else None


def _absolute(text: str) -> str:
    """Return ``[NAME=]FILE`` as it can be read from any folder."""
    name, source = _source(text)
    path = Path(source.path)
    where = str(path.resolve()) if path.exists() else source.path
    return where if name is None else f"{name}={where}"


def _of_any_folder(task: str | None) -> str | None:
    """Return a task's name, or its card's file, as it can be found from any folder."""
    if task is None or (not find.is_path(task) and task in find.list_tasks()):
        return task
    return str(find.find_task_file(task).resolve())


def _absolute_setting(text: str) -> str:
    """Return a ``--set task.`` text that names a file or folder as it can be read from any folder."""
    key, _, value = text.partition("=")
    named = key.startswith("task.") and key.rpartition(".")[2] in {"path", "model", "template"}
    return f"{key}={Path(value).resolve()}" if named and value and os.path.exists(value) else text


def _slug(name: str) -> str:
    """Return a name that does for a folder."""
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return kept.strip(".-_")[:60] or "pairs"


# -- judging -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a reward model is read; nothing of it: as it was trained."""

    label: str | int | None = None
    template: str | None = None
    max_length: int | None = None
    minimise: bool = False
    split: str = "eval"
    """eval, calibration, train, or all."""

    def of(self, objective: ClassifierObjective) -> ClassifierObjective:
        """Return the objective, read like this."""
        changed: dict[str, Any] = {"label": self.label, "maximise": not self.minimise}
        changed |= {"template": self.template} if self.template is not None else {}
        changed |= {"max_length": self.max_length} if self.max_length is not None else {}
        return objective.model_copy(update=changed)


def judge(
    model: str,
    request: PairsRequest,
    reading: Reading,
    revision: str | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Judge a reward model: a run of ``moalign reward train``, or any classifier's folder or hub id.

    Without pairs a run is judged on its own held-out ones. Numbers and figures go to the folder ``out``; None: the
    run's own when it is judged as it was trained, else nowhere.

    Raises RequestError for a model or pairs that cannot be read.
    """
    if out is not None:
        atomic.require_writable(out, "choose another folder with --out DIR")
    run = _run(model, request.results)
    own = run is not None and not request.pairs and request.task is None
    if run is None:
        if not request.pairs and request.task is None:
            raise RequestError(f"{model}: it is no run of moalign reward train, so it has no pairs of its own; --pairs")
        members = "all" if len(member_folders(Path(model))) > 1 else None
        given = {"name": "reward", "kind": "hf-classifier", "model": model, "revision": revision, "members": members}
        objective = ClassifierObjective.model_validate(given)
    else:
        run.require_done()
        run.require_weights()
        objective = runs.objective(run)
        if own and reading == Reading():
            out = out or (None if atomic.read_only(run.path) else run.path)
    objective = reading.of(objective)
    judged_on, calibrated_on = _parts(run, own, request, reading.split, progress)
    progress("judging", 0, 1)
    content = evaluation.evaluate(objective, judged_on, calibrated_on)
    about = _about(run) if run is not None else {"model": model}
    return _written({**about, "split": reading.split, **content}, out, progress)


def _run(model: str, results: Path) -> Run | None:
    """Return the run that ``model`` names, None when it is a folder or a hub id."""
    path = Path(model)
    for folder in (path, path.parent) if path.name == "model" else (path,):
        if os.path.isfile(folder / record.FILE):  # a Path's own raises for a name that is too long
            return Run.load(folder)
    return None if os.path.isdir(path) or "/" in model else RewardStore(results).find(model)


def _parts(
    run: Run | None, own: bool, request: PairsRequest, split: str, progress: Progress
) -> tuple[list[PairSet], list[PairSet]]:
    """Return the pairs to judge on (``own``: those of the run) and those to fit a temperature on.

    Named pairs, too, are divided as the run's were unless ``--set splits`` says otherwise: among them may be those that
    it was trained on.
    """
    _refuse_unused(request.overrides, own, split)
    if run is not None and own:
        given = run.record.as_given
        request = replace(request, pairs=given.get("pairs", ()), task=given.get("task"), overrides=given.get("set", ()))
        if request.task is None and not request.pairs:
            raise RequestError(f"run {run.path}: it does not say where its pairs are; name them with --pairs or --task")
    task = request.loaded_task(progress)
    sets = request.pair_sets(task)
    if split == "all":
        return sets, []
    trained = None if run is None else runs.settings_of(run).splits
    spec = trained if own and trained is not None else request.settings(task, trained).splits
    parts = pairs.split_all(sets, spec)
    if split not in parts:
        raise errors.unknown("split", split, [*parts, "all"], "--split")
    if run is not None and own and runs.content(parts) != run.record.card_hash:
        raise RequestError(f"run {run.path}: its pairs have changed since it was trained; name the pairs with --pairs")
    return parts[split], parts["calibration"] if split == "eval" else []


def _refuse_unused(settings: Sequence[str], own: bool, split: str) -> None:
    """Raise RequestError for ``--set`` texts that would change nothing: what is judged is trained already."""
    for text in settings:
        key = overrides.parse(text)[0][0]
        if own:
            why = "the run is judged on its own pairs, divided as it was trained; leave it out, or name --pairs"
        elif key == "splits" and split == "all":
            why = "with --split all the pairs are not divided; leave out one of both"
        elif key not in ("splits", "task"):
            why = "nothing is trained here; allowed: splits.KEY and, with --task, task.KEY"
        else:
            continue
        raise RequestError(f"--set {text}: {why}")


def _about(run: Run) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "run_id": run.record.run_id,
        "model": str(run.path / "model"),
        "loss": run.record.method,
        "seed": run.record.seed,
        "said": run.record.notes.get("said"),
    }


def _written(content: dict[str, Any], folder: Path | None, progress: Progress) -> dict[str, Any]:
    """Draw one reliability diagram per data set and write the numbers, when there is a folder for them."""
    content["figures"] = []
    if folder is not None:
        from moalign.report.reliability import reliability_figure

        folder.mkdir(parents=True, exist_ok=True)
        slugs = distinct([_slug(row["name"]) for row in content["datasets"]])
        for row, slug in zip(content["datasets"], slugs, strict=True):
            path = folder / f"reliability-{slug}.png"
            title = f"{row['name']}: accuracy {row['accuracy']:.3f}, ECE {row['ece']['10']:.3f}, {row['pairs']} pairs"
            reliability_figure(row["reliability"], title, path)
            content["figures"].append(str(path))
        atomic.write_json(folder / EVALUATION, content)
    progress("judging", 1, 1)
    return content
