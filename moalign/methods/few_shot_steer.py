"""Few-shot steering: a user's preference is read off a few pairs they labelled; one policy answers for it.

Source: "Few-shot Steerable Alignment: Adapting Rewards and LLM Policies with Neural Processes", arXiv 2412.13998; its
formulas as the authors' public code has them (kasia-kobalczyk/few-shot-steerable-alignment, "code").

Design, in one paragraph. A user has a preference w that nobody states and labels pairs by Bradley-Terry on ``w . r``.
What is learned is a neural process over such users: an encoder reads k labelled pairs C, from their texts alone, into a
Gaussian ``q(z|C)`` of a latent z. It is trained as a reward model (NP-BTL) on users simulated from the task's scored
responses, each with k of 0 to ``context`` pairs shown and ``targets`` others T to foretell, by the bound ``E_q(z|C,T)
[log p(T|z)] - KL(q(z|C,T) || q(z|C))``; then the policy is trained by DPO on pairs of such users, each prompt with what
the encoder read of its user (NP-DPO): ``-log sigma(beta (D(y_w) - D(y_l)))``, D the log-ratio to the base given z. The
latent is the preference itself, ``w = softmax(scale z)``, and reaches policy and base as all preferences do, written
into the prompt, as its mean E[w | C]. So ``--prefs`` states w, and ``--user`` shows it (:meth:`FewShotSteer.infer`).

Where this differs, and what the paper leaves open (choices of ours):

* latent and decoder: the paper's z is free, a network decodes it with the response's embedding into a reward, and
  shifts and scales every hidden layer of the policy (FiLM). Here ``r(x, y | z) = w(z) . r(x, y)`` in the task's own
  rewards, which only training sees. Of all that C says, an answer of most expected ``w . r`` depends on E[w | C] alone.
  A policy near its base answers a stated w less sharply, so asking for E[w | C] is a choice, not the best question to
  it (results/fewshot.md: even the exact E[w | C] is behind logistic regression's w at 4 pairs and more). A latent with
  a meaning serves ``--prefs``, every generator and export as they are. The scale is fixed, that of the users'
  Dirichlet: a trial without a record, with a learned map from z to w and pairs whose two texts were just joined, read
  nothing (divergence 0);
* the gradient of DPO does not reach the encoder, since a prompt is text; the code trains both together;
* aggregation: Gaussian factors that add up, odd in the labels. The code sums pairs' codes, after attention; here no
  pairs are exactly the prior and more pairs than in training can be read;
* embeddings: the base's last hidden states, averaged over the response; the code takes the last token's, of a larger
  model;
* the bound is the usual one of neural processes. The code draws z from q(z|C) and turns the divergence round, or, for
  its language models, has one z without spread;
* ``told``: the share of DPO's rows whose user states w. Few pairs never say that a weight is 0 or 1, and a policy must
  have read what it is asked. Labels of DPO's pairs are expectations over the user's choice.

``steps: 0`` is NP-BTL alone: the base, asked for what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from moalign.config.strict import Strict
from moalign.core.amounts import Amount, Amounts
from moalign.core.preferences import FINEST, Preference, on_grid
from moalign.core.records import Pair
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, DpoStage

if TYPE_CHECKING:
    from moalign.core.arrays import Matrix
    from moalign.policies.policy import Policy
    from moalign.training.users import Pool

PHASE = "dpo"
"""Name of the policy's training in record, metrics and checkpoints."""
ASKED = "asked"
"""File with what the policy is asked for in each of its rows, ``[rows, objectives]``."""


class EncoderConfig(Strict):
    """Settings of the encoder and its training."""

    steps: int = Field(default=500, ge=1)
    users: int = Field(default=64, ge=1)
    """Users of a step, new ones each time."""
    draws: int = Field(default=4, ge=1)
    """Draws of z for each."""
    width: int = Field(default=64, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    """At first; it falls to 0 linearly."""


class Config(DpoStage, CostHints):
    """Settings of few-shot steering; those of DPO are inherited."""

    context: int = Field(default=8, ge=1)
    """Most pairs that a user of training shows."""
    targets: int = Field(default=8, ge=1)
    """Pairs of each that the encoder's training foretells."""
    encoder: EncoderConfig = EncoderConfig()
    told: float = Field(default=0.5, ge=0, le=1)
    """Share of the policy's rows whose user states the preference in place of showing pairs."""
    alpha: float = Field(default=1.0, gt=0)
    """Dirichlet concentration of the users' preferences, and so of what is believed before any pair was seen."""
    resolution: int | None = Field(default=10, ge=1)
    """Preferences are stated, and read, in steps of one over this; None: as they are."""
    sharpness: float = Field(default=1.0, gt=0)
    """How sure users are: of a pair whose normalised rewards differ by 1 the log-odds of their choice."""
    per_prompt: int = Field(default=16, ge=2)
    """Most scored responses of a prompt that pairs are made of."""

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`."""
        return task.scored(self.per_prompt)


class FewShotSteer:
    """One policy for every preference, and an encoder that reads one off labelled pairs."""

    name: ClassVar[str] = "few-shot-steer"
    summary: ClassVar[str] = "reads a preference off a user's labelled pairs, answers by DPO (arXiv 2412.13998)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline", infers=True, whole="its encoder of users is trained by one process"
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "steps": 2,
        "batch": 4,
        "max_tokens": 128,
        "per_prompt": 2,
        "encoder": {"steps": 2, "users": 4, "width": 8},
    }

    def train(self, job: Job) -> None:
        """Train the encoder, then the policy; resumes at the stage, and of the policy at the step."""
        from moalign.training.grid import one_adapter
        from moalign.training.users import scored_pool

        config: Config = job.config
        pool = scored_pool(job, config.per_prompt, config.context + config.targets)
        learn_to_read(job, pool)
        with one_adapter(job) as lm:
            if config.steps:
                learn_to_answer(job, lm, pool, job.run.load_tensors(ASKED)[ASKED].numpy())

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference)

    def infer(self, context: RunContext, pairs: Sequence[Pair]) -> Preference:
        """Return the preference that a user's pairs show: E[w], to the resolution. No pairs: that of any user."""
        from moalign.training.users import embeddings, encoder_of

        task, config, encoder = context.task, context.config, encoder_of(context)
        prompts = [pair.prompt for pair in pairs] * 2
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        features = encoder.centre[None]
        if pairs:
            features = embeddings(task.language_model, task, prompts, texts, config.max_tokens)
        chosen, rejected = np.arange(len(texts)).reshape(2, 1, -1)
        read = encoder.read(features, chosen, rejected, np.ones((1, len(pairs)), dtype=bool))
        return tuple(on_grid(read, config.resolution or FINEST)[0].tolist())


def learn_to_read(job: Job, pool: Pool) -> None:
    """Train the encoder and read the users of the policy's rows with it; a stage, which starts anew when it broke off.

    The run gets the encoder, and :data:`ASKED`.
    """
    from functools import partial

    import torch

    from moalign.training import users

    config: Config = job.config
    if job.stage_done(users.PHASE):
        return
    lm, progress = job.task.language_model, partial(job.progress, "reading")
    features = users.embeddings(lm, job.task, pool.prompts, pool.responses, config.max_tokens, progress)
    encoder = users.train_encoder(job, config, pool, features)
    rng, w, _ = drawn(job, pool)
    asked = w
    if len(w):
        chosen, rejected = pool.labelled(w, config.context, config.sharpness, rng)
        shown = users.first(rng.integers(0, config.context + 1, size=len(w)), config.context)
        read = encoder.read(features, chosen, rejected, shown)
        read = on_grid(read, config.resolution) if config.resolution else read
        if job.given_preferences:  # what is held out must not be asked for, also when it is read off pairs
            given = np.asarray(job.given_preferences, dtype=float)
            read = given[np.square(read[:, None] - given).sum(-1).argmin(1)]
        asked = np.where(rng.random((len(w), 1)) < config.told, w, read)
    job.run.save_tensors(users.PHASE, encoder.state_dict())
    job.run.save_tensors(ASKED, {ASKED: torch.from_numpy(asked)})
    job.notes["pairs"] = {"prompts": len(set(pool.prompts)), "pairs": len(pool.pairs), "users": len(w)}
    job.finish_stage(users.PHASE)


def drawn(job: Job, pool: Pool) -> tuple[np.random.Generator, Matrix, Matrix]:
    """Return a generator, and of the policy's rows the users' preferences ``[rows, m]`` and the pairs ``[rows, 2]``."""
    from moalign.core.seeds import derive
    from moalign.training.preference_draws import independent

    config, count = job.config, job.config.steps * job.config.batch
    rng = np.random.default_rng(derive(job.seed, PHASE, "users"))
    w = independent(job.given_preferences, pool.z.shape[1], config.alpha, config.resolution)(rng, count)
    return rng, w, pool.pairs[rng.integers(len(pool.pairs), size=count)]


def learn_to_answer(job: Job, lm: Any, pool: Pool, asked: Matrix) -> None:
    """Train the active adapter of ``lm`` by DPO, a new user and pair in every row."""
    from moalign.training.offline_dpo import encode_pairs, train_dpo

    config: Config = job.config
    _, w, pairs = drawn(job, pool)
    first, second = pairs.T
    chance = pool.chance(w, first, second, config.sharpness)
    better, worse = np.where(chance < 0.5, second, first), np.where(chance < 0.5, first, second)
    texts = [job.task.renderer.preference(pool.prompts[x], v) for x, v in zip(first, asked.tolist(), strict=True)]
    chosen, rejected = ([pool.responses[row] for row in side] for side in (better, worse))
    rows = encode_pairs(job, lm, texts, chosen, rejected, config.max_tokens, np.maximum(chance, 1 - chance))
    job.notes["diagnostics"] = train_dpo(job, lm, rows, config, PHASE)
