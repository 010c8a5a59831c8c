"""A rollout: prompts with preferences, the responses that the policy gives, and their scores.

Drawn from the very distribution whose log-probabilities are trained on: full vocabulary, temperature included, the end
token a token like any other. Every random number depends on (seed, phase, step) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moalign.core import processes
from moalign.core.arrays import Matrix
from moalign.core.seeds import derive
from moalign.lm.language_model import LanguageModel
from moalign.lm.sample_parts import joined
from moalign.lm.sampler import Samples, responses, trim
from moalign.training.actor import Actor
from moalign.training.preference_draws import Draw
from moalign.training.settings import OnlineConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moalign.training.job import Job


@dataclass
class Rollout:
    """Sampled and scored responses. Row ``i * per_prompt + j`` is response ``j`` to prompt ``i``."""

    prompts: list[str]
    """Bare prompts, ``[prompts]``."""
    preferences: Matrix
    """``[prompts, objectives]``."""
    per_prompt: int
    samples: Samples
    """Token tensors, ``[rows, ...]``."""
    responses: list[str]
    raw: Matrix
    """Raw rewards, larger is better, ``[rows, objectives]``."""
    z: Matrix
    """Normalised rewards (task's frozen mean and standard deviation), ``[rows, objectives]``."""
    score_reference: Callable[[Tensor], Tensor]
    """Row numbers -> reference log-probabilities ``[those rows, T]``."""
    outside: float | None = None
    """Share of the responses outside the data's support, where it is looked at (:mod:`moalign.training.support`)."""
    step: int = 0
    """The training step that drew it, from 0."""
    drawn_logps: Tensor | None = None
    """By the engine that drew the responses, where that is not the trainer's own model, ``[rows, T]``."""
    correction: float | None = None
    """The largest importance weight of a token that an engine drew (:attr:`importance`)."""
    values: Tensor | None = None
    """Value heads' outputs as the responses were sampled, ``[rows, T, heads]``, when the trainer has them."""
    _reference: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _every: Tensor | None = field(default=None, repr=False)

    @property
    def utility(self) -> Matrix:
        """``w . z`` of every response with its own preference, ``[rows]``."""
        return np.asarray((self.z * np.repeat(self.preferences, self.per_prompt, axis=0)).sum(axis=1))

    def ref_logps(self, rows: Tensor | None = None) -> Tensor:
        """Return the reference's log-probability of each token of some rows (None: all), ``[rows, T]``; 0 outside.

        Computed when first needed: a method that trains on two of eight samples pays for two. Of all rows each process
        computes its share, so that all must ask for them.
        """
        every = torch.arange(len(self.responses))
        if rows is None and processes.count() > 1:
            if self._every is None:
                self._every = processes.gather_rows(self.ref_logps(processes.share(every)))
            return self._every
        requested = (every if rows is None else rows).tolist()
        missing = [row for row in dict.fromkeys(requested) if row not in self._reference]
        if missing:
            for row, logps in zip(missing, self.score_reference(torch.tensor(missing)), strict=True):
                self._reference[row] = logps
        return torch.stack([self._reference[row] for row in requested])

    def order(self, groups: NDArray[np.intp], by_length: bool) -> NDArray[np.intp]:
        """Return which groups of rows ``[groups, rows]`` this process reads, in their order or by their lengths."""
        own = processes.share(np.arange(len(groups)))
        return own[self.by_length(groups[own])] if by_length else own

    def by_length(self, groups: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the order of groups of rows ``[groups, rows]`` by the longest row of their prompt, int ``[groups]``.

        So the rows of one prompt stay side by side, where they may share it.
        """
        lengths = self.samples.attention_mask.sum(-1).cpu().numpy()[groups].max(axis=1)
        prompts = groups[:, 0] // self.per_prompt
        longest = np.zeros(len(self.prompts), dtype=np.intp)
        np.maximum.at(longest, prompts, lengths)
        return np.lexsort((prompts, longest[prompts]))

    @property
    def importance(self) -> Tensor | None:
        """``min(pi / pi_drawn, correction)`` of every token, ``[rows, T]``; None where there is no ``correction``.

        pi is the trainer's policy that the engine was to draw from (Ionides 2008, "Truncated Importance Sampling").
        """
        if self.correction is None or self.drawn_logps is None:
            return None
        return (self.samples.logps - self.drawn_logps).exp().clamp_max(self.correction)


@torch.no_grad()
def mean_kl(rollout: Rollout) -> float:
    """Return the mean log ratio to the reference, in nats per response.

    Over one response of each prompt: an unbiased estimate, also when an update chooses best and worst.
    """
    first = processes.share(torch.arange(0, len(rollout.responses), rollout.per_prompt))
    ratios = (rollout.samples.logps[first] - rollout.ref_logps(first)).sum(-1)
    return float(processes.gather_rows(ratios).mean())


@torch.no_grad()
def rollout_metrics(rollout: Rollout, names: Sequence[str]) -> dict[str, float]:
    """Return what every online method logs of a rollout: KL, length, rewards; ``names`` are the objectives'."""
    samples = rollout.samples
    lengths = samples.response_mask.sum(-1)
    rewards = zip(names, rollout.z.mean(axis=0), strict=True)
    return {
        "kl": mean_kl(rollout),
        "length": float(lengths.float().mean()),
        "unfinished": float((~samples.finished).float().mean()),
        **{f"reward/{name}": float(value) for name, value in rewards},
        "utility": float(rollout.utility.mean()),
        **({} if rollout.outside is None else {"outside": rollout.outside}),
        **({} if rollout.drawn_logps is None else _mismatch(rollout.drawn_logps, samples)),
    }


def _mismatch(drawn_logps: Tensor, samples: Samples) -> dict[str, float]:
    """Return how far the engine's log-probabilities of the tokens are from the trainer's: mean and largest, in nats."""
    gaps = (samples.logps - drawn_logps)[samples.response_mask].abs()
    return {"mismatch": float(gaps.mean()), "mismatch_max": float(gaps.max())}


class ValueHeads(torch.nn.Module):
    """One linear value head per reward on the policy's last hidden state; they start at 0.

    They learn to read the state and do not shape it: with their gradient in the adapters too, the critics' errors
    (large as soon as some answers are malformed) took the policy apart within 40 steps on the sandbox.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, heads)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[rows, T, width]`` -> values ``[rows, T, heads]``."""
        values: Tensor = self.linear(hidden.detach().float())
        return values


def sample_rollout(
    job: Job,
    lm: LanguageModel,
    actor: Actor,
    config: OnlineConfig,
    draw: Draw,
    phase: str,
    step: int,
    value_heads: ValueHeads | None = None,
) -> Rollout:
    """Sample and score responses for a step's prompts and preferences; the scorers see the bare prompts.

    Each process samples and scores those to its share of the prompts; the rollout holds those of all.
    """
    generation, stop = job.task.card.generation, job.task.card.template.stop
    rng, bare = drawn_prompts(job, config, phase, step)
    preferences = draw(rng, len(bare))
    numbers = torch.from_numpy(rng.random((len(bare) * config.samples, generation.max_new_tokens)))
    lm.model.eval()
    own = processes.share(np.arange(len(bare)))
    with torch.no_grad():
        samples = actor.sample(
            [bare[i] for i in own],
            preferences[own],
            numbers.reshape(len(bare), config.samples, -1)[own].flatten(0, 1),
            config.samples,
            value_heads is not None,
        )
        if value_heads is not None and samples.hidden is not None:  # vLLM gives none: they are read below
            samples = replace(samples, hidden=value_heads(samples.hidden))
    samples = of_all(samples, lm)
    values = samples.hidden
    job.meter.add_tokens_generated(samples.tokens)
    samples, engine = trim(lm, samples, stop), job.task.engine
    drawn_logps = None if engine is None else samples.logps
    if engine is not None:
        samples, values = _rescored(actor, samples, config, value_heads)
    elif lm.model.dtype != torch.float32:
        # Token by token, with a cache, half precision rounds differently from the one pass that is trained on
        # (measured: .04 nats a token, .8 % of PPO's ratios outside the clip before any update).
        samples = replace(samples, logps=policy_logps(actor, samples, config))
    answers = responses(lm, samples, stop)
    raw = job.score([prompt for prompt in bare for _ in range(config.samples)], answers)
    return Rollout(
        prompts=bare,
        preferences=preferences,
        per_prompt=config.samples,
        samples=samples,
        responses=answers,
        raw=raw,
        z=job.panel.z(raw, config.reward_cap),
        score_reference=lambda rows: _in_parts(partial(actor.reference_logps, samples), rows, config),
        step=step,
        drawn_logps=drawn_logps,
        correction=None if engine is None else engine.spec.correction,
        values=values,
    )


def drawn_prompts(job: Job, config: OnlineConfig, phase: str, step: int) -> tuple[np.random.Generator, list[str]]:
    """Return the bare prompts of a step, and the generator of what else is drawn for it."""
    prompts = job.task.prompts["train"]
    rng = np.random.default_rng(derive(job.seed, phase, step, "prompts"))
    chosen = rng.choice(len(prompts), size=config.batch, replace=len(prompts) < config.batch)
    return rng, [prompts[i] for i in chosen]


def of_all(samples: Samples, lm: LanguageModel) -> Samples:
    """Return the samples of all processes one after another."""
    if processes.count() == 1:
        return samples

    def on(device: Any, part: Samples) -> Samples:
        moved: Any = {name: None if value is None else value.to(device) for name, value in vars(part).items()}
        return Samples(**moved)

    return on(lm.device, joined(processes.gather(on("cpu", samples)), lm.pad))


def policy_logps(actor: Actor, samples: Samples, config: OnlineConfig) -> Tensor:
    """Return the samples' log-probabilities under the policy as it is now, ``[rows, T]``, without gradient.

    Each process computes those of its share of the rows.
    """
    own = processes.share(torch.arange(len(samples.input_ids)))
    return processes.gather_rows(_in_parts(lambda rows: actor.outputs(samples, rows).logps, own, config))


@torch.no_grad()
def _rescored(
    actor: Actor, samples: Samples, config: OnlineConfig, value_heads: ValueHeads | None
) -> tuple[Samples, Tensor | None]:
    """Return samples with the trainer's own log-probabilities, and what value heads make of its states."""
    rows = torch.split(torch.arange(len(samples.input_ids)), config.micro_batch)
    parts = [actor.outputs(samples, part, hidden=value_heads is not None) for part in rows]
    values = None if value_heads is None else torch.cat([value_heads(part.hidden) for part in parts])
    return replace(samples, logps=torch.cat([part.logps for part in parts])), values


@torch.no_grad()
def _in_parts(logps: Callable[[Tensor], Tensor], rows: Tensor, config: OnlineConfig) -> Tensor:
    return torch.cat([logps(part) for part in torch.split(rows, config.micro_batch)])
