"""``moalign export``: a policy for one preference as a plain peft adapter or a merged model, for use without moalign.

A trained adapter (with the preference in its prompt, or trained for it), or experts' weights interpolated, is one
model; a mixture of experts is a folder with their adapters, the control model and a script that answers. A README
beside it says how prompts are written; its code is all that is needed. It reads the very tokens that moalign reads and
samples with the card's settings alone: whatever a base's own generation config says (top-k, repetition penalty) was no
part of the policy that was trained and judged.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference, label
from moalign.core.progress import Progress, silent
from moalign.core.text import PROSE, visible
from moalign.evaluation.evaluate import preferences_for
from moalign.experiment import init
from moalign.experiment.templates import render
from moalign.lm import backends, builtin
from moalign.methods.base import Method, policies_of
from moalign.runs import atomic
from moalign.training.job import RunContext

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from moalign.lm.generator import ModelGenerator
    from moalign.lm.language_model import LanguageModel
    from moalign.policies.mixed import MixtureParts
    from moalign.policies.policy import Policy

FACTS = "moalign.json"
"""What the README says, for programs."""
ANSWER = "answer.py"
"""The script that answers with an exported mixture."""
PLACE = "{prompt}"
"""Stands for the prompt in the exported template."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how it is asked."""

    kind: Literal["adapter", "model", "mixture"]
    run: str
    method: str
    task: str
    objectives: list[str]
    preference: list[float]
    base: str
    base_fingerprint: str
    base_revision: str | None
    dtype: str
    """What the model was judged in, whatever its files hold."""
    quantization: dict[str, Any] | None
    """transformers' ``BitsAndBytesConfig`` of a base in 4 bits; a whole model has none."""
    prompt: str
    """What the model reads, with ``{prompt}`` where the prompt goes."""
    preference_in_prompt: bool
    """False: prompts are written as for the base, and the weights alone know the preference (if anything does)."""
    trim: Literal["", "lstrip", "rstrip", "strip"]
    """The method of ``str`` by which the chat template takes white space off a prompt; empty: it leaves it on."""
    special_tokens: bool
    """Whether the tokenizer adds its own special tokens; a chat template has written them into the text."""
    end_ids: list[int]
    """Any of these tokens ends an answer."""
    stop: list[str]
    """An answer is cut at the first of these texts."""
    temperature: float
    top_p: float
    max_prompt_tokens: int
    max_new_tokens: int
    mixture: dict[str, Any] | None = None
    """Of a mixture: ``experts`` (how many), ``space``, ``weights``, ``control`` and ``control_prompt`` (or None), and
    whether the tokenizer ends plain prompts (``drops_end``)."""


def export(
    method: Method,
    context: RunContext,
    preference: Preference,
    out: Path,
    merged: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write the policy that answers for ``preference`` into the new folder ``out``, whole or not at all.

    Args:
        merged: a whole model with the adapter folded into its weights, instead of the adapter alone. The base of
            ``context`` is spent by that; the next use of its task loads it again.

    Raises:
        RequestError: ``out`` holds something, the method cannot serve the preference, or its answers for it are not
            those of one trained model.
    """
    from transformers import GenerationConfig

    from moalign.lm import adapters

    check_free(out)
    (preference,) = preferences_for(method, context, [preference])
    context.task.progress = progress
    (policy,) = policies_of(method, context, [preference])
    parts = _parts_of(policy, preference)
    if parts is not None:
        return _export_mixture(method, context, policy, preference, parts, out, merged)
    model = _model_of(policy, method, preference)
    exported = _describe(method, context, policy, preference, "model" if merged else "adapter")
    limits = GenerationConfig(**_settings(exported, model.lm.pad))
    with atomic.filled(out, FACTS) as place:
        if merged:
            _write_whole(context, model, place, limits)
        else:
            adapters.save(model.lm, place, str(model.adapter))
            limits.save_pretrained(place)
        _write_facts(exported, out, place, model.lm)
    return exported


def _write_facts(exported: Exported, out: Path, place: Path, lm: LanguageModel) -> None:
    (place / FACTS).write_text(json.dumps(asdict(exported), indent=2) + "\n", encoding="utf-8")
    (place / "README.md").write_text(_readme(exported, out, lm), encoding="utf-8")


def _parts_of(policy: Policy, preference: Preference) -> MixtureParts | None:
    """Return the parts of a mixture of at least two experts, None for every other policy."""
    as_mixture = getattr(policy.generator, "as_mixture", None)
    parts: MixtureParts | None = None if as_mixture is None else as_mixture(preference)
    return parts if parts is not None and len(parts.experts) > 1 else None


def _export_mixture(
    method: Method,
    context: RunContext,
    policy: Policy,
    preference: Preference,
    parts: MixtureParts,
    out: Path,
    merged: bool,
) -> Exported:
    from moalign.lm import adapters

    if merged:
        raise RequestError(
            f"--merged: {method.name} at {label(preference)} mixes {len(parts.experts)} experts at every token, which "
            "no single model does; leave --merged out"
        )
    with atomic.filled(out, FACTS) as place:
        control = None if parts.control is None else parts.control.save(place, preference)
        mixture = {
            "experts": len(parts.experts),
            "space": parts.space,
            "weights": parts.weights,
            "control": control,
            "control_prompt": None if control is None else str(policy.render(PLACE)),
            "drops_end": _drops_end(parts.lm) and not context.task.card.template.chat,
        }
        exported = replace(_describe(method, context, policy, preference, "mixture"), mixture=mixture)
        if control is not None:
            exported = replace(exported, prompt=str(context.task.renderer.plain(PLACE)))
        for index, name in enumerate(parts.experts):
            adapters.save(parts.lm, place / f"expert-{index}", name)
        (place / ANSWER).write_text((Path(__file__).parent / "templates" / f"{ANSWER}.j2").read_text(encoding="utf-8"))
        _write_facts(exported, out, place, parts.lm)
    return exported


def check_free(out: Path) -> None:
    """Raise RequestError unless ``out`` is missing or an empty folder."""
    init.check_free(out, f"--out {out}", "; name a new one, or move it away")


def _model_of(policy: Policy, method: Method, preference: Preference) -> ModelGenerator:
    where = f"{method.name} at {label(preference)} cannot be exported"
    if policy.choose is not None or policy.samples > 1:
        raise RequestError(f"{where}: its answer is chosen among {policy.samples} samples by the reward panel")
    as_model = getattr(policy.generator, "as_model", None)
    if as_model is None:
        raise RequestError(f"{where}: its answers do not come from one language model")
    try:
        model: ModelGenerator = as_model()
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    if model.adapter is None:
        raise RequestError(f"{where}: nothing was trained; its answers are those of the base itself, {model.lm.source}")
    return model


def _describe(
    method: Method,
    context: RunContext,
    policy: Policy,
    preference: Preference,
    kind: Literal["adapter", "model", "mixture"],
) -> Exported:
    task, lm = context.task, context.task.language_model
    limits, ends = task.card.generation, task.codec.ends
    return Exported(
        kind=kind,
        run=context.run.record.run_id,
        method=method.name,
        task=task.card.name,
        objectives=task.names,
        preference=list(preference),
        base=str(builtin.converted(lm.source) or lm.source),
        base_revision=task.card.model_revision,
        dtype=task.card.dtype,
        quantization=backends.four_bits(task.card.dtype) if lm.in_4bit and kind != "model" else None,
        base_fingerprint=lm.fingerprint,
        prompt=str(policy.render(PLACE)),
        preference_in_prompt=str(policy.render(PLACE)) != str(task.renderer.plain(PLACE)),
        trim=_trim(policy.render),
        special_tokens=not task.card.template.chat,
        end_ids=sorted(ends.ids),
        stop=list(ends.texts),
        temperature=limits.temperature,
        top_p=limits.top_p,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_new_tokens=limits.max_new_tokens,
    )


def _trim(read: Callable[[str], str]) -> Literal["", "lstrip", "rstrip", "strip"]:
    """Return how a chat template takes white space off a prompt; not where other text stands between."""
    plain = read(PLACE)
    left, right = read(f" {PLACE}") == plain, read(f"{PLACE} ") == plain
    if left and right:
        return "strip"
    return "lstrip" if left else "rstrip" if right else ""


def _settings(exported: Exported, pad: int) -> dict[str, Any]:
    """Return the card's sampling, with every setting that a base's own config might set otherwise."""
    how: dict[str, Any] = {"do_sample": False}
    if exported.temperature > 0:
        how = {"do_sample": True, "temperature": exported.temperature, "top_p": exported.top_p, "top_k": 0}
    ends = {"eos_token_id": exported.end_ids, "pad_token_id": pad}
    return {**how, "repetition_penalty": 1.0, **ends, "max_new_tokens": exported.max_new_tokens}


def _write_whole(context: RunContext, model: ModelGenerator, place: Path, limits: GenerationConfig) -> None:
    from moalign.lm import adapters

    lm = _unquantised(context, model) if model.lm.in_4bit else model.lm
    lm.model.set_adapter(model.adapter)
    if adapters.shares_weights(lm):
        raise RequestError(
            "--merged: the adapter changes the embeddings or the head, which are one tensor in this model: merged into "
            "one it would change both; export the adapter without --merged"
        )
    whole: Any = lm.model.merge_and_unload()
    whole.generation_config = limits
    whole.save_pretrained(place, safe_serialization=True)
    model.lm.tokenizer.save_pretrained(place)
    # The adapter is now in the base's weights: nobody else may take them for the base.
    context.task.__dict__.pop("language_model", None)
    context.cache.clear()


def _unquantised(context: RunContext, model: ModelGenerator) -> LanguageModel:
    """Return the base in its own precision with the model's adapter: into 4-bit weights it would be rounded."""
    from moalign.lm import adapters, language_model

    task, name = context.task, str(model.adapter)
    lm = language_model.load(*task.base_source(), task.card.dtype, "cpu", codec=task.codec)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(model.lm, Path(folder) / name, name)
        adapters.load(lm, Path(folder) / name, name)
    return lm


_AROUND = {
    "": "BEFORE + prompt + BEHIND",
    "strip": "BEFORE + prompt.strip() + BEHIND",
    "lstrip": "BEFORE + (prompt + BEHIND).lstrip()",
    "rstrip": "(BEFORE + prompt).rstrip() + BEHIND",
}
"""How the text is put together. A side that is not trimmed has text of the user's turn there, which white space behind
or before it is trimmed from, too, when the prompt is empty."""


def _drops_end(lm: LanguageModel) -> bool:
    """Whether prompts are read without the end that the tokenizer writes behind every text."""
    return bool(lm.codec.prompt_ids(["a"])[0] != lm.tokenizer("a")["input_ids"])


def _readme(exported: Exported, out: Path, lm: LanguageModel) -> str:
    before, _, behind = exported.prompt.partition(PLACE)
    page = render(
        "mixture.md.j2" if exported.mixture is not None else "README.md.j2",
        exported=exported,
        weights=", ".join(f"{name} {w:g}" for name, w in zip(exported.objectives, exported.preference, strict=True)),
        whole=exported.kind == "model",
        folder=str(out.resolve()),
        revision="" if exported.base_revision is None else f", revision={exported.base_revision!r}",
        settings=", ".join(f"{name}={value!r}" for name, value in _settings(exported, lm.pad).items()),
        before=before,
        behind=behind,
        around=_AROUND[exported.trim],
        # Plain prompts of a tokenizer that ends every text are read without that end.
        ended=exported.special_tokens and _drops_end(lm),
        offsets=lm.tokenizer.is_fast,
    )
    return visible(page, PROSE)
