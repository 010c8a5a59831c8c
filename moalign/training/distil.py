"""Hindsight distillation: the base's own scored samples show what to answer at each preference (ours).

At every step prompts x and preferences ``w ~ Dirichlet(alpha)`` are drawn, ``y = argmax_j w . z(x, y_j)`` is picked
from x's pool of n scored responses, and the policy is trained on ``prefix(w) + x -> y``: best-of-n, distilled for the
whole simplex at once. w is drawn afresh each time, so one pool serves every preference.

How far that moves from the base depends on n. ``choose: tilted`` draws y_j with probability proportional to
``exp(s_j / beta)`` instead: the base's own samples, weighted by importance, are (as n grows) samples of
``pi_base(y|x) exp(s / beta) / Z(x)``, the policy that maximises ``E[s] - beta KL(pi || pi_base)``.

Alone it is an offline method; before an online method it is a warm start: from a base for which a stated preference
means nothing, online methods mostly improve the average and answer all preferences alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.pareto.scalarisation import Scalarisation, scores
from moalign.tasks.responses import by_prompt
from moalign.training.settings import DistilConfig, WarmStart

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moalign.core.records import Response
    from moalign.lm.language_model import LanguageModel
    from moalign.rewards.panel import Cap
    from moalign.training.job import Job

Style = Literal["percent", "fraction"]

PHASE = "distil"
"""Name of the stage in the run's record, metrics and checkpoints."""


def warm_start(
    job: Job,
    lm: LanguageModel,
    config: WarmStart,
    style: Style = "percent",
    scalarisation: Scalarisation = "linear",
    cap: Cap = "none",
) -> None:
    """Train the active adapter of ``lm`` as ``config.warm_start`` says, or not at all; resumes.

    ``style`` is how the method that follows writes preferences into prompts, ``scalarisation`` and ``cap`` are what it
    orders responses by.
    """
    if config.warm_start == "hindsight":
        distil(job, lm, config.distil, style, scalarisation, cap)


def distil(
    job: Job,
    lm: LanguageModel,
    config: DistilConfig,
    style: Style = "percent",
    scalarisation: Scalarisation = "linear",
    cap: Cap = "none",
) -> None:
    """Train the active adapter of ``lm`` on the best of n for drawn preferences; a stage that resumes.

    Raises RequestError when no prompt has ``config.n`` scored responses.
    """
    from moalign.core.seeds import derive
    from moalign.training.preference_draws import independent
    from moalign.training.sft import train_sft

    if job.stage_done(PHASE, lm) or config.steps == 0:
        return
    prompts, responses, z = pools(job, config.n, cap)
    rng = np.random.default_rng(derive(job.seed, PHASE, "rows"))
    count = config.steps * config.batch
    # Every row once: the trainer's own order is then just one more shuffle of rows that are independent anyway.
    preferences = independent(job.given_preferences, len(job.task.names), config.alpha, config.resolution)(rng, count)
    chosen = rng.integers(len(prompts), size=count)
    s = scores(z[chosen], preferences[:, None, :], scalarisation)
    picked = s.argmax(axis=1) if config.choose == "best" else tilted(s, config.beta, rng)
    texts = [job.task.renderer.preference(prompts[x], w, style) for x, w in zip(chosen, preferences, strict=True)]
    answers = [responses[x][j] for x, j in zip(chosen, picked, strict=True)]
    job.notes[PHASE] = {
        "prompts": len(prompts),
        "n": config.n,
        "distinct_rows": len(set(zip(texts, answers, strict=True))),
    }
    train_sft(job, lm, texts, answers, config, PHASE)
    job.finish_stage(PHASE, lm)


def pools(job: Job, n: int, cap: Cap = "none") -> tuple[list[str], list[list[Response]], Matrix]:
    """Return prompts, their first ``n`` scored responses ``[prompts][n]`` and normalised scores ``[prompts, n, m]``.

    Raises RequestError when no prompt has that many.
    """
    scored = job.scored(per_prompt=n)
    rows = by_prompt(scored.prompts)
    complete = {prompt: indices for prompt, indices in rows.items() if len(indices) == n}
    if not complete:
        most = max(len(indices) for indices in rows.values())
        raise RequestError(
            f"distil.n: {n} scored responses a prompt asked for, but task {job.task.card.name} has at most {most}; "
            f"use a smaller n, or let the base be sampled more often (--set task.pool.per_prompt={n})"
        )
    used = [i for indices in complete.values() for i in indices]
    z = job.panel.z(scored.raw[used], cap).reshape(len(complete), n, -1)
    return list(complete), [[scored.responses[i] for i in indices] for indices in complete.values()], z


def tilted(s: Matrix, beta: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw one of each row's ``n`` responses with probability proportional to ``exp(s / beta)``, ``[rows]``.

    From scores ``[rows, n]``; ``rng`` gives a number for each row.
    """
    weights = np.exp((s - s.max(axis=1, keepdims=True)) / beta)
    bounds = weights.cumsum(axis=1)
    return np.asarray((bounds <= rng.random((len(s), 1)) * bounds[:, -1:]).sum(axis=1))
