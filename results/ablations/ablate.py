"""Runs a list of settings of one method over several training seeds and writes their results and costs.

A list is a YAML file beside this one: the task, the method, the seeds and groups of rows; a row is a label and the
``--set`` settings that make it (or another method), and may have fewer seeds of its own; ``set`` beside the groups
holds for all rows, or, as ``{METHOD: [...]}``, for those of a method, and ``samples`` is how often each prompt is
answered when runs are judged (``moalign eval RUN --samples N``). Every run is an ordinary ``moalign train``: what was
trained before is found again, and the same command after an interruption goes on. Written beside the list:
``NAME.json`` (every run with its command), ``NAME.md`` and ``NAME.png``. Where the optimum is not known, the page tells
hypervolumes instead of shares of it.

With ``--finished`` nothing is trained, and the rows that lack a run are left out.

    python results/ablations/ablate.py NAME [--results DIR] [--jobs N] [--seeds N] [--finished]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moalign.config import yaml_lines

HERE = Path(__file__).resolve().parent
COSTS = ("tokens_generated", "tokens_trained", "reward_calls")


def arguments(spec: Mapping[str, Any], row: Mapping[str, Any], seed: int, results: Path) -> list[str]:
    """Return the ``moalign`` arguments of one run."""
    method, task, shared = row.get("method", spec["method"]), spec["task"], spec.get("set", ())
    if isinstance(shared, Mapping):
        shared = shared.get(method, ())
    settings = [part for text in (*shared, *row.get("set", ())) for part in ("--set", str(text))]
    return ["train", method, "--task", task, "--seed", str(seed), *settings, "--results", str(results)]


def is_finished(command: Sequence[str]) -> bool:
    """Whether a run is there, trained to its end."""
    return train([*command, "--dry-run"])["status"] == "done"


def train(command: Sequence[str]) -> dict[str, Any]:
    """Run ``moalign`` to its end; returns its JSON output. Raises SystemExit with its messages when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "moalign", *command, "--json"], capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(['moalign', *command])} failed:\n{done.stderr[-2000:]}")
    print(shlex.join(command), file=sys.stderr, flush=True)
    return dict(json.loads(done.stdout))


def judged(trained: Mapping[str, Any], results: Path, samples: int | None) -> tuple[dict[str, Any], np.ndarray]:
    """Return a finished run's numbers, and its normalised scores ``[prompts, preferences, objectives]``."""
    from moalign.evaluation.evaluate import evaluate
    from moalign.experiment.train import context_of
    from moalign.runs.run import Run

    method, context = context_of(Run.load(Path(trained["run"])), results)
    evaluation = evaluate(method, context, samples=samples)
    record = evaluation.result.content
    return {
        "run": Path(trained["run"]).name,
        "seed": trained["seed"],
        "optimal_share": record["optimal_share"],
        "optimum": (record.get("optimum") or {}).get("hypervolume"),
        "hypervolume": record["hypervolume"],
        "ref": record["ref"],
        "tau": record["indicators"]["tau"],
        "inner_product": record["indicators"]["inner_product"],
        "believed": (record.get("proxy_reward") or {}).get("inner_product"),
        "kl": record["quality"]["kl"],
        "collapsed": record["quality"]["rate"],
        "regret": record["indicators"].get("regret"),
        "points": [point["mean"] for point in record["points"]],
        "generalisation": record.get("generalisation"),
        **{name: trained["cost"][name] for name in COSTS},
        "seconds": round(trained["seconds"], 1),
    }, evaluation.scores


def summary(runs: Sequence[Mapping[str, Any]], scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return a row's numbers over its seeds; the interval is of the mean, over seeds and prompts."""
    from moalign.pareto.hypervolume import hypervolume
    from moalign.pareto.statistics import interval, resample

    ref, most = runs[0]["ref"], runs[0]["optimum"] or 1.0
    drawn = resample(scores).each(lambda means: hypervolume(means, ref) / most)
    shares = [run["hypervolume"] / most for run in runs]
    return {
        "median": statistics.median(shares),
        "mean": statistics.mean(shares),
        "worst": min(shares),
        "best": max(shares),
        "ci": interval(drawn, least=0.0).tolist(),
        "tau": statistics.median(run["tau"] for run in runs),
        "tau_worst": min(run["tau"] for run in runs),
        **{name: statistics.mean(run[name] for run in runs) for name in (*COSTS, "seconds")},
        **generalisation(runs),
    }


def generalisation(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the medians of the utility shares on trained and on held-out preferences, where runs have them."""
    both = [run["generalisation"] for run in runs if run["generalisation"]]
    if not both:
        return {}
    return {side: statistics.median(sides[side]["utility_share"] for sides in both) for side in ("trained", "held_out")}


def markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    every = [row for group in record["groups"] for row in group["rows"]]
    many, uneven = any("held_out" in row["summary"] for row in every), len({len(row["runs"]) for row in every}) > 1
    known, believed = _known(record), _believed(record)
    meaning = (
        "Share: hypervolume over that of the exact optimum; the interval (95 %) is that of the mean, over seeds and "
        "prompts. Regret: what answers miss of a preference's best w.n, mean over preferences, median of seeds."
        if known
        else "The interval (95 %) is that of the mean hypervolume, over seeds and prompts. Inner product: mean over "
        "preferences of w.n of the answers asked for with w; collapsed: answers that repeat, loop or say next to "
        "nothing."
    )
    lines = [
        f"# {record['title']}",
        "",
        f"{record['text'].strip()}",
        "",
        f"Made by `{record['command']}`: task {record['task']}, {'up to ' if uneven else ''}{_seeds(record['seeds'])}, "
        f"each with the recipe's settings but for those named. {meaning} Costs are means per seed; time was measured "
        "beside another job and is rough."
        + (f" Each prompt was answered {record['samples']} times at each preference." if record.get("samples") else "")
        + (" True and believed w.n: by the judge, and by the rewards trained on." if believed else "")
        + (" Utility: mean of w.n, as a share of the optimum's on the same preferences." if many else ""),
    ]
    for group in record["groups"]:
        head = [
            "settings",
            *(["seeds"] if uneven else []),
            f"{'share' if known else 'hypervolume'}: median",
            "worst",
            "best",
            "95 % of the mean",
            "tau",
            "worst",
            *(["regret"] if known else ["inner product", "collapsed"]),
            *(["true w.n", "believed w.n", "KL"] if believed else []),
        ]
        head += ["utility where trained", "utility held out"] if many else []
        head += ["generated", "trained on", "reward calls", "time"]
        lines += ["", f"## {group['title']}", ""]
        lines += [f"| {' | '.join(head)} |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
        for row in group["rows"]:
            label = [row["label"], *([str(len(row["runs"]))] if uneven else [])]
            lines.append(f"| {' | '.join([*label, *_cells(row, many, known, believed)])} |")
        if group.get("text"):
            lines += ["", group["text"].strip()]
    lines += [
        "",
        f"![{'share of the optimum' if known else 'hypervolume'}, and tokens, by row]({record['name']}.png)",
        "",
    ]
    lines += [f"Commands and every run's numbers: [{record['name']}.json]({record['name']}.json). {_where(record)}", ""]
    return "\n".join(lines)


def _seeds(count: int) -> str:
    return "one training seed (0)" if count == 1 else f"{count} training seeds (0 to {count - 1})"


def _known(record: Mapping[str, Any]) -> bool:
    """Whether the task's optimum is known, so that hypervolumes are given as shares of it."""
    return all(run["optimum"] is not None for group in record["groups"] for row in group["rows"] for run in row["runs"])


def _believed(record: Mapping[str, Any]) -> bool:
    """Whether methods were trained on other rewards than they are judged by, and the record has what these say."""
    rows = [row for group in record["groups"] for row in group["rows"]]
    return all(run.get("believed") is not None for row in rows for run in row["runs"])


def _cells(row: Mapping[str, Any], many: bool, known: bool, believed: bool) -> list[str]:
    numbers = row["summary"]

    def median(name: str) -> float:
        return statistics.median(run[name] for run in row["runs"])

    if known:
        cells = [f"{100 * numbers[name]:.1f} %" for name in ("median", "worst", "best")]
        cells += [f"{100 * numbers['ci'][0]:.1f} to {100 * numbers['ci'][1]:.1f} %"]
    else:
        cells = [f"{numbers[name]:.3f}" for name in ("median", "worst", "best")]
        cells += [f"{numbers['ci'][0]:.3f} to {numbers['ci'][1]:.3f}"]
    cells += [f"{numbers['tau']:.2f}", f"{numbers['tau_worst']:.2f}"]
    cells += [f"{median('regret'):.4f}"] if known else [f"{median('inner_product'):.3f}", f"{median('collapsed'):.1%}"]
    if believed:
        cells += [f"{median('inner_product'):.3f}", f"{median('believed'):.3f}", f"{median('kl'):.1f}"]
    if many:
        cells += [f"{100 * numbers[side]:.1f} %" if side in numbers else "" for side in ("trained", "held_out")]
    return [*cells, *(f"{numbers[name] / 1e6:.2f} M" for name in COSTS), f"{numbers['seconds']:.0f} s"]


def _where(record: Mapping[str, Any]) -> str:
    environment = record["environment"]
    return f"Python {environment['python']}, torch {environment['packages'].get('torch')}, on {environment['cpu']}."


def draw(record: Mapping[str, Any]) -> bytes:
    """Return the figure: a line for each row, its share of the optimum on the left and its tokens on the right."""
    from moalign.report import style

    rows = [(index, row) for index, group in enumerate(record["groups"]) for row in group["rows"]]
    known = _known(record)
    unit = 100 if known else 1
    with style.canvas(7.6, 0.27 * len(rows) + 1.3, "light") as (figure, colours):
        share, spent = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
        for y, (index, row) in enumerate(rows):
            numbers, look = row["summary"], style.look(index, colours)
            title = record["groups"][index]["title"] if row is record["groups"][index]["rows"][0] else None
            ends = [[unit * abs(numbers["median"] - numbers[end])] for end in ("worst", "best")]
            share.errorbar(
                unit * numbers["median"],
                y,
                xerr=ends,
                **look.marks(6, 0),
                label=title and style.wrapped(title, 20),
            )
            spent.barh(
                y, (numbers["tokens_generated"] + numbers["tokens_trained"]) / 1e6, color=look.colour, height=0.6
            )
        share.set_yticks(range(len(rows)), [row["label"] for _, row in rows])
        share.invert_yaxis()
        share.set_xlabel("share of the optimal hypervolume, %" if known else "hypervolume")
        spent.set_xlabel("million tokens in training")
        handles, labels = share.get_legend_handles_labels()
        style.legend(figure, handles, labels, "", beside=False)
        counts = sorted({len(row["runs"]) for _, row in rows})
        spread = " to ".join(map(str, sorted({counts[0], counts[-1]})))
        seeds = f"median, worst and best of {spread} seeds" if record["seeds"] > 1 else "one seed"
        one = all(row.get("method", record["method"]) == record["method"] for _, row in rows)
        what = f"{record['method']} on {record['task']}" if one else record["task"]
        return style.content(figure, f"{what}: {seeds}", ".png")


def main() -> None:
    """Train what is missing, evaluate, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a list beside this file (or a path from here), without .yaml")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--seeds", type=int, help="in place of what the list says; a number of a row's own is its most")
    parser.add_argument("--finished", action="store_true", help="train nothing; only rows whose runs are there")
    options = parser.parse_args()
    spec = yaml_lines.load(HERE / f"{options.name}.yaml").data
    for row in (row for group in spec["groups"] for row in group["rows"]):
        most = options.seeds or spec["seeds"]
        row["seeds"] = min(most, row.get("seeds", most))
    if options.finished:
        for group in spec["groups"]:
            group["rows"] = [
                row
                for row in group["rows"]
                if all(is_finished(arguments(spec, row, seed, options.results)) for seed in range(row["seeds"]))
            ]
        spec["groups"] = [group for group in spec["groups"] if group["rows"]]
        if not spec["groups"]:
            raise SystemExit(f"{options.name}: no row has all of its runs in {options.results}; leave out --finished")
    rows = [row for group in spec["groups"] for row in group["rows"]]
    seeds = max(row["seeds"] for row in rows)
    # All rows at seed 0 first, so that an interrupted list has numbers for each. A row in two groups is one run.
    commands = {
        tuple(arguments(spec, row, seed, options.results)): None
        for seed in range(seeds)
        for row in rows
        if seed < row["seeds"]
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        trained = dict(zip(commands, pool.map(train, commands), strict=True))
    for row in rows:
        mine = [trained[tuple(arguments(spec, row, seed, options.results))] for seed in range(row["seeds"])]
        pairs = [judged(run, options.results, spec.get("samples")) for run in mine]
        row["runs"] = [run for run, _ in pairs]
        row["summary"] = summary(row["runs"], [scores for _, scores in pairs])
        row["command"] = shlex.join(["moalign", *arguments(spec, row, 0, Path("results"))])
    from moalign.runs import environment

    given = (f" --seeds {options.seeds}" if options.seeds else "") + (" --finished" if options.finished else "")
    record = {
        "name": Path(options.name).name,
        "command": f"python results/ablations/ablate.py {options.name}{given}",
        **{key: spec[key] for key in ("title", "text", "task", "method")},
        "seeds": seeds,
        "samples": spec.get("samples"),
        "groups": spec["groups"],
        "environment": environment.capture(),
    }
    (HERE / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (HERE / f"{options.name}.md").write_text(markdown(record), encoding="utf-8")
    (HERE / f"{options.name}.png").write_bytes(draw(record))


if __name__ == "__main__":
    main()
