"""Experts mixed at every token by a control model: what PCM trains, and what answers for it (arXiv 2407.04181)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.lm import adapters
from moalign.lm.chat import Rendered
from moalign.lm.log_probs import TokenOutputs, positions
from moalign.lm.mixture import Mixture, OwnPrompt, Space, expert_log_probs, logit_mixture_logps, mixture_logps
from moalign.lm.sample_parts import in_parts
from moalign.lm.sampler import Generated, NextToken, Samples, Sampling, generate, pad_left, sample
from moalign.lm.side_by_side import SideBySide
from moalign.lm.trainers import checkpointed
from moalign.policies.control import Control, ControlWeights
from moalign.policies.mixed import MixtureParts, experts_on_model
from moalign.policies.policy import Policy
from moalign.training.dropout import without_dropout
from moalign.training.experts import expert_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moalign.training.job import Job, RunContext

FILE = "control"
"""Name of the file (inside a run) with the control model's weights."""


def source(
    control: Control,
    experts: SideBySide,
    space: Space,
    prompts: Sequence[Sequence[int]],
    preferences: Tensor,
    hidden: bool = False,
) -> Mixture:
    """Return the mixture for a batch whose experts read ``prompts`` (token ids), at ``preferences`` ``[rows, n]``.

    ``hidden`` keeps the control model's states.
    """
    n, lm = len(experts.names), experts.lm
    ids, mask = pad_left(prompts, lm.pad, lm.device)
    read = OwnPrompt(NextToken(experts), ids.repeat(n, 1), mask.repeat(n, 1))
    return Mixture(read, n, ControlWeights(control, preferences.to(lm.device), hidden), space)


class MixtureActor:
    """The control model of a mixture of frozen experts. See :class:`~moalign.training.actor.Actor`.

    It reads the prompt with its preference, the experts the bare one. In probability space what the experts find of the
    sampled tokens is kept, so that its gradient needs no expert; in logit space, where it would be the whole vocabulary
    at every token, the experts read each part of a rollout again. Its reference is the mixture whose weights are the
    preference.
    """

    def __init__(self, job: Job, control: Control, experts: SideBySide) -> None:
        """Train ``control``; ``experts`` are on its base."""
        self.job, self.control, self.experts = job, control, experts
        self.space: Space = job.config.space
        self.width = control.width
        self.parameters: Sequence[torch.nn.Parameter] = control.trainable()
        # Of the forms the adapter alone is trained through the base's layers.
        self._checkpointing = control.spec.form == "adapter" and bool(job.policy_spec.gradient_checkpointing)
        self._memory = ExitStack()

    def sample(
        self, prompts: Sequence[str], preferences: NDArray[np.float64], numbers: Tensor, repeat: int, hidden: bool
    ) -> Samples:
        """See :class:`~moalign.training.actor.Actor`; temperature 1."""
        lm, renderer, limit = self.experts.lm, self.job.task.renderer, self.job.task.card.generation.max_prompt_tokens
        read = lm.encode([renderer.preference(p, w) for p, w in zip(prompts, preferences, strict=True)], limit)
        bare = lm.encode([renderer.plain(prompt) for prompt in prompts], limit)
        weights = torch.as_tensor(preferences, dtype=torch.float32, device=lm.device)
        self.control.activate()

        def draw(prompts: slice, rows: slice, repeat: int) -> Samples:
            mixture = source(self.control, self.experts, self.space, bare[prompts], weights[prompts], hidden)
            return sample(lm, read[prompts], numbers[rows], repeat=repeat, source=mixture)

        samples = in_parts(draw, len(read), repeat, self.job.config.sample_batch, lm.pad)
        self._bare = pad_left([row for row in bare for _ in range(repeat)], lm.pad, lm.device)
        self._preferences = weights.repeat_interleave(repeat, dim=0)
        if self.space == "probability":
            parts = torch.split(torch.arange(len(self._preferences)), self.job.config.micro_batch)
            self._found = torch.cat([self._read(samples, rows) for rows in parts])
        return samples

    def _read(self, samples: Samples, rows: Tensor) -> Tensor:
        return expert_log_probs(self.experts, self._bare, samples, rows, self.space)

    def _logps(self, samples: Samples, rows: Tensor, log_weights: Tensor) -> Tensor:
        inside = samples.response_mask[rows]
        if self.space == "probability":
            logps = mixture_logps(self._found[rows], log_weights)
        else:
            tokens = samples.input_ids[rows, -inside.shape[1] :]
            logps = logit_mixture_logps(self._read(samples, rows), log_weights, tokens)
        return logps.masked_fill(~inside, 0.0)

    def outputs(self, samples: Samples, rows: Tensor, hidden: bool = False) -> TokenOutputs:
        """See :class:`~moalign.training.actor.Actor`; the entropy is that of the weights."""
        ids, mask, inside = samples.input_ids[rows], samples.attention_mask[rows], samples.response_mask[rows]
        self.control.activate()
        states = self.control.hidden(ids, mask, positions(mask))[:, -(inside.shape[1] + 1) : -1]
        log_weights = self.control.log_weights(states, self._preferences[rows])
        logps = self._logps(samples, rows, log_weights)
        entropy = torch.special.entr(log_weights.detach().exp()).sum(-1).masked_fill(~inside, 0.0)
        return TokenOutputs(logps, entropy, states if hidden else None)

    def reference_logps(self, samples: Samples, rows: Tensor) -> Tensor:
        """See :class:`~moalign.training.actor.Actor`."""
        return self._logps(samples, rows, self._preferences[rows].log().unsqueeze(1))

    def sync_reference(self) -> None:
        """See :class:`~moalign.training.actor.Actor`; the reference is fixed."""

    def learning(self, begin: bool) -> None:
        """See :class:`~moalign.training.actor.Actor`; there is no dropout."""
        self._memory.close()
        if begin and self._checkpointing:
            model = self.control.lm.model
            self._memory.enter_context(checkpointed(model, True))
            without_dropout(model)
        elif self._checkpointing:
            self.control.lm.model.eval()

    def modules(self) -> Mapping[str, Mapping[str, Tensor]]:
        """See :class:`~moalign.training.actor.Actor`."""
        return {FILE: self.control.weights()}

    def load(self, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See :class:`~moalign.training.actor.Actor`."""
        self.control.load_weights(modules[FILE], "its checkpoint")

    def close(self) -> None:
        """See :class:`~moalign.training.actor.Actor`; what is on the base stays until the method has saved it."""
        self._memory.close()


@contextmanager
def mixture_in_training(job: Job) -> Iterator[MixtureActor]:
    """Give the run's experts with a fresh control model to train; what it has become is saved with the run."""
    lm, count = job.task.language_model, len(job.task.names)
    names = [f"expert_{index}" for index in range(count)]
    for name, index in zip(names, range(count), strict=True):
        adapters.load(lm, job.run.path / expert_folder(index), name)
    control = Control(job.config.control, lm, count, job.seed)
    yield MixtureActor(job, control, SideBySide(lm, names))
    job.run.save_tensors(FILE, control.weights())
    for name in [*names, control.name]:
        adapters.drop(lm, name)


class ControlPrompt(Rendered):
    """A prompt as the control model reads it, with what the experts read and the preference that weighs them."""

    bare: Rendered
    preference: Preference

    def __eq__(self, other: object) -> bool:
        """Two preferences that are worded alike weigh the experts differently: they share no answer."""
        return super().__eq__(other) and self.preference == getattr(other, "preference", None)

    def __ne__(self, other: object) -> bool:
        return not self == other  # str has one of its own

    def __hash__(self) -> int:
        return hash((str(self), self.preference))

    @classmethod
    def made(cls, context: RunContext, prompt: str, preference: Preference) -> ControlPrompt:
        """Return the prompt with its preference written beside it, and as it is."""
        renderer = context.task.renderer
        read = renderer.preference(prompt, preference)
        text = cls(read)
        text.prompt, text.build, text.cut = read.prompt, read.build, read.cut
        text.bare, text.preference = renderer.plain(prompt), preference
        return text


class ControlledGenerator:
    """The mixture of a finished run; one batch may hold a different preference in every row."""

    def __init__(self, control: Control, experts: Sequence[str], space: Space) -> None:
        """Answer with the adapters ``experts`` on the base, by name, weighed by ``control``, mixed in ``space``."""
        self.control, self.experts, self.space = control, experts, space

    def generate(self, texts: Sequence[ControlPrompt], rows: Sequence[int], sampling: Sampling) -> Generated:
        """See :class:`~moalign.lm.generator.Generator`."""
        lm = self.control.lm
        together = SideBySide(lm, self.experts)  # anew: the control model or another run may have brought adapters
        bare = lm.encode([text.bare for text in texts], sampling.max_prompt_tokens)
        preferences = torch.tensor([text.preference for text in texts], dtype=torch.float32)
        self.control.activate()

        def of_batch(part: Sequence[int]) -> Mixture:
            return source(self.control, together, self.space, [bare[i] for i in part], preferences[list(part)])

        return generate(lm, texts, rows, sampling, of_batch)

    def as_mixture(self, preference: Preference) -> MixtureParts:
        """Return what it is made of; a text holds the preference for the control model, the parts do for the mask."""
        return MixtureParts(self.control.lm, list(self.experts), self.space, list(preference), self.control)

    def as_model(self) -> None:
        """RequestError: no one model says what a mixture does."""
        raise RequestError(
            f"its answers come from {len(self.experts)} experts and a control model that sample every token "
            "together; no adapter and no single model has that distribution"
        )


def orchestrated(context: RunContext, preference: Preference) -> Policy:
    """Return the run's mixture, whose control model is asked with ``preference``; shared by all preferences.

    Raises RequestError when an expert or the control model is missing, damaged or of another task.
    """
    if FILE not in context.cache:
        lm = context.task.language_model
        experts = experts_on_model(context)
        name = f"control_{context.run.record.run_id}"
        control = Control(context.config.control, lm, len(context.task.names), seed=0, name=name)
        control.load_weights(context.run.load_tensors(FILE), str(context.run.path / f"{FILE}.safetensors"))
        context.cache[FILE] = ControlledGenerator(control, experts, context.config.space)
    return Policy(context.cache[FILE], lambda prompt: ControlPrompt.made(context, prompt, preference))
