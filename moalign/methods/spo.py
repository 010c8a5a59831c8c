"""SPO: sequential preference optimisation, one objective after the other, holding on to those before.

Source: "SPO: Multi-Dimensional Preference Sequential Alignment With Implicit Reward Modeling", arXiv 2405.12739 (AAAI
2025). (Two other papers are called SPO: self-play, and the self-supervised preference degree of arXiv 2409.17791, which
knows one objective.)

Round n aligns to objective n: it maximises ``E[R_n] - b_n KL(pi || pi_{n-1})`` on condition that ``E[R_i]`` of the
rounds before does not fall. With multipliers alpha of those conditions the optimum and the loss on pairs of objective n
are, with D the log-ratio to the policy ``pi_{n-1}`` that the round begins with (the base before the first),

    pi_n ~ pi_{n-1} exp((R_n + alpha sum_{i<n} R_i) / b_n)
    L_n  = -log sigma(b_n (D(y_w) - D(y_l)) - alpha sum_{i<n} (R_i(y_w) - R_i(y_l)))
    R_n  = b_n (log pi_n - log pi_{n-1}) - alpha sum_{i<n} R_i           (implicit: no reward model)

The first round is plain DPO on one objective, bit for bit that of DPO-LW at a corner. Each later loss is MODPO's with
the margin's sign and ``w_k = 1``: :func:`moalign.losses.dpo.modpo_losses`.

Choices of ours: the equations above are derived from the paper's constrained problem, as its own text was not at hand
when this was written; it has one multiplier for each earlier round, we have one for all. The paper has no preference w.
Here w sets how strongly each round moves, ``b_n = beta / c_n``, so that after the last one the tilt is that of
``w . r / beta`` whatever alpha: ``c_n = w_n - alpha sum_{i>n} c_i``, what later rounds add to objective n by holding it
being left out of its own. Objectives of weight 0 have no round; one-hot is plain DPO on one objective. Rounds go from
the largest weight to the smallest (``order: weight``; ties as the task lists them), which keeps every c above 0 for
alpha below 1; ``order: task`` is the card's order. ``steps`` are those of all rounds of a preference together, in equal
parts, each round with an optimizer, warmup and schedule of its own; the run's diagnostics are the last round's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference, label
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import DpoConfig, RefusesTasks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moalign.core.arrays import Matrix
    from moalign.lm.language_model import LanguageModel
    from moalign.policies.policy import Policy
    from moalign.training.offline_dpo import PairRows

LEAST_SHARE = 0.05
"""A round of a smaller c is refused: the gradient grows with 1 / c."""


class Config(DpoConfig, RefusesTasks):
    """Settings of SPO; those of DPO on pairs are inherited. ``steps`` are those of a preference's rounds together."""

    alpha: float = Field(default=0.5, ge=0, lt=1)
    """Multiplier of the conditions on the rounds before; 0: DPO after DPO, with nothing that holds on to the first."""
    order: Literal["weight", "task"] = "weight"
    """The largest weight first, or as the task lists its objectives."""

    def require_suited(self, names: Sequence[str], preferences: Sequence[Preference]) -> None:
        """See :class:`RefusesTasks`."""
        for w in preferences:
            rounds_of(w, self)


class Spo:
    """One adapter per preference, trained on the pairs of one objective after the other."""

    name: ClassVar[str] = "spo"
    summary: ClassVar[str] = "DPO per preference, one objective after the other, the first held (SPO, arXiv 2405.12739)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline", one_policy=False, steerable=False, needs_pairs=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 4, "batch": 4, "max_tokens": 128, "per_prompt": 1}

    def train(self, job: Job) -> None:
        """Train an adapter for every preference; resumes at the preference, round and step of an interruption."""
        from moalign.training.grid import each_preference
        from moalign.training.offline_dpo import objective_pairs

        config: Config = job.config
        plans = {w: rounds_of(w, config) for w in job.preferences}
        pairs = objective_pairs(job, job.task.language_model, config, sorted({k for p in plans.values() for k, _ in p}))
        names = job.task.names
        job.notes["rounds"] = {label(w): {names[k]: round(c, 6) for k, c in plan} for w, plan in plans.items()}
        for lm, w, stage in each_preference(job):
            _train_rounds(job, lm, _planned(job, pairs, plans[w], stage), stage)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for a preference; raises RequestError for one that was not trained."""
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)


def rounds_of(w: Preference, config: Config) -> list[tuple[int, float]]:
    """Return the rounds of a preference in their order: objective and c, ``b = beta / c``.

    Raises RequestError for a c below :data:`LEAST_SHARE`.
    """
    used = [k for k in range(len(w)) if w[k] > 0]
    if config.order == "weight":
        used.sort(key=lambda k: -w[k])  # stable: ties stay in the task's order
    later, shares = 0.0, dict[int, float]()
    for k in reversed(used):
        shares[k] = w[k] - config.alpha * later
        later += shares[k]
    weakest = min(used, key=lambda k: shares[k])
    if shares[weakest] < LEAST_SHARE - 1e-9:  # .5 - .9 x .5 is .05
        raise RequestError(
            f"preference {label(w)}: the round of objective {weakest + 1} would move by c = {shares[weakest]:.3g} "
            f"(alpha = {config.alpha:g}, order: {config.order}); allowed: at least {LEAST_SHARE} (its gradient grows "
            "with 1 / c); a smaller alpha, order: weight, or another preference"
        )
    return [(k, shares[k]) for k in used]


def steps_of(steps: int, rounds: int) -> list[int]:
    """Return the steps of each round: equal parts, the first ones one more where they do not divide.

    >>> steps_of(110, 2), steps_of(5, 3)
    ([55, 55], [2, 2, 1])
    """
    return [steps // rounds + (n < steps % rounds) for n in range(rounds)]


@dataclass
class Round:
    """One round of one preference, with what is known of its pairs when it begins."""

    objective: int
    c: float
    rows: PairRows
    """The pairs that it reads; their reference is the policy that it begins with (the base until then)."""
    places: NDArray[np.intp]
    """Which pair each place of each batch takes, ``[steps * batch]``."""
    config: Config
    rewards: list[Matrix] = field(default_factory=list)
    """The earlier rounds' implicit rewards of its responses, ``[rounds][pairs, 2]``."""


def _planned(job: Job, pairs: dict[int, PairRows], plan: Sequence[tuple[int, float]], stage: str) -> list[Round]:
    """Return the rounds of a preference, those of no steps left out, each with the pairs that it will read."""
    import numpy as np

    from moalign.core.seeds import derive
    from moalign.training.offline_dpo import even_order
    from moalign.training.pair_references import taken

    found, parts = [], steps_of(job.config.steps, len(plan))
    for n, ((k, c), steps) in enumerate(zip(plan, parts, strict=True)):
        if steps == 0:
            break
        config = job.config.model_copy(update={"beta": job.config.beta / c, "steps": steps})
        # As dpo-lw orders a corner's pairs.
        seed = derive(job.seed, stage, "order", *([n] if n else []))
        drawn, _ = even_order([len(pairs[k])], steps, config.batch, seed)
        read, places = np.unique(drawn, return_inverse=True)
        found.append(Round(k, c, taken(pairs[k], read), places, config))
    return found


def _train_rounds(job: Job, lm: LanguageModel, rounds: Sequence[Round], stage: str) -> None:
    """Train the active adapter through the rounds of one preference; resumes at the round and step in flight."""
    from moalign.training.offline_dpo import Margin, train_dpo
    from moalign.training.pair_references import own_log_probs

    alpha, several = job.config.alpha, len(rounds) > 1
    for n, own in enumerate(rounds):
        phase = f"{stage}-{n + 1}" if several else stage
        # Preferences differ in their rounds; along training they are compared as if each had one.
        before = sum(round_.config.steps for round_ in rounds[:n])
        job.trained = replace(job.trained, stage=phase, before=before, total=job.config.steps)
        if not (several and job.stage_done(phase, lm)):
            margin = Margin(gaps(own.rewards, len(own.rows)), [alpha] * n, 1.0) if n else None
            job.notes["diagnostics"] = train_dpo(job, lm, own.rows, own.config, phase, margin, places=own.places)
            if several:
                job.finish_stage(phase, lm)
        for later in rounds[n + 1 :]:
            new, old = own_log_probs(job, lm, later.rows), later.rows.reference
            later.rewards.append(implicit(new, old, later.rewards, own.config.beta, alpha))
            later.rows = replace(later.rows, reference=new)


def implicit(new: NDArray[Any], old: NDArray[Any], before: Sequence[Matrix], strength: float, alpha: float) -> Matrix:
    """Return a round's implicit reward of responses, up to what depends on the prompt alone; arrays are all alike.

    Args:
        new, old: log-probabilities under the policy after and before the round.
        before: the rewards of the rounds before it.
        strength: b_n.
    """
    reward: Matrix = strength * (new.astype("float64") - old) - alpha * sum(before)
    return reward


def gaps(rewards: Sequence[Matrix], count: int) -> Matrix:
    """Return what each round's reward finds better in the chosen responses, ``[pairs, rounds]``, of ``[pairs, 2]``."""
    import numpy as np

    return np.stack([reward[:, 0] - reward[:, 1] for reward in rewards], axis=1) if rewards else np.zeros((count, 0))
