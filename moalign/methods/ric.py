"""RiC: Rewards-in-Context.

Source: arXiv 2402.10207 (ICML 2024); facts of the public code YangRui2015/RiC are marked "code".

Offline stage: every scored response becomes a training row whose prompt carries the scores that it obtained,
``{x} <rm1_score> {z1} <rm2_score> {z2} {marker} {y}``, z standardised and printed with one decimal (code); loss on the
response only.

Online rounds (code): draw prompts with replacement and targets on the upper-right boundary of the reward box (u uniform
within the bounds; its smallest coordinate stays, every other one becomes its maximum); generate; drop collapsed
samples; score; relabel every sample with the scores it obtained; filter, each round by its own quantiles; continue
training on what passed, over all rounds, together with a random part of what passes of the offline set, by its own.

Inference (code): a preference becomes desired rewards by one of three maps, :func:`desired_rewards`.

Choices of ours: the bounds are the 0.5 % and 99.5 % quantiles of the calibration data's scores (the public code takes
the extremes of random normal draws, which change from run to run); the "smallest coordinate" is smallest relative to
its bounds; standardisation uses the task's frozen normaliser instead of the training set's own mean and deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moalign.core.amounts import Amount, Amounts
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, SftConfig

if TYPE_CHECKING:
    from moalign.core.records import Response
    from moalign.policies.policy import Policy

MapName = Literal["l2", "linf", "linear"]


class Config(CostHints):
    """Settings of RiC."""

    sampled_by: ClassVar = ("online_prompts",)
    repeated_by: ClassVar = {"online": "online_rounds"}
    offline: SftConfig = SftConfig(steps=20_000, batch=8, lr=1.414e-4, schedule="linear", weight_decay=0.01)
    online: SftConfig = SftConfig(steps=4_000, batch=8, lr=1e-5, schedule="constant", weight_decay=0.01)
    """Each round's training."""
    online_rounds: int = Field(default=1, ge=0)
    online_prompts: int = Field(default=20_000, ge=1)
    """Prompts drawn in each round."""
    offline_part: int = Field(default=10_000, ge=0)
    """Offline rows that are mixed in, drawn without replacement from those that pass the same filter; all of them where
    they are fewer."""
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    filter: Literal["any_quantile", "nondominated"] = "any_quantile"
    """any_quantile (code): some z_i reaches its own quantile; nondominated (paper): the first layers."""
    quantile: float = Field(default=0.7, ge=0, lt=1)
    keep_share: float = Field(default=0.3, gt=0, le=1)
    """nondominated: layers are kept until they hold at least this share of the samples."""
    preference_map: MapName = "l2"

    def responses_sampled(self, task: Amounts) -> int:
        """See :class:`CostHints`."""
        return self.online_rounds * self.online_prompts

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`."""
        return task.scored()


class Ric:
    """One policy, steered by the desired rewards written into the prompt."""

    name: ClassVar[str] = "ric"
    summary: ClassVar[str] = "SFT on scores in the prompt, then on its own filtered samples (arXiv 2402.10207)"
    capabilities: ClassVar[Capabilities] = Capabilities(family="offline", needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "offline": {"steps": 3, "batch": 4, "max_tokens": 128},
        "online": {"steps": 2, "batch": 4, "max_tokens": 128},
        "online_prompts": 24,
        "offline_part": 24,
    }

    def train(self, job: Job) -> None:
        """Train both stages; resumes at the stage and step that an interruption left."""
        from moalign.training.grid import one_adapter
        from moalign.training.sft import train_sft

        config: Config = job.config
        scored = job.scored()
        z = job.panel.z(scored.raw)
        with one_adapter(job) as lm:
            if not job.stage_done("offline", lm):
                texts = [job.task.renderer.scores(p, s) for p, s in zip(scored.prompts, z, strict=True)]
                train_sft(job, lm, texts, scored.responses, config.offline, "offline")
                job.finish_stage("offline", lm)
            for number in range(config.online_rounds):
                stage = f"round-{number + 1}"
                if not job.stage_done(stage, lm):
                    train_sft(job, lm, *self._round_rows(job, lm, scored, z, number), config.online, stage)
                    job.finish_stage(stage, lm)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained model asked for the rewards that the preference maps to."""
        from functools import partial

        from moalign.policies.policy import Policy
        from moalign.policies.prompted import trained

        desired = desired_rewards(preference, context.task.normaliser.z_bounds(), context.config.preference_map)
        return Policy(trained(context), partial(context.task.renderer.scores, scores=desired.tolist()))

    def _round_rows(self, job: Job, lm: Any, scored: Any, z: Matrix, number: int) -> tuple[list[str], list[Response]]:
        """Return the training rows of a round: filtered samples of each round so far and of the offline set.

        Every set is filtered by itself: a later round's samples are better, and a threshold over all of them would
        drop the first ones. The offline part is drawn from the rows that pass, so that it is as large as asked for.
        """
        from moalign.core.seeds import derive
        from moalign.tasks.responses import from_columns

        config: Config = job.config
        columns = [f"z:{name}" for name in job.task.names]
        render = job.task.renderer.scores
        texts: list[str] = []
        responses: list[Response] = []
        samples = collapsed = 0
        for earlier in range(number + 1):
            table = self._samples(job, lm, earlier)
            samples, collapsed = samples + len(table), collapsed + int(table["collapsed"].iloc[0])
            own = table[columns].to_numpy()
            passed = keep(own, config)
            texts += [render(p, s) for p, s in zip(table["prompt"][passed], own[passed], strict=True)]
            responses += from_columns(table[passed])
        fit = np.flatnonzero(keep(z, config))
        rng = np.random.default_rng(derive(job.seed, "ric", number, "offline part"))
        mixed = rng.permutation(fit)[: config.offline_part].tolist()
        job.notes[f"round-{number + 1}"] = {
            "samples": samples,
            "kept": len(texts),
            "offline_passed": len(fit),
            "offline_kept": len(mixed),
            "collapsed": collapsed,
        }
        texts += [render(scored.prompts[i], z[i]) for i in mixed]
        return texts, responses + [scored.responses[i] for i in mixed]

    def _samples(self, job: Job, lm: Any, number: int) -> Any:
        """Return a round's own samples with the scores they obtained; sampled once and kept in the run."""
        import pandas as pd

        from moalign.core.progress import counted
        from moalign.core.seeds import derive
        from moalign.lm.generator import ModelGenerator, shared
        from moalign.lm.quality import collapse
        from moalign.policies import kept_samples
        from moalign.policies.policy import Policy
        from moalign.tasks.responses import columns

        name, stage = f"samples-{number + 1}", f"sampling-{number + 1}"
        if job.stage_done(stage):
            kept_samples.forget(job, stage)  # should a kill have come between the two
            return job.run.read_table(name)
        config: Config = job.config
        rng = np.random.default_rng(derive(job.seed, "ric", number, "targets"))
        pool = job.task.prompts["train"]
        prompts = [pool[i] for i in rng.integers(len(pool), size=config.online_prompts)]
        targets = boundary_targets(rng, job.task.normaliser.z_bounds(), len(prompts))
        texts = [job.task.renderer.scores(p, t) for p, t in zip(prompts, targets, strict=True)]
        limits = job.task.sampling(derive(job.seed, "ric", number, "samples"), config.temperature)
        limits = replace(limits, top_p=config.top_p)
        advance = counted(job.progress, stage, len(texts))
        # The texts are rendered already: each has its own target.
        policy = Policy(shared(ModelGenerator(lm, "policy")), lambda text: text)
        records, tokens = kept_samples.sampled(job, stage, policy, texts, limits, advance)
        job.meter.add_tokens_generated(tokens)
        responses, short = [record.text for record in records], job.task.short_below
        usable = [i for i, ids in enumerate(job.task.tokens(responses)) if not collapse(ids, short)]
        if not usable:
            raise RequestError(
                f"{stage}: all {len(responses)} samples collapsed (too short or repeating); "
                "train the offline stage longer"
            )
        z = job.panel.z(job.score([prompts[i] for i in usable], [responses[i] for i in usable]))
        table = pd.DataFrame({"prompt": [prompts[i] for i in usable], **columns([records[i] for i in usable])})
        for column, objective in enumerate(job.task.names):
            table[f"z:{objective}"] = z[:, column]
        table["collapsed"] = len(responses) - len(usable)
        job.run.write_table(name, table)
        job.finish_stage(stage)
        kept_samples.forget(job, stage)
        return table


def boundary_targets(rng: np.random.Generator, bounds: Matrix, count: int) -> Matrix:
    """Draw targets on the upper-right boundary of the reward box.

    u is uniform within ``bounds`` ``[objectives, 2]``; the coordinate that is smallest relative to its bounds
    stays, every other one becomes its maximum. Returns ``[count, objectives]``.
    """
    relative = rng.random((count, len(bounds)))
    smallest = relative.argmin(axis=1)
    relative_kept = np.ones_like(relative)
    every = np.arange(count)
    relative_kept[every, smallest] = relative[every, smallest]
    return bounds[:, 0] + relative_kept * (bounds[:, 1] - bounds[:, 0])


def desired_rewards(preference: Sequence[float], bounds: Matrix, name: MapName) -> Matrix:
    """Map a preference to desired rewards ``[objectives]`` within ``bounds`` ``[objectives, 2]`` (code).

    ``l2``: ``lo_i + w_i/||w||_2 * (hi_i - lo_i)``; ``linf``: the largest w_i gets hi_i, the others
    ``lo_i + min(m * w_i, 1) * (hi_i - lo_i)``; ``linear``: ``lo_i + w_i * (hi_i - lo_i)``.
    """
    w = np.asarray(preference, dtype=np.float64)
    if name == "l2":
        share = w / np.linalg.norm(w)
    elif name == "linf":
        share = np.where(w == w.max(), 1.0, np.minimum(len(w) * w, 1.0))
    else:
        share = w
    return bounds[:, 0] + share * (bounds[:, 1] - bounds[:, 0])


def keep(z: Matrix, config: Config) -> NDArray[np.bool_]:
    """Return which rows of one set ``[rows, objectives]`` pass the filter, ``[rows]``; see :class:`Config`."""
    if config.filter == "any_quantile":
        # More than its least value, too: of an objective that is mostly 0 every sample would reach a quantile of 0.
        passes = (z >= np.quantile(z, config.quantile, axis=0)) & (z > z.min(axis=0))
        return np.asarray(passes.any(axis=1)) if passes.any() else np.ones(len(z), dtype=bool)
    from moalign.pareto.front import layers

    layer = layers(z)
    sizes = np.bincount(layer).cumsum()
    last = int(np.searchsorted(sizes, int(np.ceil(config.keep_share * len(z)))))
    return np.asarray(layer <= last)
