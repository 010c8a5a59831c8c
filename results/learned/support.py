"""How likely the base finds the least likely token of its own answers, and of what policies answer after training.

    python results/learned/support.py [RUN]...       # seconds each; writes support.md beside this file

Without runs those of the published table, which are trained where they are not there (minutes each); any runs of the
sandbox's tasks will do. For every run the answers of its evaluation are divided into well-formed ones, of the 15,625
that the world has, and malformed ones. Log-probabilities are the base's, with the bare prompt, in nats.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import moalign
from moalign.runs.record import again
from moalign.tasks.responses import Responses, from_columns
from moalign.tasks.sandbox import world
from moalign.tasks.task import Task
from moalign.training.reference import least_log_probs, rows_of

HERE = Path(__file__).resolve().parent
QUANTILES = (0, 0.01, 0.5, 1)
EVERY = 8
"""Every eighth answer of an evaluation is looked at."""

FIRST_VERSION: dict[str, Any] = {
    "labels": "order",
    "extremes": "score",
    "scalarisation": "linear",
    "support": None,
    "beta": 0.1,
    "sft_coef": 0.3,
    "temperature": 1.3,
    "distil.choose": "best",
}
"""Of hindsight: what it was before it was made for learned rewards."""
MANY_PAIRS = {"task.sandbox.annotators.pairs": 32000}
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("hindsight", "sandbox", {}),
    ("hindsight", "sandbox-learned", {"snapshots": 6}),  # as curves.py trains it
    ("hindsight", "sandbox-learned", FIRST_VERSION),
    ("moc", "sandbox-learned", MANY_PAIRS),
    ("moc", "sandbox-learned", {**MANY_PAIRS, "support": 2}),
)
"""Method, task and settings of the runs of the published table, seed 0."""


def least(task: Task, answers: Responses) -> np.ndarray:
    """Return the log-probability of each answer's least likely token, ``[answers]``."""
    rows = rows_of(task.language_model, map(task.renderer.plain, answers.prompts), answers.responses, 512)
    return least_log_probs(task.language_model, rows, task.card.generation.temperature).numpy()


def line(name: str, values: np.ndarray) -> str:
    """Return a row of the table."""
    cells = [f"{np.quantile(values, q):.1f}" for q in QUANTILES] if len(values) else [""] * len(QUANTILES)
    return f"| {name} | {len(values)} | {' | '.join(cells)} |"


def main(names: Sequence[str]) -> None:
    """Write the table of the base and of the runs."""
    runs = [moalign.load(name) for name in names] or [
        moalign.train(method, task, seed=0, settings=settings) for method, task, settings in RUNS
    ]
    command = "python results/learned/support.py" + " RUN..." * bool(names)
    records = [run.record for run in runs]
    commands = [again(record.as_given, record.seed, record.preferences, Path("results")) for record in records]
    lines = [
        "# The least likely token of an answer, to the base",
        "",
        f"Made by `{command}`: log-probability in nats, bare prompt. The runs are of",
        "",
        *(f"* `{shlex.join(['moalign', *command])}`" for command in commands),
        "",
        "| answers | number | least | 1 % | median | largest |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    well_formed = {world.response_text(tuple(choice)) for choice in world.all_choices().tolist()}
    for number, (run, record) in enumerate(zip(runs, records, strict=True)):
        context = run.opened()[1]
        task = context.task
        if number == 0:
            own = task._sample_base("calibration", task.card.pool.calibration_per_prompt, "sampling")
            lines.append(line("of the base itself", least(task, own)))
        table = context.run.read_table("responses")[::EVERY]
        values = least(task, Responses(table["prompt"].tolist(), from_columns(table)))
        whole = table["response"].isin(well_formed).to_numpy()
        name = f"{record.method} on {task.card.name} ({record.run_id})"
        for kind, chosen in (("well-formed", whole), ("malformed", ~whole)):
            lines.append(line(f"{kind}, of {name}", values[chosen]))
    (HERE / "support.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
