"""BAPO: base-anchored preference optimisation, DPO that keeps the base's own answers likely.

Source: arXiv 2407.00693 (Findings of EMNLP 2024). Preferences of single users pull a model away from what all users
rely on, and the KL term of DPO, which is felt only on the pairs, does not hold it. BAPO adds a loss on the base's own
response ``y_b`` to the prompt, so that its likelihood stays what it is to the reference:

    L = L_DPO(y_w, y_l) + anchor * l(d),      d = (1 / |y_b|) (log pi(y_b|x) - log pi_ref(y_b|x))

The paper's experiments are per user; here w is the user: one policy for each preference on DPO-LW's batches
(:mod:`moalign.methods.dpo_lw`), ``L_DPO = sum_i w_i L_i``, the anchor at full weight whatever w. ``anchor: 0`` is
DPO-LW, bit for bit.

Choices of ours. The paper's own formula of l was not at hand when this was written, only what it is for, so that these
are our reading:

* ``form: below``, ``l = max(0, -d)``: only likelihood that is lost costs, as the claim is that nothing is forgotten.
  ``form: both``, ``l = d^2``, also holds back what becomes likelier.
* d is a mean over tokens, so that ``anchor`` is on the scale of ``sft_coef`` and does not grow with length.
* y_b is one response per prompt, drawn from the base before training at the card's temperature (not the likeliest one:
  drawn at temperature 1, the mean of ``-d |y_b|`` estimates ``KL(pi_ref || pi)``; at a lower one, as most chat models'
  cards have it, it is that of what the base most often says). Of at most ``anchors`` prompts of the training split.
* As many anchors as pairs are read at every step, in an order of their own, not those of the pairs' prompts: the
  expectation is the same, and a pair whose prompt was not asked can have one.

Measured on the sandbox's base of before 2026-11-26, seed 0, by ``moalign train bapo --task sandbox --seed 0 --set
anchor=A`` (dpo-lw for 0) and ``python results/outside.py RUN``, means over 11 preferences. KL to the base in nats per
response, and by how much a token of the base's own answers lost likelihood, on the task's prompts, on those with a
preference stated before them, and on topics that the task has none of:

    A    % of optimum   task             stated           unseen
    0        71.6       1.661  -0.134    1.388  -0.113    1.492  -0.119
    0.1      67.0       0.944  -0.075    0.831  -0.064    0.817  -0.066
    1        46.3       0.064  -0.002    0.047  -0.002    0.048  -0.002

So the base is kept outside the task, at the price of the task, and not much more than inside it: the KL outside is .84
and .90 of that inside without an anchor, .88 and .87 at .1, .73 and .75 at 1. Whether DPO-LW with a larger beta would
keep as much at the same share of the optimum was not measured.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moalign.core.amounts import Amount, Amounts
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.methods.dpo_lw import AllPairs, train_on_all_pairs
from moalign.training.job import Job, RunContext

if TYPE_CHECKING:
    from moalign.policies.policy import Policy
    from moalign.training.anchored import Anchors

ANCHORS = "anchors"
"""Name of the stage, and of its table, with the base's responses."""


class Config(AllPairs):
    """Settings of BAPO; those of DPO on pairs are inherited."""

    anchor: float = Field(default=0.1, ge=0)
    """Weight of the anchor's loss; 0: dpo-lw."""
    form: Literal["below", "both"] = "below"
    """below: only likelihood that the base's responses lose costs; both: also what they gain."""
    anchors: int = Field(default=512, ge=1)
    """Most prompts that the base answers."""

    @property
    def rows_per_pair(self) -> int:
        """See :class:`DpoStage`."""
        return 3 if self.anchor else 2

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`. The base's responses are sampled and not scored."""
        count = self.anchors if task.prompts is None else min(self.anchors, task.prompts)
        return super().learns_from(task) + Amount(0, count if self.anchor else 0)


class Bapo:
    """One adapter per preference, trained on all objectives' pairs beside the base's own responses."""

    name: ClassVar[str] = "bapo"
    summary: ClassVar[str] = "DPO per preference that keeps the base's own responses likely (BAPO, arXiv 2407.00693)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline", one_policy=False, steerable=False, needs_pairs=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1, "anchors": 8}

    def train(self, job: Job) -> None:
        """Let the base answer, then train an adapter for every preference; resumes where it was interrupted."""
        config: Config = job.config
        if not config.anchor:
            train_on_all_pairs(job)
            return
        from moalign.training.anchored import Anchored, AnchoredBatches

        anchors = base_responses(job)
        trainer = partial(Anchored, config.anchor, config.form)
        train_on_all_pairs(job, lambda w, names: trainer, batches=partial(AnchoredBatches, anchors))

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for a preference; raises RequestError for one that was not trained."""
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)


def base_responses(job: Job) -> Anchors:
    """Return the base's responses to prompts of the training split; sampled once and kept in the run.

    Raises RequestError when all of them are empty.
    """
    from moalign.tasks.responses import from_columns
    from moalign.training.anchored import encode_anchors

    if not job.stage_done(ANCHORS):
        _sample(job)
        job.finish_stage(ANCHORS)
    table = job.run.read_table(ANCHORS)
    lm, render = job.task.language_model, job.task.renderer.plain
    texts = [render(prompt) for prompt in table["prompt"]]
    anchors = encode_anchors(job, lm, texts, from_columns(table), job.config.max_tokens)
    if not anchors.rows:
        raise RequestError(f"{ANCHORS}: all {len(texts)} responses of the base are empty: nothing to anchor to")
    return anchors


def _sample(job: Job) -> None:
    """Write the table of prompts and the base's responses."""
    import numpy as np
    import pandas as pd

    from moalign.core.progress import counted
    from moalign.core.seeds import derive
    from moalign.lm.generator import ModelGenerator, shared
    from moalign.policies.policy import Policy, respond_all
    from moalign.tasks.responses import columns

    pool = list(dict.fromkeys(job.task.prompts["train"]))
    rng = np.random.default_rng(derive(job.seed, ANCHORS, "prompts"))
    prompts = [pool[i] for i in rng.permutation(len(pool))[: job.config.anchors]]
    advance = counted(job.progress, "anchors: the base answers", len(prompts))
    base = Policy(shared(ModelGenerator(job.task.language_model)), job.task.renderer.plain)
    limits = job.task.sampling(derive(job.seed, ANCHORS, "responses"))
    answers = respond_all([base], prompts, limits, advance, job.task.engine)
    job.meter.add_tokens_generated(answers.tokens)
    job.run.write_table(ANCHORS, pd.DataFrame({"prompt": prompts, **columns(answers.records(0))}))
