"""Checks what a card points to: model, data, splits, objectives, published statistics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from moalign.config.card import SourceSpec, TaskCard
from moalign.config.objectives import ModelObjective, ObjectiveSpec
from moalign.config.recipe import LoraSpec
from moalign.core.amounts import Amounts, SplitAmount
from moalign.core.errors import RequestError, placed
from moalign.core.records import Response
from moalign.lm import builtin, model_folder
from moalign.lm.chat import Renderer
from moalign.methods import registry
from moalign.preflight.report import Preflight
from moalign.tasks.load import make_task
from moalign.tasks.task import Task, fingerprint
from moalign.training.settings import CostHints, DpoConfig, GroupsUsers

FAR = 0.5
"""A fitted mean is far from a published one beyond this share of its standard deviation."""


class Inputs(NamedTuple):
    """What was found of a card's inputs."""

    model: Path | None
    """The policy's folder, when it is there."""
    task: Task | None
    """None when its data cannot be read here and now."""


def check_inputs(
    report: Preflight, card: TaskCard, results: Path, with_options: bool = True, lora: LoraSpec | None = None
) -> Inputs:
    """Check what a card points to, and whether ``lora`` fits its base.

    ``with_options`` is False for a card read without its ``--set`` options: what they might have changed is not
    checked.
    """
    model = _check_model(report, card) if with_options else None
    task = make_task(card if model is None else card.model_copy(update={"model": str(model)}), results)
    task.measurable = card.built_in_base or model is not None
    readable = _check_data(report, card) and report.look("splits", lambda: _splits(task))
    here = with_options and (card.built_in_base or model is not None)
    if here and readable:
        report.look("template", lambda: _template(report, task))
    if here and (card.built_in_base or is_local(str(card.model))):
        report.look("policy", lambda: task.examine(lora))
    if readable and with_options:
        _check_overlong(report, card, None if model is None else task)
    for spec in card.objectives:
        report.look(f"objective {spec.name}", partial(_objective, report, spec))
    for spec in card.gold_objectives or ():
        report.look(f"gold objective {spec.name}", partial(_gold_objective, report, spec))
    if card.published and with_options:
        report.look("published", lambda: _published(report, card, results))
    return Inputs(model, task if readable else None)


# -- models --------------------------------------------------------------------------------------------------------


def must_be_fetched(card: TaskCard) -> bool:
    """Whether the task's base is a hub model that is not on this machine."""
    from huggingface_hub.errors import HFValidationError

    if card.model is None or is_local(card.model):
        return False
    try:
        return _cached(card.model, card.model_revision) is None
    except HFValidationError:
        return False


def is_local(model: str) -> bool:
    """Whether a model needs no hub: a folder, or a built-in name."""
    return model in builtin.MODELS or os.path.isdir(os.path.expanduser(model))


def _cached(model: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model in the local cache, None when it is not there; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _in_cache(report: Preflight, source: str, revision: str | None, what: str) -> tuple[str, Path | None]:
    """Say whether a hub id is in the local cache, and return its folder there.

    Raises RequestError for what is no hub id, or cannot be downloaded.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        folder = _cached(source, revision)
    except HFValidationError:
        raise RequestError(
            f"{what} {source!r}: there is no such folder, and a hub id has the form owner/name"
            f"{model_folder.near(source)}"
        ) from None
    if revision is None:
        report.notes.append(f"{what} {source}: no revision is pinned; the newest one is used, whatever it is then")
    if folder is None and os.environ.get("HF_HUB_OFFLINE") == "1":
        raise RequestError(
            f"{what} {source!r}: not in the local hub cache, and HF_HUB_OFFLINE=1 is set; give a local folder "
            "instead, for example --set task.model=PATH/TO/FOLDER"
        )
    if folder is None:
        report.notes.append(f"{what} {source}: not in the local hub cache; it will be downloaded")
    place = "not downloaded yet" if folder is None else "in the local cache"
    return f"{source}: hub id, revision {revision or 'not pinned'}, {place}", folder


def _check_model(report: Preflight, card: TaskCard) -> Path | None:
    """Check the policy's folder; return it when it is there."""
    if card.built_in_base:
        report.add("model", "built in (about 0.1 M parameters); trained on first use, then cached")
        return None
    with report.collecting():
        if card.model is None:
            raise RequestError(
                f"task {card.name}: it needs a model; give a folder or a hub id: --set task.model=PATH/TO/FOLDER"
            )
        if not is_local(card.model):
            text, cached = _in_cache(report, card.model, card.model_revision, "model")
            report.add("model", text)
            return cached
        folder = model_folder.resolve(card.model, card.model_revision, "task.model")
        content = model_folder.fingerprint(folder, "task.model")
        report.add("model", f"{card.model}: whole safetensors weights, content {content}")
        return folder
    return None


def named_model(report: Preflight, where: str, model: str) -> str:
    """Return what is known of a model that the setting ``where`` names; nothing is downloaded."""
    if not is_local(model):
        return _in_cache(report, model, None, where)[0]
    return f"{model}: whole safetensors weights, content {fingerprint(model, None, where)}"


# -- data and splits -----------------------------------------------------------------------------------------------


def _check_data(report: Preflight, card: TaskCard) -> bool:
    """Read the data; returns whether its prompts can be read here and now."""
    from moalign.data import load

    spec = card.data
    if spec is None:
        return True
    if spec.responses is not None and _check_source(report, "responses", spec.responses):
        replies = partial(load.load_responses, spec, Path.cwd())
        report.look("responses", lambda: _counted(([row.response] for row in replies()), "rows"))
    if isinstance(spec.pairs, SourceSpec):
        report.notes.append(
            "data.pairs: they are labelled for no objective; methods that learn from an objective's pairs build theirs "
            f"from scored responses; by objective it is {{{card.objective_names[0]}: {{path: {spec.pairs.path}}}}}"
        )
    sources = spec.pairs if isinstance(spec.pairs, dict) else {None: spec.pairs}
    for objective, source in sources.items():
        name = "pairs" if objective is None else f"pairs.{objective}"
        if source is not None and _check_source(report, name, source):
            with report.collecting():
                pairs = load.load_pairs(spec, Path.cwd(), objective)
                report.add(name, _counted(([pair.chosen, pair.rejected] for pair in pairs), "pairs"))
    return not isinstance(spec.prompts, SourceSpec) or _check_source(report, "prompts", spec.prompts)


def _check_source(report: Preflight, name: str, source: SourceSpec) -> bool:
    """Whether a source's records can be read here and now; a hub data set is not downloaded."""
    from moalign.data import readers

    with report.collecting():
        place = readers.locate(source, Path.cwd())
        report.add(f"data.{name}", f"{place}, content {readers.fingerprint(source, Path.cwd())}")
        if not isinstance(place, str):
            return True
        report.notes.append(f"data.{name}: {place} is a hub data set; its records are read when training starts")
        if source.revision is None:
            report.notes.append(f"data.{name}: {place}: no revision is pinned")
    return False


def _counted(replies: Iterable[Sequence[str]], what: str) -> str:
    """Return how many records there are, each given by its replies, and how many of them are left out."""
    empty = [not all(reply.strip() for reply in each) for each in replies]
    left_out = f", {sum(empty)} of them with an empty reply, which are left out" if any(empty) else ""
    return f"{len(empty)} {what}{left_out}"


def _splits(task: Task) -> str:
    return ", ".join(f"{name} {len(prompts)}" for name, prompts in task.prompts.items()) + " prompts"


def _template(report: Preflight, task: Task) -> str:
    """Render a prompt in every way that a method may ask for it; note what the chat template does to answers."""
    codec, limit = task.untrained_codec(), task.card.generation.max_prompt_tokens
    renderer, count = Renderer(task.card.template, tuple(task.names), codec, limit), len(task.names)
    prompt, ends = task.prompts["train"][0], codec.ends
    if codec.caution:
        report.notes.append(f"template: {codec.caution}")
    texts = [
        renderer.plain(prompt),
        renderer.preference(prompt, [1 / count] * count),
        renderer.scores(prompt, [0.0] * count),
    ]
    lengths = [len(ids) for ids in codec.prompt_ids(texts)]
    stops = [*map(repr, ends.texts), *codec.tokenizer.convert_ids_to_tokens(sorted(ends.ids))]
    return (
        f"the first prompt has {lengths[0]} tokens, with a preference {lengths[1]}; {', '.join(stops)} ends a response"
    )


def require_rows(task: Task, config: BaseModel) -> None:
    """Raise RequestError where ``config`` trains on responses of the data that the chat template has no place for."""
    codec, prompt = task.untrained_codec(), task.prompts["train"][0]
    renderer = Renderer(task.card.template, tuple(task.names), codec, task.card.generation.max_prompt_tokens)
    try:
        codec.response_ids(renderer.plain(prompt), task.known_response(prompt) or Response("An answer."))
    except RequestError:
        amounts = task.amounts()
        if amounts is not None and _trains_on_texts(config, amounts):
            raise


def _trains_on_texts(config: BaseModel, task: Amounts) -> bool:
    """Whether training, that of experts included, reads responses that stand in the data, where they are texts."""
    if isinstance(config, GroupsUsers):
        return True
    if isinstance(config, DpoConfig) and config.pairs != "scored" and any(task.labelled):
        return True
    hints = config if isinstance(config, CostHints) else CostHints()
    texts = replace(task, train=SplitAmount() if task.train.by_base else task.train, calibration=SplitAmount())
    runs = hints.expert_runs()
    return (hints.learns_from(texts) + hints.reads(texts)).rows > 0 or (
        runs is not None and _trains_on_texts(registry.get(runs[0]).Config.model_validate(runs[1]), task)
    )


def _check_overlong(report: Preflight, card: TaskCard, task: Task | None) -> None:
    """Report how many prompts are cut or dropped, where the tokenizer is here to count their tokens."""
    if task is None:
        if card.overlong == "drop":
            report.notes.append("overlong: drop: how many prompts are left out is not known: the model is not here yet")
        return
    with report.collecting():
        counts = task.overlong_report()
        what = "dropped" if "dropped" in counts else "cut"
        count, limit = counts[what], card.generation.max_prompt_tokens
        if not count:
            report.add("overlong", f"none of {counts['prompts']} prompts is {what}: all fit {limit} tokens")
            return
        lost = f", {counts['cut_tokens']} tokens in all" if "cut_tokens" in counts else ""
        text = f"{count} of {counts['prompts']} prompts are {what}{lost}: longer than {limit} tokens"
        report.notes.append(f"overlong: {text} (generation.max_prompt_tokens)")
        report.add("overlong", text)


# -- objectives ----------------------------------------------------------------------------------------------------


def _objective(report: Preflight, spec: ObjectiveSpec) -> str:
    from moalign.rewards.judge import JudgeScorer
    from moalign.rewards.scorer import build_scorer

    if isinstance(spec, ModelObjective) and not is_local(spec.model):
        return _in_cache(report, spec.model, spec.revision, f"objective {spec.name}: model")[0]
    scorer = build_scorer(spec, Path.cwd())
    if isinstance(scorer, JudgeScorer):
        text, was_read = scorer.probe()
        if not was_read:
            report.notes.append(f"objective {spec.name}: {text}")
        return f"judge, {text}, revision {scorer.revision}"
    return f"{spec.kind}, {'larger' if scorer.maximise else 'smaller'} is better, revision {scorer.revision}"


def _gold_objective(report: Preflight, spec: ObjectiveSpec) -> str:
    with placed("gold_objectives"):
        return f"used by the judge only: {_objective(report, spec)}"


def _published(report: Preflight, card: TaskCard, results: Path) -> str:
    """Compare the fitted normaliser with the statistics that a paper reports; far is a note, never a problem."""
    from moalign.rewards.normaliser import Normaliser

    listed = ", ".join(f"{name} {published.mean:g} (sd {published.sd:g})" for name, published in card.published.items())
    if must_be_fetched(card):
        return f"{listed}; not compared: the base is not here yet"
    if card.normaliser is not None:
        fitted = Normaliser.from_spec(card.normaliser, card.objective_names)
    else:
        path = make_task(card, results).folder / "normaliser.json"
        if not path.is_file():
            return f"{listed}; not compared: no normaliser has been fitted yet"
        fitted = Normaliser.from_json(path)
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
