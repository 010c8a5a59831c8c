"""Measures time and peak memory of the main commands on this machine's CPU; run by ``make bench``.

Every measurement is a fresh process of the installed ``moalign`` command, imports included, in a results folder of
its own. Time is the wall clock; memory is the largest resident set of the process (or of its largest descendant).
The sandbox's base is trained before, outside every measurement but its own. Written beside this file: ``cpu.json``
(machine, every command with every time, medians) and ``cpu.md`` (the same as a table).

    python results/bench/bench.py [--repeats N] [--only NAME]...
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import judge  # beside this file, as are the next two
import rewards
import steps

HERE = Path(__file__).resolve().parent
MOALIGN = Path(sys.executable).parent / "moalign"
POINTS = "helpfulness,harmlessness\n" + "".join(f"{k / 10:.1f},{1 - (k / 10) ** 2:.2f}\n" for k in range(11))


@dataclass(frozen=True)
class Measured:
    """One run of one command."""

    seconds: float
    peak_bytes: int
    output: str


@dataclass(frozen=True)
class Bench:
    """One row of the table. ``command(folder)`` gives the arguments; ``folder`` is new for every repeat."""

    name: str
    what: str
    command: Callable[[Path], list[str]]
    limit_seconds: float | None = None
    """What the project promises on 2 cores."""
    repeats: int = 3
    prepare: Callable[[Path], list[list[str]]] | None = None
    """Commands run before, not measured."""
    cold_cache: bool = False
    """Give the command an empty cache, so that it trains the sandbox's base."""


def run(arguments: Sequence[str], cache: Path | None = None) -> Measured:
    """Run ``moalign`` with ``arguments`` to its end. Raises SystemExit with its messages when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        environment["MOALIGN_CACHE"] = str(cache)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        pid = os.posix_spawn(
            str(MOALIGN),
            [str(MOALIGN), *arguments],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, err.fileno(), 2)],
        )
        # wait4 gives the usage of this child and of the children that it waited for, not of earlier ones.
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if os.waitstatus_to_exitcode(status) != 0:
            messages = err.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{shlex.join(['moalign', *arguments])} failed:\n{messages}")
        scale = 1 if sys.platform == "darwin" else 1024
        return Measured(seconds, usage.ru_maxrss * scale, out.read().decode())


def _points(folder: Path) -> list[str]:
    file = folder / "points.csv"
    file.write_text(POINTS)
    return ["eval", "--points", str(file), "--hypervolume", "--ref", "0,0", "--json"]


def _train(method: str, *more: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["train", method, *more, "--results", str(folder), "--json"]


DEMO = "sft,prompting,best-of-n,ric,mo-odpo"
"""What ``make demo`` compares."""

Commands = Callable[[Path], list[list[str]]]


def _evaluate(method: str, prompts: int, samples: int, *more: str) -> tuple[Commands, Callable[[Path], list[str]]]:
    """Return (prepare, command) that evaluate a run trained for two steps: the time does not depend on its training."""
    task = ["--set", f"task.evaluation.prompts={prompts}", "--set", f"task.evaluation.samples={samples}"]
    brief = ["--set", "steps=2"]

    def prepare(folder: Path) -> list[list[str]]:
        return [["train", method, "--no-eval", *brief, *task, "--results", str(folder)]]

    return prepare, lambda folder: ["eval", *more, "--results", str(folder), "--json"]


# The same number of responses either way: 11 preferences x 128 prompts x 1 sample, 1 x 128 x 11 samples.
GRID = _evaluate("mo-odpo", 128, 1)
ONE = _evaluate("mo-odpo", 128, 11, "--prefs", "0.5,0.5")


def benches() -> list[Bench]:
    """Return what is measured."""
    return [
        Bench("help", "the command line's help", lambda folder: ["--help"], 0.3, 9),
        Bench("eval-points", "hypervolume of a table of 11 points", _points, 1.0, 9),
        Bench(
            "base",
            "train prompting with an empty cache: the sandbox's base is trained",
            _train("prompting", "--no-eval"),
            None,
            1,
            cold_cache=True,
        ),
        Bench("train-ric", "train RiC on the sandbox", _train("ric", "--no-eval"), 60),
        Bench("train-mo-odpo", "train MO-ODPO on the sandbox", _train("mo-odpo", "--no-eval"), 75),
        Bench("train-moc", "train MOC on the sandbox", _train("moc", "--no-eval"), 75),
        Bench("train-modpo", "train MODPO on the sandbox, 11 preferences", _train("modpo", "--no-eval"), 150, 1),
        Bench(
            "train-paretohqd",
            "train ParetoHqD on the sandbox, 11 preferences",
            _train("paretohqd", "--no-eval"),
            150,
            1,
        ),
        Bench("eval-grid", "evaluate 11 preferences, 1408 responses in total", GRID[1], prepare=GRID[0]),
        Bench("eval-one", "evaluate 1 preference, 1408 responses in total", ONE[1], prepare=ONE[0]),
        Bench(
            "demo",
            "make demo after installation: five methods on the sandbox from an empty cache",
            lambda folder: ["compare", "--task", "sandbox", "--methods", DEMO, "--results", str(folder), "--json"],
            240,
            1,
            cold_cache=True,
        ),
        Bench(
            "suite",
            "the sandbox's whole suite of 22 methods from an empty cache: trained, evaluated, compared",
            lambda folder: ["compare", "--task", "sandbox", "--results", str(folder), "--json"],
            720,
            1,
            cold_cache=True,
        ),
    ]


def measure(bench: Bench, repeats: int | None) -> dict[str, Any]:
    """Run one bench; returns its row."""
    runs = []
    for _ in range(repeats or bench.repeats):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            cache = folder / "cache" if bench.cold_cache else None
            for arguments in bench.prepare(folder) if bench.prepare else []:
                run(arguments, cache)
            arguments_timed = bench.command(folder)
            runs.append(run(arguments_timed, cache))
            command = shlex.join(["moalign", *arguments_timed]).replace(str(folder), "DIR")
    return {
        "name": bench.name,
        "what": bench.what,
        "command": command,
        "seconds": round(statistics.median(timed.seconds for timed in runs), 3),
        "all_seconds": [round(timed.seconds, 3) for timed in runs],
        "peak_bytes": int(statistics.median(timed.peak_bytes for timed in runs)),
        "limit_seconds": bench.limit_seconds,
    }


def machine() -> dict[str, Any]:
    """Return what the numbers depend on; names no user and no path."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    meminfo = Path("/proc/meminfo")
    memory = int(meminfo.read_text().split()[1]) * 1024 if meminfo.is_file() else None
    packages = ("moalign", "torch", "transformers", "trl", "peft", "numpy", "moocore", "typer")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MOALIGN_THREADS")},
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def grid_ratio(repeats: int) -> dict[str, Any]:
    """Return the evaluator's time for an 11-point grid over that for one preference with as many responses.

    Measured in one process after a warm-up, so that it includes neither imports nor loading the model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / "grid", Path(temporary) / "one"]
        for folder, prepare in zip(folders, (GRID[0], ONE[0]), strict=True):
            for arguments in prepare(folder):
                run(arguments)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--inside", *map(str, folders), "--repeats", str(repeats)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def inside(grid: Path, single: Path, repeats: int) -> dict[str, Any]:
    """Time answering and scoring for the runs in two results folders, in this process."""
    from moalign.evaluation import answers, evaluate
    from moalign.experiment.handle import RunHandle

    opened = {}
    for name, folder in (("grid", grid), ("one", single)):
        method, context = RunHandle.find(None, folder).open()
        preferences = context.task.grid if name == "grid" else [(0.5, 0.5)]
        opened[name] = method, context, preferences, context.task.card.evaluation.samples
    times: dict[str, list[float]] = {"grid": [], "one": []}
    responses: dict[str, int] = {}
    for _ in range(repeats + 1):  # the first loads the model and warms the allocator
        for name, arguments in opened.items():  # in turn, so that both meet the same load of the machine
            started = time.perf_counter()
            answered = evaluate.respond(*arguments, "bench")
            times[name].append(time.perf_counter() - started)
            answers.judged(arguments[1], "bench")  # nothing waits for the next time
            responses[name] = len(answered.table)
    middle = {name: statistics.median(seconds_of[1:]) for name, seconds_of in times.items()}
    record: dict[str, Any] = {
        name: {"responses": responses[name], "seconds": round(seconds, 3)} for name, seconds in middle.items()
    }
    record["ratio"] = round(middle["grid"] / middle["one"], 3)
    return record


def in_one_process(option: str, repeats: int) -> dict[str, Any]:
    """Run this file with a hidden option in a fresh process; returns what it prints."""
    command = [sys.executable, str(Path(__file__).resolve()), option, "--repeats", str(repeats)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def update_ratio(repeats: int) -> dict[str, Any]:
    """Return the time of MOC's update over that of PPO with a scalar reward, for :data:`steps.OBJECTIVES`.

    Measured in one process, in turn, with the batch of MOC's sandbox recipe.
    """
    return in_one_process("--inside-updates", repeats)


def table(record: dict[str, Any]) -> str:
    """Return the numbers as Markdown."""
    here = record["machine"]
    lines = [
        "# Time and memory on CPU",
        "",
        "Made by `make bench` (`results/bench/bench.py`); medians over fresh processes, imports included.",
        f"Machine: {here['cpu']}, {here['cores']} cores, Python {here['python']}, torch {here['packages']['torch']}, "
        f"measured {here['measured']}, load before {here['load_before'][0]}.",
        "",
        "| what | command | seconds | promised | peak MiB |",
        "|---|---|---:|---:|---:|",
    ]
    for row in record["rows"]:
        limit = "" if row["limit_seconds"] is None else f"<= {row['limit_seconds']:g}"
        size = row["peak_bytes"] / 2**20
        lines.append(f"| {row['what']} | `{row['command']}` | {row['seconds']:.2f} | {limit} | {size:.0f} |")
    for name, sentence in SENTENCES.items():
        if record.get(name) is not None:
            lines += ["", sentence(record[name])]
    return "\n".join(lines) + "\n"


def _grid(numbers: dict[str, Any]) -> str:
    return (
        f"Answering and scoring {numbers['grid']['responses']} responses in one warm process: 11 preferences "
        f"take {numbers['grid']['seconds']:.2f} s, one preference {numbers['one']['seconds']:.2f} s; "
        f"ratio {numbers['ratio']:.2f} (promised <= 1.5)."
    )


def _updates(numbers: dict[str, Any]) -> str:
    ratios = ", ".join(
        f"{numbers[f'moc-{size}']['ratio']:.2f} with {size} objectives (whole step, sampling included: "
        f"{numbers[f'moc-{size}']['ratio_of_steps']:.2f})"
        for size in steps.OBJECTIVES
    )
    return (
        f"MOC's update over that of PPO with one reward (MORLHF), {numbers['batch']} responses, medians of "
        f"{numbers['repeats']} in one warm process: {ratios}; promised <= 1.1."
    )


def _dpo(numbers: dict[str, Any]) -> str:
    return (
        f"A step of MODPO over one of plain DPO, {numbers['batch']} pairs, medians of {numbers['steps']} steps in one "
        f"warm process: {numbers['ratio']:.2f} (promised <= 1.05); over trl's own loss: {numbers['ratio_to_trl']:.2f}."
    )


def _rewards(numbers: dict[str, Any]) -> str:
    return (
        f"Reward models, medians of ratios in one process: scoring reaches {numbers['scoring']:.2f} of the throughput "
        "of a plain batched forward pass on length-sorted batches (promised >= 0.95); a step with MORE takes "
        f"{numbers['more_step']:.2f} of one with multitask (promised <= 1.1)."
    )


def _judge(numbers: dict[str, Any]) -> str:
    ratios = ", ".join(f"{m} objectives {ratio:.2f}" for m, ratio in numbers["hypervolume"].items())
    sizes = ", ".join(
        f"{words} words {measured['bytes'] / 1e6:.1f} MB in {measured['seconds']:.1f} s"
        for words, measured in numbers["page"].items()
    )
    return (
        f"Hypervolume of {numbers['points']} points over moocore's own call on the same array, medians: {ratios} "
        f"(promised <= 1.1). Page of 10 methods, 11 preferences and 256 prompts, by the length of an answer: "
        f"{sizes} (promised <= 10 MB)."
    )


SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "grid_ratio": _grid,
    "update_ratio": _updates,
    "dpo_ratio": _dpo,
    "reward_ratios": _rewards,
    "judge": _judge,
}
"""Key of the record -> its sentence below the table."""


def main() -> None:
    """Measure what is requested and write both files."""
    every = benches()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, help="runs of each command; else its own number")
    parser.add_argument(
        "--only", action="append", choices=[*(bench.name for bench in every), "updates", "dpo"], help="repeatable"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where cpu.json and cpu.md are written")
    parser.add_argument("--inside", nargs=2, metavar=("GRID", "ONE"), help=argparse.SUPPRESS)
    parser.add_argument("--rewards", action="store_true", help="only the ratios of reward models, as JSON")
    parser.add_argument("--judge", action="store_true", help="only the judge's speed and the page's size, as JSON")
    parser.add_argument("--inside-updates", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--inside-dpo", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside_dpo:
        print(json.dumps(steps.inside_dpo(options.repeats)))
        return
    if options.inside_updates:
        print(json.dumps(steps.inside_updates(options.repeats)))
        return
    if options.inside:
        print(json.dumps(inside(Path(options.inside[0]), Path(options.inside[1]), options.repeats)))
        return
    if options.rewards:
        print(json.dumps(rewards.reward_ratios(options.repeats or 15)))
        return
    if options.judge:
        print(json.dumps(judge.judged(options.repeats or 25)))
        return
    record: dict[str, Any] = {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:  # the base is in the cache from here on
        run(["train", "prompting", "--no-eval", "--results", folder])
    for bench in every:
        if options.only and bench.name not in options.only:
            continue
        row = measure(bench, options.repeats)
        record["rows"].append(row)
        print(f"{row['name']:14} {row['seconds']:8.2f} s  {row['peak_bytes'] / 2**20:7.0f} MiB", flush=True)
    everything = not options.only or {"eval-grid", "eval-one"} <= set(options.only)
    record["grid_ratio"] = grid_ratio(max(options.repeats or 0, 5)) if everything else None
    updates = not options.only or "updates" in options.only
    record["update_ratio"] = update_ratio(max(options.repeats or 0, 30)) if updates else None
    stepped = not options.only or "dpo" in options.only
    record["dpo_ratio"] = in_one_process("--inside-dpo", max(options.repeats or 0, 6)) if stepped else None
    record["reward_ratios"] = rewards.reward_ratios(max(options.repeats or 0, 15)) if everything else None
    record["judge"] = judge.judged(max(options.repeats or 0, 25)) if everything else None
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cpu.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.out / "cpu.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
