"""``moalign check``: preflight of a recipe. Everything that can be known before training is looked at, every
problem is collected, and nothing is written or loaded into a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moalign.config import find, load, validate, yaml_lines
from moalign.config.card import SourceSpec, TaskCard
from moalign.config.load import ResolvedRequest
from moalign.config.objectives import ClassifierObjective, ObjectiveSpec
from moalign.config.recipe import Recipe
from moalign.errors import RequestError
from moalign.methods import registry
from moalign.workflow import memory


@dataclass
class Preflight:
    """What was looked at and what is wrong."""

    recipe: Path
    checked: list[tuple[str, str]] = field(default_factory=list)
    """(what, what was found), in order."""
    notes: list[str] = field(default_factory=list)
    """What is not wrong but worth knowing, and what could not be known."""
    problems: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """Return everything for ``--json``."""
        return {
            "recipe": str(self.recipe),
            "ok": not self.problems,
            "checked": [{"what": what, "found": found} for what, found in self.checked],
            "memory": self.memory,
            "notes": self.notes,
            "problems": self.problems,
        }

    def look(self, what: str, action: Callable[[], str]) -> bool:
        """Run one check: its text becomes a line, its RequestError becomes problems; returns whether it passed."""
        try:
            self.checked.append((what, action()))
        except RequestError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return False
        return True


def check(name_or_path: str, overrides: Sequence[str] = (), results: Path = Path("results")) -> Preflight:
    """Look at a recipe and everything that it points to.

    Raises RequestError only when there is no such recipe; every other problem is in ``problems``.
    """
    path = find.find_recipe(name_or_path)
    report = Preflight(path)
    resolved = _resolve(report, path, overrides)
    card, whole = (resolved.card, True) if resolved else _card_alone(path, overrides)
    if card is not None:
        model = _model(report, card) if whole else None
        _data(report, card, results)
        _objectives(report, card)
        if resolved is not None:
            _memory(report, resolved, model)
    return report


def _resolve(report: Preflight, path: Path, overrides: Sequence[str]) -> ResolvedRequest | None:
    """Read recipe, method config and card; None when one of them is wrong."""
    made: list[ResolvedRequest] = []
    try:
        document = yaml_lines.load(path)
    except RequestError as error:
        report.problems += error.problems
        return None
    try:
        named = load.recipe_names(path)[0]
        method = registry.get(named)
    except RequestError as error:  # without a method its settings cannot be checked, but the rest of the recipe can
        own = f"{document.source}:"
        where = f"{own}{document.line('method')}: "
        report.problems += [text if text.startswith(own) else where + text for text in error.problems]
        others = validate.problems(Recipe, document)
        report.problems += [text for text in others if text not in report.problems]
        return None

    def read() -> str:
        made.append(load.load_recipe(path, named, None, overrides, method.Config))
        return f"{path}: {len(made[0].config.model_dump())} settings of {named}"

    if not report.look("recipe", read):
        return None
    resolved = made[0]
    report.checked.append(("card", f"{resolved.card_path}: {', '.join(resolved.card.objective_names)}"))
    if method.capabilities.objectives == "2" and len(resolved.card.objectives) != 2:
        count = len(resolved.card.objectives)
        report.problems.append(f"{path}: {named} works with 2 objectives; task {resolved.card.name} has {count}")
    return resolved


def _card_alone(path: Path, overrides: Sequence[str]) -> tuple[TaskCard | None, bool]:
    """Return the card of a recipe that has problems, so that what it points to is looked at too.

    The flag tells whether the options for the card are in it: when one of those is wrong, the card is read without
    them. None when the card is wrong itself; its problems are among the recipe's, which the caller has already.
    """
    try:
        named = yaml_lines.load(path).data.get("task")
    except RequestError:
        return None, False
    if not isinstance(named, str):
        return None, False
    beside = path.parent / named if find.is_path(named) else named
    given = [text for text in overrides if text.startswith("task.")]
    for texts, whole in ((given, True), ([], not given)):
        try:
            return load.load_card(beside, texts), whole
        except RequestError:
            continue
    return None, False


def _model(report: Preflight, card: TaskCard) -> Path | None:
    """Check the policy's folder; return it when it is there."""
    if card.model is None:
        if card.kind == "sandbox":
            report.checked.append(("model", "built in (about 0.1 M parameters); trained on first use, then cached"))
        else:
            report.problems.append(
                f"task {card.name}: it needs a model; give a folder or a hub id: --set task.model=PATH/TO/FOLDER"
            )
        return None
    found: list[Path] = []

    def look() -> str:
        from moalign import model_folder

        source = str(card.model)
        if Path(source).expanduser().is_dir():
            found.append(model_folder.resolve(source, card.model_revision, "task.model"))
            return f"{source}: whole safetensors weights, content {model_folder.fingerprint(found[0], 'task.model')}"
        return _hub(report, source, card.model_revision, "model", found)

    report.look("model", look)
    return found[0] if found else None


def _hub(report: Preflight, source: str, revision: str | None, what: str, found: list[Path] | None = None) -> str:
    """Look for a hub id in the local cache; nothing is downloaded."""
    import os

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if revision is None:
        report.notes.append(f"{what} {source}: no revision is pinned; the newest one is used, whatever it is then")
    try:
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except HFValidationError:
        raise RequestError(
            f"{what} {source!r}: there is no such folder, and a hub id has the form owner/name"
        ) from None
    except (LocalEntryNotFoundError, OSError):
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise RequestError(
                f"{what} {source!r}: not in the local hub cache, and HF_HUB_OFFLINE=1 is set; give a local folder "
                "instead, for example --set task.model=PATH/TO/FOLDER"
            ) from None
        report.notes.append(f"{what} {source}: not in the local hub cache; it will be downloaded")
        return f"{source}: hub id, revision {revision or 'not pinned'}, not downloaded yet"
    if found is not None:
        found.append(folder)
    return f"{source}: hub id, revision {revision or 'not pinned'}, in the local cache"


# -- data and splits -----------------------------------------------------------------------------------------------


def _data(report: Preflight, card: TaskCard, results: Path) -> None:
    from moalign.data import load as data

    sound = True
    if card.data is not None:
        spec = card.data
        if spec.responses is not None and _local(report, "responses", spec.responses):
            report.look(
                "responses", lambda: f"{_count(data.load_responses(spec, card.objective_names, Path.cwd()))} rows"
            )
        if spec.pairs is not None and _local(report, "pairs", spec.pairs):
            report.look("pairs", lambda: f"{_count(data.load_pairs(spec, Path.cwd()))} pairs")
        if isinstance(spec.prompts, SourceSpec):
            sound = _local(report, "prompts", spec.prompts)
    if sound:
        report.look("splits", lambda: _splits(card, results))


def _local(report: Preflight, name: str, source: SourceSpec) -> bool:
    """Whether a source's records can be read here and now; a hub data set is not downloaded."""
    from moalign.data import readers

    places: list[Path | str] = []

    def look() -> str:
        places.append(readers.locate(source, Path.cwd()))
        return f"{places[0]}, content {readers.fingerprint(source, Path.cwd())}"

    if not report.look(f"data.{name}", look):
        return False
    if isinstance(places[0], str):
        report.notes.append(f"data.{name}: {places[0]} is a hub data set; its records are read when training starts")
        if source.revision is None:
            report.notes.append(f"data.{name}: {places[0]}: no revision is pinned")
        return False
    return True


def _count(records: Any) -> int:
    return sum(1 for _ in records)


def _splits(card: TaskCard, results: Path) -> str:
    from moalign.tasks.load import make_task

    parts = make_task(card, results).prompts
    return ", ".join(f"{name} {len(prompts)}" for name, prompts in parts.items()) + " prompts"


# -- objectives ----------------------------------------------------------------------------------------------------


def _objectives(report: Preflight, card: TaskCard) -> None:
    for spec in card.objectives:
        if isinstance(spec, ClassifierObjective) and not Path(spec.model).expanduser().is_dir():
            what = f"objective {spec.name}: model"
            report.look(f"objective {spec.name}", partial(_hub, report, spec.model, spec.revision, what))
        else:
            report.look(f"objective {spec.name}", partial(_built, spec))


def _built(spec: ObjectiveSpec) -> str:
    from moalign.rewards.scorer import build_scorer

    scorer = build_scorer(spec, Path.cwd())
    return f"{spec.kind}, {'larger' if scorer.maximise else 'smaller'} is better, revision {scorer.revision}"


# -- memory --------------------------------------------------------------------------------------------------------


def _memory(report: Preflight, resolved: ResolvedRequest, model: Path | None) -> None:
    """Compare what weights and adapters take with the GPU that the recipe states."""
    needs, card = resolved.recipe.needs, resolved.card
    stated = needs.gpu_memory_gib
    told: dict[str, Any] = {"stated_gib": stated, "weights_gib": None, "adapters_gib": None, "total_gib": None}
    report.memory = told
    if model is None:
        if card.kind == "sandbox" and card.model is None:
            report.checked.append(("memory", "no GPU needed; the built-in base is a few hundred KiB"))
        else:
            report.notes.append("memory: not known, because the model's weights are not on this machine")
        return
    estimate = memory.estimate(model, card.dtype, resolved.recipe.policy.lora)
    told |= estimate.told()
    report.checked.append(("memory", f"{estimate.sentence()}; activations and reward models come on top"))
    if stated is None:
        report.notes.append("memory: the recipe does not state a GPU's memory (needs.gpu_memory_gib)")
    elif estimate.total_gib > stated:
        report.problems.append(
            f"{report.recipe}: needs.gpu_memory_gib: weights and adapters alone take {estimate.total_gib:.1f} GiB, "
            f"but {stated:g} GiB are stated; take a smaller model, dtype bfloat16 or a larger GPU"
        )
