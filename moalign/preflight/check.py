"""``moalign check``: preflight of a recipe or a task card. Everything that can be known before training is checked,
every problem is collected, and nothing is written and no model loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moalign.config import find, load, validate, yaml_lines
from moalign.config.card import DataSpec, SourceSpec, TaskCard
from moalign.config.load import ResolvedRequest
from moalign.config.objectives import ModelObjective, ObjectiveSpec
from moalign.config.recipe import Recipe
from moalign.core.errors import RequestError
from moalign.lm import architecture, builtin
from moalign.lm.architecture import Architecture
from moalign.methods import registry
from moalign.preflight import cost, memory

FAR = 0.5
"""A fitted mean is far from a published one beyond this share of its standard deviation."""


@dataclass
class Preflight:
    """What was checked and what is wrong."""

    recipe: Path
    """The file that is checked: a recipe, or a card."""
    checked: list[tuple[str, str]] = field(default_factory=list)
    """(what, what was found), in order."""
    notes: list[str] = field(default_factory=list)
    """What is not wrong but worth knowing, and what could not be checked."""
    problems: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    """Upper bounds of training."""
    of_card: bool = False
    """The file is a card."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything for ``--json``."""
        return {
            "recipe": None if self.of_card else str(self.recipe),
            "card": str(self.recipe) if self.of_card else None,
            "ok": not self.problems,
            "checked": [{"what": what, "found": found} for what, found in self.checked],
            "memory": self.memory,
            "cost": self.cost,
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
    """Check a recipe or a card and everything that it points to.

    ``task/method`` may also name a recipe that the task borrows (``recipes_from``). Raises RequestError only when there
    is no such recipe or card; every other problem is in ``problems``.
    """
    file = find.find_card(name_or_path)
    if file is not None:
        return _check_card(file, overrides, results)
    borrowed = _borrowed(name_or_path)
    path, task = (find.find_recipe(name_or_path), None) if borrowed is None else borrowed
    report = Preflight(path)
    resolved = _resolve(report, path, overrides, task)
    card, with_options = (resolved.card, True) if resolved else _card_alone(path, overrides)
    if card is not None:
        model = _pointed_to(report, card, results, with_options)
        if resolved is not None:
            if model is not None and _is_local(str(card.model)):
                lora = resolved.recipe.policy.lora if registry.get(resolved.recipe.method).capabilities.trains else None
                report.look("policy", partial(architecture.examine, model, "task.model", lora))
            _sizes(report, resolved, model)
    return report


def _check_card(path: Path, overrides: Sequence[str], results: Path) -> Preflight:
    """Check a card, what it points to, and the settings of the recipes beside it."""
    report, cards = Preflight(path, of_card=True), []

    def read() -> str:
        cards.append(load.load_card(path, overrides))
        return f"{path}: task {cards[0].name}: {', '.join(cards[0].objective_names)}"

    if report.look("card", read):
        _pointed_to(report, cards[0], results, with_options=True)
    for file in sorted(path.parent.glob("*.yaml")):
        if find.find_card(str(file)) is None:
            report.look("recipe", partial(_settings_of, file, path, overrides))
    return report


def _settings_of(recipe: Path, card: Path, overrides: Sequence[str]) -> str:
    """Read a recipe for a card; the card's own problems are reported once, with the card."""
    method = load.recipe_names(recipe)[0]
    resolved = load.load_recipe(recipe, method, card, overrides, registry.get(method).Config)
    return f"{recipe}: {len(resolved.config.model_dump())} settings of {method}"


def _pointed_to(report: Preflight, card: TaskCard, results: Path, with_options: bool) -> Path | None:
    """Check what a card points to; return the policy's folder when it is there.

    ``with_options`` is False for a card read without its ``--set`` options: what they might have changed is not
    checked.
    """
    model = _model(report, card) if with_options else None
    sound = _data(report, card, results, model)
    if sound and with_options:
        _overlong(report, card, results, model)
    _objectives(report, card)
    if card.published and with_options:
        report.look("published", lambda: _published(report, card, results))
    return model


def preview(resolved: ResolvedRequest) -> Preflight:
    """Return memory and cost of a request alone: what a dry run shows, before anything is downloaded."""
    report = Preflight(resolved.recipe_path or Path(resolved.recipe.method))
    model = resolved.card.model
    folder = (builtin.converted(model) or Path(model).expanduser()) if model is not None else None
    _sizes(report, resolved, folder if folder is not None and folder.is_dir() else None)
    return report


def must_be_fetched(card: TaskCard) -> bool:
    """Whether the task's base is a hub model that is not on this machine."""
    if card.model is None or _is_local(card.model):
        return False
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(card.model, revision=card.model_revision, local_files_only=True)
    except HFValidationError:
        return False
    except (LocalEntryNotFoundError, OSError):
        return True
    return False


def _is_local(model: str) -> bool:
    """Whether a model needs no hub: a folder, or a built-in name."""
    return model in builtin.MODELS or Path(model).expanduser().is_dir()


def _borrowed(name: str) -> tuple[Path, str] | None:
    """Return (file, task) when ``task/method`` names a recipe of another task that this one borrows."""
    task, _, method = name.partition("/")
    known = {f"{task_name}/{method_name}" for task_name, method_name, _ in find.list_recipes()}
    if not method or name in known or Path(name).is_file() or task not in find.list_tasks():
        return None
    path = find.find_recipe_file(task, method)
    return None if path is None else (path, task)


def _resolve(
    report: Preflight, path: Path, overrides: Sequence[str], task: str | None = None
) -> ResolvedRequest | None:
    """Read recipe, method config and card; None when one of them is wrong."""
    requests: list[ResolvedRequest] = []
    try:
        document = yaml_lines.load(path)
    except RequestError as error:
        report.problems += error.problems
        return None
    try:
        name = load.recipe_names(path)[0]
        method = registry.get(name)
    except RequestError as error:  # without a method its settings cannot be checked, but the rest of the recipe can
        own = f"{document.source}:"
        where = f"{own}{document.line('method')}: "
        report.problems += [text if text.startswith(own) else where + text for text in error.problems]
        others = validate.check(Recipe, document.data, validate.Origin(document.source, document))[1]
        report.problems += [text for text in others if text not in report.problems]
        return None

    def read() -> str:
        requests.append(load.load_recipe(path, name, task, overrides, method.Config))
        return f"{path}: {len(requests[0].config.model_dump())} settings of {name}"

    if not report.look("recipe", read):
        return None
    resolved = requests[0]
    report.checked.append(("card", f"{resolved.card_path}: {', '.join(resolved.card.objective_names)}"))
    if method.capabilities.objectives == "2" and len(resolved.card.objectives) != 2:
        count = len(resolved.card.objectives)
        report.problems.append(f"{path}: {name} works with 2 objectives; task {resolved.card.name} has {count}")
    return resolved


def _card_alone(path: Path, overrides: Sequence[str]) -> tuple[TaskCard | None, bool]:
    """Return the card of a recipe that has problems, so that what it points to is checked too.

    The flag is True when the card holds the options for it: when one of those is wrong, the card is read without them.
    None when the card is wrong itself; its problems are among the recipe's, which the caller has already.
    """
    try:
        name = yaml_lines.load(path).data.get("task")
    except RequestError:
        return None, False
    if not isinstance(name, str):
        return None, False
    beside = path.parent / name if find.is_path(name) else name
    card_options = [text for text in overrides if text.startswith("task.")]
    for texts, with_options in ((card_options, True), ([], not card_options)):
        try:
            return load.load_card(beside, texts), with_options
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
    folders: list[Path] = []

    def look() -> str:
        from moalign.lm import model_folder

        source = str(card.model)
        if _is_local(source):
            folders.append(model_folder.resolve(source, card.model_revision, "task.model"))
            return f"{source}: whole safetensors weights, content {model_folder.fingerprint(folders[0], 'task.model')}"
        return _hub(report, source, card.model_revision, "model", folders)

    report.look("model", look)
    return folders[0] if folders else None


def _hub(report: Preflight, source: str, revision: str | None, what: str, folders: list[Path] | None = None) -> str:
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
    if folders is not None:
        folders.append(folder)
    return f"{source}: hub id, revision {revision or 'not pinned'}, in the local cache"


# -- data and splits -----------------------------------------------------------------------------------------------


def _data(report: Preflight, card: TaskCard, results: Path, model: Path | None) -> bool:
    """Read the data; returns whether its prompts can be read and split."""
    from moalign.data import load as data

    sound = True
    if card.data is not None:
        spec = card.data
        if spec.responses is not None and _local(report, "responses", spec.responses):
            report.look(
                "responses", lambda: f"{_count(data.load_responses(spec, card.objective_names, Path.cwd()))} rows"
            )
        _pairs(report, spec)
        if isinstance(spec.prompts, SourceSpec):
            sound = _local(report, "prompts", spec.prompts)
    return sound and report.look("splits", lambda: _splits(_with_folder(card, model), results))


def _with_folder(card: TaskCard, model: Path | None) -> TaskCard:
    """Return the card with its model's folder; without one no prompt is dropped, since none can be measured."""
    if model is not None:
        return card.model_copy(update={"model": str(model)})
    return card.model_copy(update={"overlong": None})


def _overlong(report: Preflight, card: TaskCard, results: Path, model: Path | None) -> None:
    """Report how many prompts are cut or dropped, where the tokenizer is here to count their tokens."""
    if model is None:
        if card.overlong == "drop":
            report.notes.append("overlong: drop: how many prompts are left out is not known: the model is not here yet")
        return
    report.look("overlong", lambda: _overlong_summary(report, _with_folder(card, model), results))


def _overlong_summary(report: Preflight, card: TaskCard, results: Path) -> str:
    from moalign.tasks.load import make_task

    counts = make_task(card, results).overlong_report()
    count, limit = counts.get("dropped", counts.get("cut", 0)), card.generation.max_prompt_tokens
    what = "dropped" if "dropped" in counts else "cut"
    if not count:
        return f"none of {counts['prompts']} prompts is {what}: all fit {limit} tokens"
    lost = f", {counts['cut_tokens']} tokens in all" if "cut_tokens" in counts else ""
    text = f"{count} of {counts['prompts']} prompts are {what}{lost}: longer than {limit} tokens"
    report.notes.append(f"overlong: {text} (generation.max_prompt_tokens)")
    return text


def _pairs(report: Preflight, spec: DataSpec) -> None:
    """Read every source of pairs: one for all, or one per objective."""
    from moalign.data import load as data

    sources = spec.pairs if isinstance(spec.pairs, dict) else {"": spec.pairs} if spec.pairs is not None else {}
    for objective, source in sources.items():
        name = f"pairs.{objective}" if objective else "pairs"
        if _local(report, name, source):
            count = partial(data.load_pairs, spec, Path.cwd(), *([objective] if objective else []))
            report.look(name, lambda count=count: f"{_count(count())} pairs")  # type: ignore[misc]


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
        if isinstance(spec, ModelObjective) and not _is_local(spec.model):
            what = f"objective {spec.name}: model"
            report.look(f"objective {spec.name}", partial(_hub, report, spec.model, spec.revision, what))
        else:
            report.look(f"objective {spec.name}", partial(_built, spec))


def _built(spec: ObjectiveSpec) -> str:
    import moalign.tasks  # noqa: F401 - registers the scorers of the sandbox's objectives
    from moalign.rewards.scorer import build_scorer

    scorer = build_scorer(spec, Path.cwd())
    return f"{spec.kind}, {'larger' if scorer.maximise else 'smaller'} is better, revision {scorer.revision}"


def _published(report: Preflight, card: TaskCard, results: Path) -> str:
    """Compare the fitted normaliser with the statistics that a paper reports; far is a note, never a problem."""
    from moalign.rewards.normaliser import Normaliser
    from moalign.tasks.load import make_task

    listed = ", ".join(f"{name} {published.mean:g} (sd {published.sd:g})" for name, published in card.published.items())
    if must_be_fetched(card):
        return f"{listed}; not compared: the base is not here yet"
    path = make_task(card, results).folder / "normaliser.json"
    if card.normaliser is None and not path.is_file():
        return f"{listed}; not compared: no normaliser has been fitted yet"
    spec = card.normaliser
    names = card.objective_names
    fitted = Normaliser.from_json(path) if spec is None else Normaliser.from_spec(spec, names)
    lines = []
    for name, published in card.published.items():
        mean, sd = (values[fitted.names.index(name)] for values in (fitted.mean, fitted.sd))
        lines.append(f"{name} {mean:.3f} (sd {sd:.3f}), published {published.mean:g} (sd {published.sd:g})")
        if abs(mean - published.mean) > FAR * published.sd or not 1 / (1 + FAR) <= sd / published.sd <= 1 + FAR:
            report.notes.append(
                f"published: {lines[-1]}: far apart; the responses may be of another kind, or template, label or "
                f"revision of the objective not the paper's"
            )
    return "; ".join(lines)


# -- memory and cost -----------------------------------------------------------------------------------------------


def _sizes(report: Preflight, resolved: ResolvedRequest, model: Path | None) -> None:
    """Estimate memory phase by phase and cost, and compare the memory with the GPU that the recipe states."""
    card, method = resolved.card, registry.get(resolved.recipe.method)
    report.memory = {"stated_gib": resolved.recipe.needs.gpu_memory_gib, "total_gib": None, "phases": []}
    if card.kind == "sandbox" and card.model is None:
        report.checked.append(("memory", "no GPU needed; the built-in base is a few hundred KiB"))
        _cost(report, resolved, None)
        return
    sizes = memory.sizes_of(str(model or card.model)) if card.model is not None else None
    _cost(report, resolved, sizes)
    if sizes is None or not sizes.shapes:
        report.notes.append("memory: not known, because the model's sizes are not (no folder, and no model known here)")
        return
    estimate = memory.estimate(resolved, sizes, method.capabilities.trains)
    report.memory |= estimate.as_dict()
    report.checked.append(("memory", estimate.sentence()))
    for phase in estimate.phases:
        report.checked.append(("", f"{phase.total / memory.GIB:6.1f} GiB  {phase.name}: {_parts(phase)}"))
    for name in estimate.unknown:
        report.notes.append(f"memory: the size of the reward model {name} is not known; it comes on top")
    _fits(report, resolved, estimate)


def _parts(phase: memory.Phase) -> str:
    sizes = [f"{name} {size / memory.GIB:.1f}" for name, size in phase.parts.items() if size >= 0.05 * memory.GIB]
    return ", ".join(sizes) or "little"


def _fits(report: Preflight, resolved: ResolvedRequest, estimate: memory.Estimate) -> None:
    needs = resolved.recipe.needs
    if needs.gpu_memory_gib is None:
        report.notes.append("memory: the recipe does not state a GPU's memory (needs.gpu_memory_gib)")
        return
    over = [phase for phase in estimate.phases if phase.total > needs.gpu_memory_gib * memory.GIB]
    if over:
        worst = estimate.peak
        largest = max(worst.parts, key=lambda name: worst.parts[name])
        report.problems.append(
            f"{report.recipe}: needs.gpu_memory_gib: {', '.join(phase.name for phase in over)} take up to "
            f"{worst.total / memory.GIB:.1f} GiB (most: {largest}, {worst.parts[largest] / memory.GIB:.1f}), but "
            f"{needs.gpu_memory_gib:g} GiB are stated; take {_remedy(largest)} or a larger GPU"
        )
    else:
        share = estimate.peak.total / memory.GIB / needs.gpu_memory_gib
        report.checked.append(("", f"fits {needs.gpu} ({needs.gpu_memory_gib:g} GiB): {share:.0%} at the peak"))


def _remedy(part: str) -> str:
    """Return what makes a part smaller."""
    return {
        "base": "a smaller model, dtype bfloat16",
        "reward models": "dtype bfloat16 for the objectives",
        "KV cache": "a smaller task.generation.batch_size (in training: batch or samples)",
        "logits": "a smaller micro_batch (supervised: a larger accumulate)",
        "activations": "a smaller micro_batch (supervised: a larger accumulate)",
        "scoring": "smaller batch_tokens for the objectives",
        "adapters": "a smaller policy.lora.r",
    }.get(part, "a smaller model")


def _cost(report: Preflight, resolved: ResolvedRequest, sizes: Architecture | None) -> None:
    method = registry.get(resolved.recipe.method)
    estimate = cost.estimate(resolved, method.capabilities, sizes)
    report.cost = asdict(estimate)
    if not estimate.policies:
        report.checked.append(("cost", "nothing is trained; answering samples and scores"))
        return
    parts = [f"{estimate.policies} polic{'y' if estimate.policies == 1 else 'ies'}"]
    counts = {"generated": estimate.tokens_generated, "trained on": estimate.tokens_trained}
    parts += [f"{number / 1e6:.1f} M tokens {what}" for what, number in counts.items() if number]
    parts += [f"{estimate.reward_calls:,} scores"] if estimate.reward_calls else []
    if estimate.hours is not None:
        parts.append(f"about {estimate.hours:.1f} h on {estimate.gpu} by its data sheet")
    report.checked.append(("cost", "at most " + ", ".join(parts)))
