"""The online engine: sample, score, learn, again.

A method gives the engine a loss over a rollout (:class:`RolloutLoss`) and the preferences to condition on. The engine
owns everything else: prompts, sampling, decoding, scoring on the bare prompt, reference log-probabilities (the
adapter switched off, or a frozen copy of it; never a second base), value heads, accumulation, clipping, the
optimizer, logging, checkpoints and resume.

Rollouts are drawn from the very distribution whose log-probabilities are trained on: full vocabulary, temperature
included, the end token a token like any other. Dropout is off in all of it: every loss here is made of ratios of
probabilities. Every random number depends on (seed, phase, step) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm import adapters
from moalign.lm.language_model import LanguageModel, TokenOutputs, reference_mode, token_outputs
from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer
from moalign.lm.sampler import Samples, responses, sample
from moalign.lm.stopping import trim
from moalign.training.dropout import without_dropout
from moalign.training.settings import OnlineConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moalign.training.job import Job

REFERENCE = "reference"
"""Name of the frozen adapter when the reference is not the base itself."""


@dataclass
class Rollout:
    """Sampled and scored responses. Row ``i * samples + j`` is response ``j`` to prompt ``i``."""

    prompts: list[str]
    """Bare prompts, ``[prompts]``."""
    preferences: NDArray[np.float64]
    """``[prompts, objectives]``."""
    per_prompt: int
    samples: Samples
    """Token tensors, ``[rows, ...]``."""
    responses: list[str]
    raw: NDArray[np.float64]
    """Raw rewards, larger is better, ``[rows, objectives]``."""
    z: NDArray[np.float64]
    """Normalised rewards (task's frozen mean and standard deviation), ``[rows, objectives]``."""
    score_reference: Callable[[Tensor], Tensor]
    """Row numbers -> reference log-probabilities ``[those rows, T]``."""
    step: int = 0
    """The training step that drew it, from 0."""
    values: Tensor | None = None
    """Value heads' outputs as the responses were sampled, ``[rows, T, heads]``, when the engine has them."""
    score_policy: Callable[[], Tensor] | None = None
    """-> log-probabilities of all rows under the policy as it is now, ``[rows, T]``, no gradient."""
    _reference: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def ref_logps(self, rows: Tensor) -> Tensor:
        """Return the reference's log-probability of each token of some rows, ``[rows, T]``; 0 outside the response.

        Computed when first asked for: a method that trains on two of eight samples pays for two.
        """
        missing = [row for row in dict.fromkeys(rows.tolist()) if row not in self._reference]
        if missing:
            for row, logps in zip(missing, self.score_reference(torch.tensor(missing)), strict=True):
                self._reference[row] = logps
        return torch.stack([self._reference[row] for row in rows.tolist()])


@dataclass
class Selection:
    """The rows of a rollout that one update trains on."""

    rows: NDArray[np.intp]
    """Row numbers, consecutive ``group`` of them belong together; may be empty."""
    group: int = 1
    """Rows that a micro-batch must not tear apart (2 for pairs)."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What the loss needs per group, ``[groups, ...]``."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Part:
    """One micro-batch of a selection."""

    response_mask: Tensor
    """``[rows, T]``."""
    old_logps: Tensor
    """Log-probabilities under the policy that sampled, ``[rows, T]``: the sampler's own in float32, where they agree
    with a pass over whole rows to 1e-4; else of such a pass."""
    ref_logps: Tensor
    """``[rows, T]``."""
    extras: dict[str, Tensor]
    """The selection's extras of these groups."""
    values: Tensor | None = None
    """Value heads' outputs ``[rows, T, heads]`` when the engine has them."""


class RolloutLoss(Protocol):
    """What a method gives the engine."""

    def preferences(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Draw the preferences that prompts are conditioned on, ``[count, objectives]``."""
        ...

    def select(self, rollout: Rollout) -> Selection:
        """Choose rows and attach what the loss needs (pairs, advantages); no gradient."""
        ...

    def loss(self, outputs: TokenOutputs, part: Part) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss over the part's groups (a scalar) and metrics."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A :class:`RolloutLoss` that changes from step to step: what it returns is kept in checkpoints."""

    def state(self) -> dict[str, float]:
        """Return all that a resumed run must know."""
        ...

    def load_state(self, told: dict[str, float]) -> None:
        """Go on from what :meth:`state` returned."""
        ...


class OnlineEngine:
    """Runs a :class:`RolloutLoss` on one policy."""

    def __init__(
        self,
        job: Job,
        lm: LanguageModel,
        config: OnlineConfig,
        phase: str = "online",
        style: Literal["percent", "fraction", "plain"] = "percent",
        value_heads: torch.nn.Module | None = None,
        value_lr: float | None = None,
    ) -> None:
        """Prepare the engine.

        Args:
            lm: a language model with its trainable adapter active.
            phase: name in the record, metrics and checkpoints.
            style: how preferences are written into prompts; ``plain``: they are not.
            value_heads: module from hidden states ``[rows, T, width]`` to values ``[rows, T, heads]``, trained along.
            value_lr: their learning rate, on the same schedule; None: the policy's.
        """
        from accelerate import Accelerator

        self.job, self.lm, self.config, self.phase, self.style = job, lm, config, phase, style
        self.value_heads = value_heads
        self.accelerator = Accelerator(cpu=lm.device.type == "cpu")
        policy = [p for p in lm.model.parameters() if p.requires_grad]
        critics = [] if value_heads is None else list(value_heads.parameters())
        self.parameters = policy + critics
        groups = [{"params": policy, "peak": config.lr}, {"params": critics, "peak": value_lr or config.lr}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, weight_decay=config.weight_decay
        )
        self.renderer = job.task.renderer
        self.prompts = job.task.prompts["train"]
        self.own_reference = config.reference == "start" or config.ref_sync_steps is not None
        self.counts = {"updates_skipped": 0}
        if self.own_reference:
            adapters.attach(lm, job.policy_spec.lora, seed=0, name=REFERENCE)
            self._sync_reference()

    # -- the loop --------------------------------------------------------------------------------------

    def run(self, method: RolloutLoss) -> None:
        """Train to the configured number of steps, resuming from the phase's checkpoint."""
        start = self._resume(method)
        for step in range(start, self.config.steps):
            torch.manual_seed(derive(self.job.seed, self.phase, step))
            rollout = self.rollout(step, method)
            told = self._update(step, rollout, method)
            done = step + 1
            if self.config.ref_sync_steps and done % self.config.ref_sync_steps == 0:
                self._sync_reference()
            if done % self.config.log_every == 0 or done == self.config.steps:
                self.job.run.log(done, self.phase, **told, **self._describe(rollout), **self.job.meter.cost())
            self.job.say(self.phase, done, self.config.steps)
            if done % self.config.checkpoint_every == 0 and done < self.config.steps:
                self._checkpoint(done, method)
        self.job.notes.update(self.counts)
        if self.own_reference:
            adapters.drop(self.lm, REFERENCE)

    def rollout(self, step: int, method: RolloutLoss) -> Rollout:
        """Sample and score responses for a step's prompts and preferences."""
        rng = np.random.default_rng(derive(self.job.seed, self.phase, step, "prompts"))
        chosen = rng.choice(len(self.prompts), size=self.config.batch, replace=len(self.prompts) < self.config.batch)
        bare = [self.prompts[i] for i in chosen]
        wanted = method.preferences(rng, len(bare))
        encoded = self.lm.encode(self._rendered(bare, wanted), self.job.task.card.generation.max_prompt_tokens)
        rows = len(encoded) * self.config.samples
        numbers = torch.from_numpy(rng.random((rows, self.job.task.card.generation.max_new_tokens)))
        self.lm.model.eval()
        with torch.no_grad(), adapters.merged(self.lm):
            drawn = sample(
                self.lm,
                encoded,
                numbers,
                self.config.temperature,
                repeat=self.config.samples,
                hidden=self.value_heads is not None,
            )
            values = None if self.value_heads is None else self.value_heads(drawn.hidden)
        self.job.meter.add_tokens_generated(drawn.tokens)
        drawn = trim(self.lm, drawn, self.job.task.card.template.stop)
        if self.lm.model.dtype != torch.float32:
            # Token by token, with a cache, half precision rounds otherwise than in the one pass that is trained on
            # (measured: .04 nats a token, .8 % of PPO's ratios outside the clip before any update).
            drawn = replace(drawn, logps=self._policy_logps(drawn))
        texts_out = responses(self.lm, drawn, self.job.task.card.template.stop)
        raw = self.job.panel.score([p for p in bare for _ in range(self.config.samples)], texts_out)
        return Rollout(
            prompts=bare,
            preferences=wanted,
            per_prompt=self.config.samples,
            samples=drawn,
            responses=texts_out,
            raw=raw,
            z=self.job.panel.z(raw),
            score_reference=lambda rows: self._reference_logps(drawn, rows),
            step=step,
            values=values,
            score_policy=lambda: self._policy_logps(drawn),
        )

    def _rendered(self, prompts: list[str], preferences: NDArray[np.float64]) -> list[str]:
        """Return what the policy reads."""
        if self.style == "plain":
            return [self.renderer.plain(prompt) for prompt in prompts]
        return [self.renderer.preference(p, w, self.style) for p, w in zip(prompts, preferences, strict=True)]

    def _update(self, step: int, rollout: Rollout, method: RolloutLoss) -> dict[str, float]:
        """Do the rollout's updates; returns the last one's metrics."""
        told: dict[str, float] = {}
        for _ in range(self.config.epochs):
            selection = method.select(rollout)
            told = dict(selection.metrics)
            if "dropped" in told:
                self.counts["pairs_dropped"] = self.counts.get("pairs_dropped", 0) + int(told["dropped"])
            if len(selection.rows) == 0:
                # Nothing to learn from (all ties, say): counted, and training goes on.
                self.counts["updates_skipped"] += 1
                return {**told, "skipped": 1.0}
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * factor(self.config.schedule, step, self.config.steps, self.config.warmup)
            self.optimizer.zero_grad(set_to_none=True)
            for name, value in self._accumulate(rollout, selection, method).items():
                told[name] = value
            told["grad_norm"] = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.clip))
            self.optimizer.step()
        return told

    def _accumulate(self, rollout: Rollout, selection: Selection, method: RolloutLoss) -> dict[str, float]:
        """Backward over the selection in micro-batches; each part weighs as many groups as it holds."""
        drawn = rollout.samples
        groups = len(selection.rows) // selection.group
        per_part = max(1, self.config.micro_batch // selection.group)
        told: dict[str, float] = {}
        without_dropout(self.lm.model)
        for first in range(0, groups, per_part):
            some = slice(first, min(first + per_part, groups))
            rows = torch.as_tensor(selection.rows[first * selection.group : some.stop * selection.group]).cpu()
            mask = drawn.response_mask[rows]
            outputs = token_outputs(
                self.lm.model,
                drawn.input_ids[rows],
                drawn.attention_mask[rows],
                mask,
                self.config.temperature,
                hidden=self.value_heads is not None,
            )
            values = None if self.value_heads is None else self.value_heads(outputs.hidden)
            extras = {name: value[some] for name, value in selection.extras.items()}
            part = Part(mask, drawn.logps[rows], rollout.ref_logps(rows), extras, values)
            loss, metrics = method.loss(outputs, part)
            share = (some.stop - some.start) / groups
            self.accelerator.backward(loss * share)
            metrics = {"loss": float(loss.detach()), **metrics}
            for name, value in metrics.items():
                told[name] = told.get(name, 0.0) + share * value
            self.job.meter.add_tokens_trained(int(drawn.attention_mask[rows].sum()))
        self.lm.model.eval()
        return told

    # -- log-probabilities without gradient --------------------------------------------------------------

    @torch.no_grad()
    def _policy_logps(self, drawn: Samples) -> Tensor:
        """Return the log-probabilities of the policy as it is now ``[rows, T]``, in micro-batches.

        By the very pass that is trained on: the adapter is not folded into the weights, which rounds.
        """
        parts = []
        for some in torch.arange(len(drawn.input_ids)).split(self.config.micro_batch):
            given = (drawn.input_ids[some], drawn.attention_mask[some], drawn.response_mask[some])
            parts.append(token_outputs(self.lm.model, *given, temperature=self.config.temperature).logps)
        return torch.cat(parts)

    @torch.no_grad()
    def _reference_logps(self, drawn: Samples, rows: Tensor) -> Tensor:
        """Return the reference's log-probabilities ``[rows, T]``, in micro-batches."""
        parts = []
        for some in rows.split(self.config.micro_batch):
            given = (drawn.input_ids[some], drawn.attention_mask[some], drawn.response_mask[some])
            if self.own_reference:
                self.lm.model.set_adapter(REFERENCE)
                out = token_outputs(self.lm.model, *given, temperature=self.config.temperature)
                self.lm.model.set_adapter(adapters.ADAPTER)
            else:
                with reference_mode(self.lm):
                    out = token_outputs(self.lm.model, *given, temperature=self.config.temperature)
            parts.append(out.logps)
        return torch.cat(parts)

    def _sync_reference(self) -> None:
        adapters.set_tensors(self.lm, adapters.tensors(self.lm), name=REFERENCE)
        self.lm.model.set_adapter(adapters.ADAPTER)

    # -- books -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return what every online method logs: rewards, KL, length."""
        drawn = rollout.samples
        lengths = drawn.response_mask.sum(-1)
        # One response of each prompt: an unbiased estimate, also when the update chose best and worst.
        first = torch.arange(0, len(lengths), rollout.per_prompt)
        told: dict[str, Any] = {
            "kl": float((drawn.logps[first] - rollout.ref_logps(first)).sum(-1).mean()),
            "length": float(lengths.float().mean()),
            "unfinished": float((~drawn.finished).float().mean()),
        }
        for name, value in zip(self.job.task.names, rollout.z.mean(axis=0), strict=True):
            told[f"reward/{name}"] = float(value)
        utility = (rollout.z * np.repeat(rollout.preferences, rollout.per_prompt, axis=0)).sum(axis=1)
        told["utility"] = float(utility.mean())
        return told

    def _checkpoint(self, step: int, method: RolloutLoss) -> None:
        tensors, plain = pack_optimizer(self.optimizer)
        tensors.update({f"adapter.{key}": value for key, value in adapters.tensors(self.lm).items()})
        if self.own_reference:
            kept = adapters.tensors(self.lm, REFERENCE)
            tensors.update({f"reference.{key}": value for key, value in kept.items()})
        if self.value_heads is not None:
            heads = self.value_heads.state_dict()
            tensors.update({f"values.{key}": value.detach().cpu().contiguous() for key, value in heads.items()})
        state = {"optimizer": plain, "meter": self.job.meter.state(), "counts": self.counts}
        if isinstance(method, Stateful):
            state["method"] = method.state()
        self.job.run.save_checkpoint(self.phase, step, tensors, state)

    def _resume(self, method: RolloutLoss) -> int:
        found = self.job.run.load_checkpoint(self.phase)
        self.job.run.truncate_metrics(self.phase, 0 if found is None else found.step)
        if found is None:
            return 0

        def named(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in found.tensors.items() if key.startswith(prefix)}

        adapters.set_tensors(self.lm, named("adapter."))
        if self.own_reference:
            adapters.set_tensors(self.lm, named("reference."), name=REFERENCE)
        if self.value_heads is not None:
            self.value_heads.load_state_dict(named("values."))
        unpack_optimizer(self.optimizer, found.tensors, found.state["optimizer"])
        self.job.meter.load(found.state["meter"])
        self.counts.update(found.state["counts"])
        if isinstance(method, Stateful):
            method.load_state(found.state["method"])
        return found.step


def preference_sampler(
    given: Sequence[Sequence[float]] | None, objectives: int, alpha: float, resolution: int | None = None
) -> Callable[[np.random.Generator, int], NDArray[np.float64]]:
    """Return how preferences are drawn: from the given vectors (``--prefs``), else Dirichlet(alpha * 1).

    With ``resolution`` draws are moved to multiples of ``1 / resolution``. A model that reads its preference digit by
    digit cannot tell 20.0% from its neighbours when it never read it: a Dirichlet draw is never round and never a
    corner, while people and grids ask for round numbers and corners.
    """
    from moalign.core.preferences import dirichlet, on_grid

    if given:
        vectors = np.asarray(given, dtype=np.float64)
        return lambda rng, count: vectors[rng.integers(len(vectors), size=count)]
    if resolution is None:
        return lambda rng, count: dirichlet(rng, objectives, count, alpha)
    return lambda rng, count: on_grid(dirichlet(rng, objectives, count, alpha), resolution)
