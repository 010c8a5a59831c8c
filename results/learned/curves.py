"""Over-optimisation: true and believed reward along the training of every method on learned rewards.

    python results/learned/curves.py [--seeds 5] [--write-only]     # hours on one core; goes on where it ended

Trains the methods on sandbox-learned with snapshots (``moalign train METHOD --task sandbox-learned --seed S --snapshots
6``), judges the snapshots (``moalign eval RUN --snapshots --samples 1``) and the finished runs, and writes
``curves.json``, ``curves.md`` and ``curves.png`` of what is there.

A rule for stopping is judged by what it loses of the true inner product against the best snapshot of the same run. The
rules know no truth: a KL budget; and patience, by a reward model that was trained on pairs of its own
(``task.sandbox.annotators.seed=1``) and scores the answers of the snapshots.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import moalign
from moalign.config.load import load_card
from moalign.core.errors import RequestError
from moalign.evaluation import stopping
from moalign.report.overoptimisation import draw_over_optimisation
from moalign.tasks.load import make_task
from moalign.tasks.task import Task

HERE = Path(__file__).resolve().parent
TASK = "sandbox-learned"
METHODS = ("hindsight", "moc", "mo-odpo", "paretohqd", "ric", "modpo", "morlhf")
SNAPSHOTS = 6
BUDGETS = (2.0, 4.0, 6.0, 8.0)
"""Nats a response."""
OTHER = "task.sandbox.annotators.seed=1"


def obtain(seeds: int, results: Path, train: bool) -> Iterator[tuple[str, int, Any, Any]]:
    """Yield (method, seed, evaluation, curve) of every run that is there, or that ``train`` makes."""
    for seed in range(seeds):
        for method in METHODS:
            try:
                run = _run(method, seed, results, train)
            except RequestError as error:
                print(f"{method}, seed {seed}: {error}", file=sys.stderr)
                continue
            if run is not None:
                curve = moalign.curve(run, samples=1)
                yield method, seed, moalign.evaluate(run), curve
                print(f"{method}, seed {seed}: {run.path}", file=sys.stderr, flush=True)


def _run(method: str, seed: int, results: Path, train: bool) -> Any:
    """Return the finished run; None when it is not there and nothing is to be trained."""
    if not train:
        from moalign.experiment.train import TrainRequest, plan

        request = TrainRequest(method, task=TASK, seed=seed, overrides=(f"snapshots={SNAPSHOTS}",), results=results)
        record = plan(request).folder / "run.json"
        if not record.is_file() or json.loads(record.read_text(encoding="utf-8"))["status"] != "done":
            return None
    return moalign.train(method, TASK, seed=seed, settings={"snapshots": SNAPSHOTS}, results=results)


def held_out(other: Task, curve: Any, answers: Path) -> list[float]:
    """Return the mean w.n of every snapshot by another reward model, ``[rows]``."""
    table = pd.read_parquet(answers)
    weights = np.array(curve.prefs)
    values = []
    for _, own in table.groupby(["part", "step"], sort=False):
        unit = other.normaliser.unit(other.panel.score(own["prompt"].tolist(), own["response"].tolist()))
        means = unit.reshape(len(weights), -1, unit.shape[1]).mean(axis=1)
        values.append(float((weights * means).sum(axis=1).mean()))
    return values


def record_of(method: str, seed: int, evaluation: Any, curve: Any, other: Task) -> dict[str, Any]:
    """Return a run's numbers: the finished policy, and what every snapshot has."""
    answers = next(Path(curve.run).glob("curve*.parquet"))
    rows = [
        {
            "part": row.part,
            "step": row.step,
            "share": row.share,
            "kl": row.kl,
            "true": row.true.inner_product,
            "true_hypervolume": row.true.hypervolume,
            "believed": row.believed.inner_product,
            "believed_hypervolume": row.believed.hypervolume,
            "collapsed": row.collapse_rate,
            "held_out": value,
        }
        for row, value in zip(curve.rows, held_out(other, curve, answers), strict=True)
    ]
    return {
        "method": method,
        "seed": seed,
        "optimal_share": evaluation.optimal_share,
        "hypervolume": evaluation.hypervolume,
        "inner_product": evaluation.indicators.inner_product,
        "believed": evaluation.proxy_reward.inner_product,
        "kl": evaluation.quality.kl,
        "share_at_kl": evaluation.share_at_kl,
        "rows": rows,
    }


def stopped(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what each rule loses of the true inner product, and what training to the end does."""
    rows = record["rows"]
    true = [row["true"] for row in rows]
    rules: dict[str, Callable[[], int]] = {
        "to the end": lambda: len(rows) - 1,
        **{f"KL <= {budget:g}": _within([row["kl"] for row in rows], budget) for budget in BUDGETS},
        "patience, other reward model": lambda: stopping.by_patience([row["held_out"] for row in rows]),
        "most believed": lambda: stopping.by_pessimism([row["believed"] for row in rows], [0.0] * len(rows), 0.0),
    }
    return {name: stopping.lost(true, rule()) for name, rule in rules.items()}


def _within(kl: Sequence[float], budget: float) -> Callable[[], int]:
    return lambda: stopping.by_kl(kl, budget)


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    of = {method: [record for record in records if record["method"] == method] for method in methods}
    lines = [
        "# Over-optimisation of learned rewards, by method",
        "",
        "Made by `python results/learned/curves.py`: task sandbox-learned, one reward model (3,000 pairs of each of",
        "two objectives), judged by the truth. Means over seeds, with the lowest and highest.",
        "",
        "## At the end of training",
        "",
        "| method | seeds | % of optimum | true w.n | believed w.n | KL | share at its KL |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, own in of.items():
        cells = [
            _spread([100 * record["optimal_share"] for record in own], 1),
            *(_spread([record[key] for record in own], 3) for key in ("inner_product", "believed")),
            _spread([record["kl"] for record in own], 1),
            _spread([100 * record["share_at_kl"] for record in own if record["share_at_kl"] is not None], 0),
        ]
        lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Where the truth is best, and what is lost after it",
        "",
        "By mean true w.n of the snapshots (one answer a prompt). Share: of all steps of the run.",
        "",
        "| method | best | share of the steps | KL | lost at the end | believed gains meanwhile |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, own in of.items():
        peaks = [max(record["rows"], key=lambda row: row["true"]) for record in own]
        ends = [record["rows"][-1] for record in own]
        cells = [
            _spread([peak["true"] for peak in peaks], 3),
            _spread([peak["share"] for peak in peaks], 2),
            _spread([peak["kl"] for peak in peaks], 1),
            _spread([peak["true"] - end["true"] for peak, end in zip(peaks, ends, strict=True)], 3),
            _spread([end["believed"] - peak["believed"] for peak, end in zip(peaks, ends, strict=True)], 3),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    rules = list(stopped(records[0]))
    lines += [
        "",
        "## What a rule that knows no truth would have lost",
        "",
        "Mean true w.n below the best snapshot of the same run.",
        "",
        f"| method | {' | '.join(rules)} |",
        "|---|" + "---:|" * len(rules),
    ]
    for method, own in of.items():
        losses = [stopped(record) for record in own]
        lines.append(
            f"| {method} | {' | '.join(f'{statistics.mean(loss[rule] for loss in losses):.3f}' for rule in rules)} |"
        )
    return "\n".join([*lines, "", "![True and believed reward over the square root of KL](curves.png)", ""])


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean, least, most = (f"{number:.{digits}f}" for number in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


def main() -> None:
    """Train what is missing, judge, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--write-only", action="store_true", help="train nothing; write what is there")
    options = parser.parse_args()
    other = make_task(load_card(TASK, [OTHER]), options.results, lambda what, done, total: None)
    records, curves = [], []
    for method, seed, evaluation, curve in obtain(options.seeds, options.results, not options.write_only):
        records.append(record_of(method, seed, evaluation, curve, other))
        curves.append(curve.content)
    if not records:
        raise SystemExit(f"no finished run with snapshots in {options.results}; leave out --write-only to train them")
    records.sort(key=lambda record: METHODS.index(record["method"]))
    curves.sort(key=lambda content: METHODS.index(content["method"]))
    (HERE / "curves.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (HERE / "curves.md").write_text(page(records), encoding="utf-8")
    (HERE / "curves.png").write_bytes(draw_over_optimisation(curves))
    (HERE / "curves-dark.png").write_bytes(draw_over_optimisation(curves, theme="dark"))


if __name__ == "__main__":
    main()
