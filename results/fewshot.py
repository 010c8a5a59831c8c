"""Regret of a preference read off k labelled pairs, against stating it, for runs of a method that reads one off pairs.

    moalign train few-shot-steer --task sandbox --seed 0
    python results/fewshot.py RUN [RUN ...]              # a minute; writes fewshot.json and fewshot.md

Users are simulated: a preference w of the evaluation's grid, and pairs of held-out responses (the calibration split's)
that they label by Bradley-Terry on w.z. Each reader gets the first k of a user's pairs and gives a preference v, moved
to the nearest of the grid; the regret is w.n(w) - w.n(v), n(v) the mean normalised rewards of the run's answers at v
from its evaluation. Where a policy does not answer best for w when it is asked for w, it may be negative.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import moalign
from moalign.core.preferences import grid
from moalign.experiment.handle import RunHandle
from moalign.training.users import Pool, embeddings, encoder_of, first

HERE = Path(__file__).resolve().parent
COUNTS = (0, 1, 2, 4, 8)
USERS = 2000
STEPS = 50
"""Of the grid on which w is fitted."""
READERS = {
    "encoder": "few-shot-steer, from the pairs' texts",
    "exact": "exact posterior mean, from the pairs' rewards",
    "logistic": "logistic regression of w, from the pairs' rewards",
}

Array = NDArray[np.float64]


def likelihoods(gaps: Array, candidates: Array, sharpness: float) -> Array:
    """Return the log-likelihood of users' labels, ``[users, candidates]``.

    From normalised rewards of chosen less rejected responses, ``[users, pairs, m]``, and preferences ``[candidates,
    m]``.
    """
    margins = sharpness * np.einsum("ukm,cm->ukc", gaps, candidates)
    return np.asarray(-np.logaddexp(0.0, -margins).sum(axis=1))


def logistic(gaps: Array, candidates: Array, sharpness: float) -> Array:
    """Return the preferences of most likelihood, ``[users, m]``; of several as likely their mean."""
    found = likelihoods(gaps, candidates, sharpness)
    best = np.isclose(found, found.max(axis=1, keepdims=True), rtol=0, atol=1e-9).astype(float)
    return np.asarray(best @ candidates / best.sum(axis=1, keepdims=True))


def exact(gaps: Array, candidates: Array, sharpness: float) -> Array:
    """Return the posterior means, ``[users, m]``, where all candidates are as likely before."""
    found = likelihoods(gaps, candidates, sharpness)
    belief = np.exp(found - found.max(axis=1, keepdims=True))
    return np.asarray(belief @ candidates / belief.sum(axis=1, keepdims=True))


def regrets(w: Sequence[int], read: Array, asked: Array, answers: Array) -> Array:
    """Return the regret of each user, ``[users]``.

    ``w`` are rows of the grid ``asked`` ``[grid, m]``, ``read`` what was read ``[users, m]``, ``answers`` n(v)
    ``[grid, m]``.
    """
    nearest = ((read[:, None] - asked[None]) ** 2).sum(-1).argmin(axis=1)
    own = asked[w]
    return np.asarray((own * (answers[w] - answers[nearest])).sum(-1))


def of_run(run: RunHandle) -> dict[str, Any]:
    """Return the mean regret of each reader by number of pairs, over users."""
    evaluation, (_, context) = moalign.evaluate(run), run.opened()
    asked = np.array([point.preference for point in evaluation.points])
    answers = np.array([point.mean for point in evaluation.points])
    task, config, encoder = context.task, context.config, encoder_of(context)
    scored = task.calibration()
    pool = Pool.of(scored.prompts, scored.responses, context.panel.z(scored.raw))
    features = embeddings(task.language_model, task, pool.prompts, pool.responses, config.max_tokens)
    rng = np.random.default_rng(run.record.seed)
    w = rng.integers(len(asked), size=USERS)
    chosen, rejected = pool.labelled(asked[w], max(COUNTS), config.sharpness, rng)
    candidates = np.array(grid(len(task.names), STEPS))
    gaps = pool.z[chosen] - pool.z[rejected]
    readers: dict[str, Callable[[int], Array]] = {
        "encoder": lambda k: encoder.read(features, chosen, rejected, first(np.full(USERS, k), max(COUNTS))),
        "exact": lambda k: exact(gaps[:, :k], candidates, config.sharpness),
        "logistic": lambda k: logistic(gaps[:, :k], candidates, config.sharpness),
    }
    rows = {
        name: [float(regrets(w, reader(k), asked, answers).mean()) for k in COUNTS] for name, reader in readers.items()
    }
    stated = float((asked[w] * answers[w]).sum(-1).mean())
    return {"task": task.card.name, "seed": run.record.seed, "stated": stated, "regret": rows}


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of the runs' numbers."""
    tasks = ", ".join(sorted({run["task"] for run in runs}))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    stated = np.mean([run["stated"] for run in runs])
    lines = [
        "# A preference read off a few pairs",
        "",
        "`python results/fewshot.py RUN RUN RUN` on "
        f"`moalign train few-shot-steer --task {tasks} --seed S`, S = {seeds}",
        "",
        f"Regret of w.n against the same policy asked for a user's own w (w.n = {stated:.3f}), over {USERS} simulated",
        "users of each seed, who label held-out pairs by Bradley-Terry. No pairs: what is known of any user.",
        "",
        "| reader | " + " | ".join(f"{k} pair{'' if k == 1 else 's'}" for k in COUNTS) + " |",
        "|---" * (1 + len(COUNTS)) + "|",
    ]
    for name, words in READERS.items():
        means = np.mean([run["regret"][name] for run in runs], axis=0)
        lines.append(f"| {words} | " + " | ".join(f"{value:.4f}" for value in means) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the runs and write record and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--results", type=Path, default=Path("results"))
    given = parser.parse_args()
    runs = [of_run(moalign.load(name, results=given.results)) for name in given.runs]
    (HERE / "fewshot.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (HERE / "fewshot.md").write_text(page(runs), encoding="utf-8")
    print(page(runs))


if __name__ == "__main__":
    main()
