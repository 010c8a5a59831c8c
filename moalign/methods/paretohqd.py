"""ParetoHqD: supervised fine-tuning on few responses of high quality, for each preference its own.

Source: arXiv 2504.16628 (AAAI 2026).

A preference w is a direction: the ray from the ideal point r_max of the scored responses through the compromise point
``W = r_min + w * (r_max - r_min)`` (paper; :mod:`moalign.pareto.directions`). The responses are sorted into
non-dominated layers; the first layers are the pool. Then (paper)

* stage 1: for each preference, SFT of the base on the k = 100 responses of the pool nearest to its ray;
* augmentation: the stage-1 models nearest to each corner of the grid, and the balanced one, answer 10,000 prompts
  each; the answers are scored and sorted again;
* stage 2: each stage-1 model is trained on with the k/2 nearest of those answers, against over-fitting to 100 samples.

The loss is the response's token log-likelihood; the prompt carries no scores and no preference.

Choices of ours, where the paper is silent: distances are measured after the bounds (0.1 % and 99.9 % quantiles) became
0 and 1; layers are added until the pool holds ``min_pool`` responses; a set takes at most one response of a prompt;
stage 2 has 100 steps and bounds of its own; answers are sampled as RiC's, and collapsed ones are counted by cause and
left out; LoRA and learning rate are RiC's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from moalign.core.amounts import Amount, Amounts
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference, label
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, SftConfig

if TYPE_CHECKING:
    import pandas as pd

    from moalign.core.arrays import Matrix
    from moalign.lm.language_model import LanguageModel
    from moalign.pareto.directions import Pool, Rows
    from moalign.policies.policy import Policy
    from moalign.tasks.responses import Scored

FIRST, SECOND = "stage1", "stage2"
"""The first names its walk over the grid; the second's walk bears the usual name, since its adapters answer."""
AUGMENT = "augment"


class Config(CostHints):
    """Settings of ParetoHqD."""

    sampled_by: ClassVar = ("augment_prompts",)
    k: int = Field(default=100, ge=2)
    """Responses of a preference's first set; its second set has half as many."""
    min_pool: int | None = Field(default=None, ge=1)
    """Least number of responses in the first layers that sets are taken from; None: max(2000, 20 * set size)."""
    first: SftConfig = SftConfig(steps=200, batch=8, lr=1.414e-4, schedule="linear", weight_decay=0.01)
    second: SftConfig = SftConfig(steps=100, batch=8, lr=1.414e-4, schedule="linear", weight_decay=0.01)
    """``steps: 0`` leaves out augmentation and stage 2."""
    augment_prompts: int = Field(default=10_000, ge=1)
    """Prompts that each representative answers; repeated passes when the task has fewer."""
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1)

    def responses_sampled(self, task: Amounts) -> int:
        """Each representative, nearest to a corner or to equal weights, answers every prompt drawn."""
        return (task.objectives + 1) * self.augment_prompts if self.second.steps else 0

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`."""
        return task.scored()


class ParetoHqd:
    """One adapter for each preference, trained on the best responses in its direction."""

    name: ClassVar[str] = "paretohqd"
    summary: ClassVar[str] = "SFT per preference on the few non-dominated responses near its ray (arXiv 2504.16628)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline", one_policy=False, steerable=False, needs_online_rewards=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "k": 8,
        "min_pool": 24,
        "first": {"steps": 2, "batch": 4, "max_tokens": 128},
        "second": {"steps": 2, "batch": 4, "max_tokens": 128},
        "augment_prompts": 48,
    }

    def train(self, job: Job) -> None:
        """Train both stages of every preference; resumes at the stage, preference and step of an interruption."""
        from moalign.pareto.directions import nearest
        from moalign.runs import atomic
        from moalign.training.grid import adapter_of, each_preference

        config: Config = job.config
        lm = job.task.language_model
        scored = job.scored()
        _check(job, scored)
        first = pool_of(job, scored, config.k, FIRST)
        for lm, w, stage in each_preference(job, FIRST):
            _train(job, lm, scored, nearest(first, w, config.k), config.first, stage, FIRST)
        answers, second = scored, first
        if config.second.steps:
            answers = self._augment(job, lm)
            second = pool_of(job, answers, config.k // 2, SECOND)
        for lm, w, stage in each_preference(job):
            _put_first(job, lm, list(job.preferences).index(w))
            if config.second.steps:
                _train(job, lm, answers, nearest(second, w, config.k // 2), config.second, stage, SECOND)
        for index in range(len(job.preferences)):  # only the second stage needed them
            atomic.remove_directory(job.run.path / adapter_of(index, FIRST))

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for a preference; raises RequestError for one that was not trained."""
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)

    def _augment(self, job: Job, lm: LanguageModel) -> Scored:
        """Return the scored answers of the representative stage-1 models; sampled once and kept in the run."""
        from moalign.lm import adapters
        from moalign.policies import kept_samples
        from moalign.tasks.responses import Scored, from_columns

        if not job.stage_done(AUGMENT):
            adapters.attach(lm, job.policy_spec.lora, job.seed)
            table, causes = self._answers(job, lm)
            adapters.drop(lm)
            job.notes[AUGMENT] = causes
            job.run.write_table(AUGMENT, table)
            job.finish_stage(AUGMENT)
        for index in range(len(job.preferences)):
            kept_samples.forget(job, f"{AUGMENT}-{index}")
        table = job.run.read_table(AUGMENT)
        raw = table[[f"raw:{name}" for name in job.task.names]].to_numpy(dtype=np.float64)
        return Scored(table["prompt"].tolist(), from_columns(table), raw)

    def _answers(self, job: Job, lm: LanguageModel) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Let the representatives answer; returns what did not collapse, with raw scores, and what did, by cause."""
        import pandas as pd

        from moalign.core.progress import counted
        from moalign.core.seeds import derive
        from moalign.lm.adapters import ADAPTER
        from moalign.lm.generator import ModelGenerator, shared
        from moalign.lm.quality import collapse, collapse_report
        from moalign.pareto.directions import representatives
        from moalign.policies import kept_samples
        from moalign.policies.policy import Policy
        from moalign.tasks.responses import columns
        from moalign.training.callbacks import order

        config: Config = job.config
        chosen = representatives(job.preferences)
        pool = job.task.prompts["train"]
        drawn = order(len(pool), config.augment_prompts, 1, derive(job.seed, "paretohqd", "prompts"))
        prompts = [pool[i] for i in drawn]
        limits = job.task.sampling(derive(job.seed, "paretohqd", "answers"), config.temperature)
        limits = replace(limits, top_p=config.top_p)
        policy = Policy(shared(ModelGenerator(lm, ADAPTER)), job.task.renderer.plain)
        parts, causes = [], {}
        advance = counted(job.progress, "augment: stage-1 models answer", len(chosen) * len(prompts))
        for index in chosen:
            _put_first(job, lm, index)
            records, sampled = kept_samples.sampled(job, f"{AUGMENT}-{index}", policy, prompts, limits, advance)
            job.meter.add_tokens_generated(sampled)
            responses = [record.text for record in records]
            tokens, short = job.task.tokens(responses), job.task.short_below
            causes[label(job.preferences[index])] = {"answers": len(responses), **collapse_report(tokens, short)}
            usable = [i for i, ids in enumerate(tokens) if not collapse(ids, short)]
            parts.append(
                pd.DataFrame({"prompt": [prompts[i] for i in usable], **columns([records[i] for i in usable])})
            )
        table = pd.concat(parts, ignore_index=True).drop_duplicates(["prompt", "response"], ignore_index=True)
        if table.empty:
            raise RequestError(
                f"{AUGMENT}: all answers of the stage-1 models collapsed (too short or repeating); train stage 1 with "
                "fewer steps (first.steps) or a smaller rate (first.lr)"
            )
        raw = job.score(table["prompt"].tolist(), table["response"].tolist())
        for column, name in enumerate(job.task.names):
            table[f"raw:{name}"] = raw[:, column]
        return table, causes


def pool_of(job: Job, scored: Scored, k: int, stage: str) -> Pool:
    """Return the first layers of scored responses that sets of k are taken from, and note their size."""
    from moalign.pareto.directions import Pool

    least = job.config.min_pool or max(2000, 20 * k)
    what = "the scored responses" if stage == FIRST else "stage 2, the answers of the stage-1 models"
    pool = Pool.of(scored.raw, scored.prompts, k, least, job.task.names, f"{job.task.card.name}: {what}")
    sizes = {"responses": len(scored.prompts), "pool": len(pool.rows), "layers": pool.layers}
    job.notes["pools"] = {**job.notes.get("pools", {}), stage: sizes}
    return pool


def _train(
    job: Job, lm: LanguageModel, scored: Scored, chosen: tuple[Rows, Matrix], settings: SftConfig, stage: str, part: str
) -> None:
    """Train the active adapter on some rows of ``scored``, ``chosen`` with their distances to the preference's ray.

    Notes the mean loss over the last tenth of the logged steps, and what rewards the set itself obtained.
    """
    from moalign.training.sft import train_sft

    rows, apart = chosen
    texts = [job.task.renderer.plain(scored.prompts[i]) for i in rows]
    train_sft(job, lm, texts, [scored.responses[i] for i in rows], settings, stage)
    losses = [float(line["loss"]) for line in job.run.metrics() if line["phase"] == stage and line.get("loss")]
    last = losses[-max(1, len(losses) // 10) :]
    means = job.panel.unit(scored.raw[rows]).mean(axis=0)
    job.notes["diagnostics"] = {
        **({f"{part}_loss": sum(last) / len(last)} if last else {}),
        f"{part}_distance": float(apart.mean()),
        **{f"{part}_set/{name}": float(mean) for name, mean in zip(job.task.names, means, strict=True)},
    }


def _check(job: Job, scored: Scored) -> None:
    """Refuse before any training what would fail after hours of it."""
    config: Config = job.config
    if config.min_pool is not None and config.min_pool > len(scored.prompts):
        raise RequestError(
            f"min_pool = {config.min_pool}: task {job.task.card.name} has {len(scored.prompts)} scored responses; "
            f"allowed: 1 to {len(scored.prompts)}, or null for max(2000, 20 * k) or all there are"
        )
    prompts = min(config.augment_prompts, len(set(job.task.prompts["train"])))
    if config.second.steps and prompts < config.k // 2:
        raise RequestError(
            f"k = {config.k}: stage 2 needs answers to {config.k // 2} different prompts, and {prompts} will be "
            f"answered (augment_prompts = {config.augment_prompts}, {len(set(job.task.prompts['train']))} training "
            f"prompts); allowed: k <= {2 * prompts + 1}, or more augment_prompts"
        )


def _put_first(job: Job, lm: LanguageModel, index: int) -> None:
    """Give the attached adapter the weights that stage 1 of a preference ended with."""
    from moalign.lm import adapters
    from moalign.training.grid import adapter_of

    adapters.set_tensors(lm, job.run.load_tensors(f"{adapter_of(index, FIRST)}/adapter_model"))
