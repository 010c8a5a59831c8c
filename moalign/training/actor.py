"""What an online trainer trains: it samples responses, and says how likely it and its reference find their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from moalign.lm import adapters, shared_prompts
from moalign.lm.finite import Modules
from moalign.lm.language_model import LanguageModel, reference_mode
from moalign.lm.log_probs import TokenOutputs, token_outputs, without_padding
from moalign.lm.sample_parts import in_parts
from moalign.lm.sampler import Samples, sample, state_width
from moalign.lm.trainers import checkpointed
from moalign.training.dropout import without_dropout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moalign.training.job import Job
    from moalign.training.settings import OnlineConfig

Style = Literal["percent", "fraction", "plain"]
"""How preferences are written into prompts; plain: they are not."""

REFERENCE = "reference"
"""Name of the frozen adapter when the reference is not the base itself."""


class Actor(Protocol):
    """What is trained. ``rows`` number those of the samples that it returned last."""

    width: int
    """Of its hidden states."""
    parameters: Sequence[torch.nn.Parameter]

    def sample(
        self, prompts: Sequence[str], preferences: NDArray[np.float64], numbers: Tensor, repeat: int, hidden: bool
    ) -> Samples:
        """Sample ``repeat`` responses to each bare prompt, at its preference ``[prompts, objectives]``.

        ``numbers`` as :func:`~moalign.lm.sampler.sample` has them; with ``hidden`` states are kept, for value heads.
        """
        ...

    def outputs(self, samples: Samples, rows: Tensor, hidden: bool = False) -> TokenOutputs:
        """Return what the policy as it is now makes of the sampled tokens, with gradient, ``[rows, T]``."""
        ...

    def reference_logps(self, samples: Samples, rows: Tensor) -> Tensor:
        """Return the reference's log-probability of the sampled tokens, ``[rows, T]``."""
        ...

    def sync_reference(self) -> None:
        """Make the reference what the policy is now."""
        ...

    def learning(self, begin: bool) -> None:
        """Begin or end passes with gradient."""
        ...

    def modules(self) -> Modules:
        """Return all that a checkpoint must hold of it."""
        ...

    def load(self, modules: Modules) -> None:
        """Take over what :meth:`modules` returned."""
        ...

    def close(self) -> None:
        """Remove from the base what was put there for training alone."""
        ...


class AdapterActor:
    """The active adapter of a language model, which reads the preference from the prompt. See :class:`Actor`.

    The reference is the base (the adapter switched off) or a frozen copy of the adapter; never a second base.
    """

    def __init__(self, job: Job, lm: LanguageModel, config: OnlineConfig, style: Style) -> None:
        """Train the active adapter of ``lm``; ``style`` says how preferences are written.

        Raises RequestError for ``share_prompts`` with a model that cannot share them.
        """
        self.lm, self.config, self.style, self.task = lm, config, style, job.task
        self.width = state_width(lm.model)
        self.parameters: Sequence[torch.nn.Parameter] = [p for p in lm.model.parameters() if p.requires_grad]
        self._checkpointing, self._memory = bool(job.policy_spec.gradient_checkpointing), ExitStack()
        if config.share_prompts:
            shared_prompts.require(lm, self._checkpointing)
        if config.own_reference:
            adapters.attach(lm, job.policy_spec.lora, seed=0, name=REFERENCE)
            self.sync_reference()

    def sample(
        self, prompts: Sequence[str], preferences: NDArray[np.float64], numbers: Tensor, repeat: int, hidden: bool
    ) -> Samples:
        """See :class:`Actor`."""
        renderer, card = self.task.renderer, self.task.card
        if self.style == "plain":
            texts = [renderer.plain(prompt) for prompt in prompts]
        else:
            texts = [renderer.preference(p, w, self.style) for p, w in zip(prompts, preferences, strict=True)]
        encoded = self.lm.encode(texts, card.generation.max_prompt_tokens)

        if self.task.engine is not None:
            rows = [row for row in encoded for _ in range(repeat)]
            return self.task.engine.rollout(self.lm, adapters.ADAPTER, rows, numbers, self.config.temperature)

        def draw(prompts: slice, rows: slice, repeat: int) -> Samples:
            return sample(
                self.lm, encoded[prompts], numbers[rows], self.config.temperature, repeat=repeat, hidden=hidden
            )

        with adapters.merged(self.lm):
            return in_parts(draw, len(encoded), repeat, self.config.sample_batch, self.lm.pad)

    def outputs(self, samples: Samples, rows: Tensor, hidden: bool = False) -> TokenOutputs:
        """See :class:`Actor`. The adapter is not folded into the weights, which rounds."""
        config = self.config
        tokens = (samples.input_ids[rows], samples.attention_mask[rows], samples.response_mask[rows])
        if not (config.share_prompts or config.group_by_length):
            return token_outputs(self.lm.model, *tokens, config.temperature, hidden)
        used = without_padding(*tokens)
        outputs = token_outputs(self.lm.model, *used, config.temperature, hidden, config.share_prompts)
        return outputs.padded(samples.response_mask.shape[1])

    def reference_logps(self, samples: Samples, rows: Tensor) -> Tensor:
        """See :class:`Actor`."""
        if not self.config.own_reference:
            with reference_mode(self.lm):
                return self.outputs(samples, rows).logps
        self.lm.model.set_adapter(REFERENCE)
        try:
            return self.outputs(samples, rows).logps
        finally:
            self.lm.model.set_adapter(adapters.ADAPTER)

    def sync_reference(self) -> None:
        """See :class:`Actor`."""
        adapters.set_tensors(self.lm, adapters.tensors(self.lm), name=REFERENCE)
        self.lm.model.set_adapter(adapters.ADAPTER)

    def learning(self, begin: bool) -> None:
        """See :class:`Actor`. Dropout stays off: every loss here is made of ratios of probabilities."""
        self._memory.close()
        if begin:
            self._memory.enter_context(checkpointed(self.lm.model, self._checkpointing))
            without_dropout(self.lm.model)
        else:
            self.lm.model.eval()

    def modules(self) -> Modules:
        """See :class:`Actor`."""
        own = {"adapter": adapters.tensors(self.lm)}
        return {**own, "reference": adapters.tensors(self.lm, REFERENCE)} if self.config.own_reference else own

    def load(self, modules: Modules) -> None:
        """See :class:`Actor`."""
        adapters.set_tensors(self.lm, dict(modules["adapter"]))
        if self.config.own_reference:
            adapters.set_tensors(self.lm, dict(modules["reference"]), name=REFERENCE)

    def close(self) -> None:
        """See :class:`Actor`."""
        self._memory.close()
        if self.config.own_reference:
            adapters.drop(self.lm, REFERENCE)
