"""Users who show what they prefer by labelled pairs, and the encoder that reads a preference off them.

A user has a preference w and prefers the first of two responses with probability ``sigma(sharpness * w . (z(y1) -
z(y2)))``. The encoder reads texts alone (:func:`embeddings`); the rewards z serve to label, and as the decoder of its
training (:mod:`moalign.losses.neural_process`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.core.seeds import derive
from moalign.lm.finite import FiniteCheck
from moalign.losses.neural_process import elbo_loss, mean_weights, posterior, scale_of
from moalign.tasks.responses import by_prompt, shown
from moalign.training.reference import mean_states, rows_of

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.tasks.task import Task
    from moalign.training.job import Job, RunContext

PHASE = "encoder"
"""Name of the encoder's training in record and metrics, and of the file with its weights."""
DRAWS = 64
"""Draws of z, with as many mirrored ones, that E[w] is the mean over."""
AT_ONCE = 2048
"""Users that are read at once."""

Picks = NDArray[np.intp]
"""Rows of a pool."""


@dataclass(frozen=True)
class Pool:
    """Scored responses of which users compare two at a time."""

    prompts: list[str]
    responses: list[Response]
    z: Matrix
    """Normalised rewards, ``[rows, objectives]``."""
    pairs: Picks
    """All pairs of different responses to one prompt, ``[pairs, 2]``."""

    @classmethod
    def of(cls, prompts: Sequence[str], responses: Sequence[Response], z: Matrix) -> Pool:
        """Return the pool of responses to prompts, ``[rows]``."""
        texts, groups = shown(responses), by_prompt(prompts).values()
        pairs = [(a, b) for group in groups for a, b in combinations(group, 2) if texts[a] != texts[b]]
        return cls(list(prompts), list(responses), z, np.asarray(pairs, dtype=np.intp).reshape(-1, 2))

    def labelled(
        self, preferences: Matrix, count: int, sharpness: float, rng: np.random.Generator
    ) -> tuple[Picks, Picks]:
        """Return ``count`` different pairs of each user as they label them: chosen and rejected, ``[users, count]``."""
        drawn = [rng.choice(len(self.pairs), size=count, replace=False) for _ in preferences]
        first, second = np.moveaxis(self.pairs[np.stack(drawn)], -1, 0)
        chance = self.chance(preferences[:, None], first, second, sharpness)
        wins = rng.random(chance.shape) < chance
        return np.where(wins, first, second), np.where(wins, second, first)

    def chance(self, preferences: Matrix, first: Picks, second: Picks, sharpness: float) -> Matrix:
        """Return the probability that users prefer ``first`` to ``second``; all shapes broadcast."""
        gaps = (preferences * (self.z[first] - self.z[second])).sum(-1)
        return np.asarray(1.0 / (1.0 + np.exp(-sharpness * gaps)))


def scored_pool(job: Job, per_prompt: int, needed: int) -> Pool:
    """Return the training split's scored responses; RequestError where they make fewer than ``needed`` pairs."""
    scored = job.scored(per_prompt)
    pool = Pool.of(scored.prompts, scored.responses, job.panel.z(scored.raw))
    if len(pool.pairs) < needed:
        raise RequestError(
            f"context and targets: a user labels {needed} pairs, but the scored responses of task "
            f"{job.task.card.name} make {len(pool.pairs)} pairs of different responses (per_prompt: {per_prompt}); "
            "allowed: fewer pairs, or more responses (--set task.pool.per_prompt=8)"
        )
    return pool


def embeddings(
    lm: LanguageModel,
    task: Task,
    prompts: Sequence[str],
    responses: Sequence[Response | str],
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the base's last hidden states after bare prompts, averaged over each response's tokens, ``[rows, width]``.

    Raises RequestError for a response without tokens.
    """
    rows = rows_of(lm, map(task.renderer.plain, prompts), responses, max_tokens)
    for number, (_, tokens) in enumerate(rows):
        if not tokens:
            raise RequestError(f"response {number}: it has no tokens")
    return mean_states(lm, rows, progress)


class Encoder(nn.Module):
    """Reads a user's latent off labelled pairs: q(z|C), a diagonal Gaussian.

    What a pair shifts is odd and how precise it is even under swapping the labels: a user of the opposite taste, who
    labels everything the other way round, has the mirrored latent.
    """

    centre: Tensor
    spread: Tensor
    noise: Tensor

    def __init__(self, inputs: int, objectives: int, width: int, alpha: float, seed: int = 0) -> None:
        """Make an encoder of embeddings ``[inputs]``; its first weights depend on ``seed`` alone."""
        super().__init__()
        self.scale = scale_of(alpha)
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.register_buffer("noise", torch.randn(DRAWS, objectives, generator=torch.Generator().manual_seed(DRAWS)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))
            self.shift = nn.Linear(width, objectives, bias=False)
            self.precision = nn.Linear(width, objectives)
        nn.init.constant_(self.precision.bias, -3.0)  # a pair says little: it starts with a precision of 0.05

    def standardise(self, features: Tensor) -> None:
        """Take the scale of inputs from the embeddings of training, ``[rows, inputs]``."""
        self.centre, self.spread = features.mean(0), features.std(0).clamp_min(1e-6)

    def forward(self, chosen: Tensor, rejected: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of q(z|C), ``[users, objectives]``.

        From embeddings ``[users, pairs, inputs]`` of the pairs' responses; ``known`` ``[users, pairs]``: those in C.
        """
        inner = [self.body((part - self.centre) / self.spread) for part in (chosen, rejected)]
        difference = inner[0] - inner[1]
        precisions = nn.functional.softplus(self.precision(difference.abs()))
        return posterior(self.shift(difference), precisions, known)

    @torch.no_grad()
    def read(self, features: Tensor, chosen: Picks, rejected: Picks, known: NDArray[np.bool_]) -> Matrix:
        """Return E[w] of users, ``[users, objectives]``: chosen and rejected are rows of ``features``."""
        parts = []
        for at in range(0, len(chosen), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            mean, variance = self(features[chosen[part]], features[rejected[part]], torch.from_numpy(known[part]))
            parts.append(mean_weights(mean, variance, self.scale, self.noise))
        return np.asarray(torch.cat(parts).double().numpy())


def train_encoder(job: Job, config: Any, pool: Pool, features: Tensor) -> Encoder:
    """Return an encoder trained on simulated users, new ones at every step (NP-BTL).

    ``config`` is that of few-shot steering, ``features`` are the pool's :func:`embeddings`.

    Raises WorkError when training diverges.
    """
    from moalign.training.preference_draws import independent

    own, objectives = config.encoder, pool.z.shape[1]
    encoder = Encoder(features.shape[1], objectives, own.width, config.alpha, derive(job.seed, PHASE, "start"))
    encoder.standardise(features)
    z = torch.as_tensor(config.sharpness * pool.z, dtype=torch.float32)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=own.lr)
    draw = independent(job.given_preferences, objectives, config.alpha)
    check = FiniteCheck(job.run.record.method, PHASE, own.lr, clip=1.0)
    job.run.truncate_metrics(PHASE, 0)
    for step in range(1, own.steps + 1):
        rng = np.random.default_rng(derive(job.seed, PHASE, step))
        noise = torch.randn(
            own.draws, own.users, objectives, generator=torch.Generator().manual_seed(derive(job.seed, "z", step))
        )
        chosen, rejected = pool.labelled(draw(rng, own.users), config.context + config.targets, config.sharpness, rng)
        context = torch.from_numpy(first(rng.integers(0, config.context + 1, size=own.users), chosen.shape[1]))
        every = context.clone()
        every[:, config.context :] = True
        pairs = features[chosen], features[rejected]
        gaps = (z[chosen] - z[rejected])[:, config.context :]
        check.step = step
        loss, metrics = elbo_loss(encoder(*pairs, every), encoder(*pairs, context), gaps, encoder.scale, noise)
        check.number("loss", float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(encoder.parameters(), check.clip)
        for group in optimizer.param_groups:
            group["lr"] = own.lr * (1 - (step - 1) / own.steps)
        optimizer.step()
        if step % config.log_every == 0 or step == own.steps:
            numbers = {name: float(value) for name, value in metrics.items()}
            job.run.log(step, PHASE, loss=float(loss.detach()), **numbers, **job.meter.cost())
        job.progress(PHASE, step, own.steps)
    check.weights({PHASE: encoder.state_dict()})
    return encoder


def first(sizes: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Return which of ``count`` pairs each user shows, bool ``[users, count]``: the first ``sizes`` ``[users]``."""
    return np.arange(count)[None] < sizes[:, None]


def encoder_of(context: RunContext) -> Encoder:
    """Return a finished run's encoder."""
    if PHASE not in context.cache:
        kept, config = context.run.load_tensors(PHASE), context.config
        encoder = Encoder(len(kept["centre"]), kept["noise"].shape[1], config.encoder.width, config.alpha)
        encoder.load_state_dict(kept)
        context.cache[PHASE] = encoder
    found: Encoder = context.cache[PHASE]
    return found
