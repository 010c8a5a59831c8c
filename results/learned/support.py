"""How likely the base finds the least likely token of its own answers, and of what policies answer after training.

    python results/learned/support.py RUN [RUN]...       # seconds each; writes support.md beside this file

The published table names the command of each of its runs; any runs of the sandbox's tasks will do. For
every run the answers of its evaluation are divided into well-formed ones, of the 15,625 that the world has, and
malformed ones. Log-probabilities are the base's, with the bare prompt, in nats.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moalign.experiment.train import context_of
from moalign.lm.chat import training_row
from moalign.runs.record import again
from moalign.runs.run import Run
from moalign.tasks.responses import Responses, from_columns
from moalign.tasks.sandbox import world
from moalign.tasks.task import Task
from moalign.training.reference import least_log_probs

HERE = Path(__file__).resolve().parent
QUANTILES = (0, 0.01, 0.5, 1)
EVERY = 8
"""Every eighth answer of an evaluation is looked at."""


def least(task: Task, answers: Responses) -> np.ndarray:
    """Return the log-probability of each answer's least likely token, ``[answers]``."""
    rows = []
    for prompt, response in zip(answers.prompts, answers.responses, strict=True):
        head, tail = training_row(task.codec, task.renderer.plain(prompt), response, 512)
        rows.append((head + tail, len(tail)))
    return least_log_probs(task.language_model, rows, task.card.generation.temperature).numpy()


def line(name: str, values: np.ndarray) -> str:
    """Return a row of the table."""
    cells = [f"{np.quantile(values, q):.1f}" for q in QUANTILES] if len(values) else [""] * len(QUANTILES)
    return f"| {name} | {len(values)} | {' | '.join(cells)} |"


def main(folders: Sequence[str]) -> None:
    """Write the table of the base and of the runs."""
    records = [Run.load(Path(folder)).record for folder in folders]
    commands = [again(record.as_given, record.seed, record.preferences, Path("results")) for record in records]
    lines = [
        "# The least likely token of an answer, to the base",
        "",
        "Made by `python results/learned/support.py RUN...`: log-probability in nats, bare prompt. The runs are of",
        "",
        *(f"* `{shlex.join(['moalign', *command])}`" for command in commands),
        "",
        "| answers | number | least | 1 % | median | largest |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    well_formed = {world.response_text(tuple(choice)) for choice in world.all_choices().tolist()}
    for number, folder in enumerate(folders):
        run = Run.load(Path(folder))
        _, context = context_of(run, run.path.parents[3])
        task, record = context.task, run.record
        if number == 0:
            own = task._sample_base("calibration", task.card.pool.calibration_per_prompt, "sampling")
            lines.append(line("of the base itself", least(task, own)))
        table = run.read_table("responses")[::EVERY]
        values = least(task, Responses(table["prompt"].tolist(), from_columns(table)))
        whole = table["response"].isin(well_formed).to_numpy()
        name = f"{record.method} on {task.card.name} ({record.run_id})"
        for kind, chosen in (("well-formed", whole), ("malformed", ~whole)):
            lines.append(line(f"{kind}, of {name}", values[chosen]))
    (HERE / "support.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
