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
        # wait4 tells the usage of this child and of the children that it waited for, and of no earlier one.
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if os.waitstatus_to_exitcode(status) != 0:
            told = err.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{shlex.join(['moalign', *arguments])} failed:\n{told}")
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
    """Return (prepare, command) that evaluate a briefly trained run: how long it was trained does not matter."""
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
            "the sandbox's whole suite of 16 methods from an empty cache: trained, evaluated, compared",
            lambda folder: ["compare", "--task", "sandbox", "--results", str(folder), "--json"],
            480,
            1,
            cold_cache=True,
        ),
    ]


def measure(bench: Bench, repeats: int | None) -> dict[str, Any]:
    """Run one bench; returns its row."""
    found = []
    for _ in range(repeats or bench.repeats):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            cache = folder / "cache" if bench.cold_cache else None
            for arguments in bench.prepare(folder) if bench.prepare else []:
                run(arguments, cache)
            asked = bench.command(folder)
            found.append(run(asked, cache))
            command = shlex.join(["moalign", *asked]).replace(str(folder), "DIR")
    return {
        "name": bench.name,
        "what": bench.what,
        "command": command,
        "seconds": round(statistics.median(one.seconds for one in found), 3),
        "all_seconds": [round(one.seconds, 3) for one in found],
        "peak_bytes": int(statistics.median(one.peak_bytes for one in found)),
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

    Measured in one process after a warm-up, so that neither imports nor loading the model water it down.
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
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def inside(grid: Path, one: Path, repeats: int) -> dict[str, Any]:
    """Time answering and scoring for the runs in two results folders, in this process."""
    from moalign.evaluation import evaluate
    from moalign.experiment import finished

    opened = {}
    for name, folder in (("grid", grid), ("one", one)):
        method, context = finished.opened(finished.find([], folder)[0], folder)
        opened[name] = method, context, (context.task.grid if name == "grid" else [(0.5, 0.5)])
    times: dict[str, list[float]] = {"grid": [], "one": []}
    for _ in range(repeats + 1):  # the first loads the model and warms the allocator
        for name, asked in opened.items():  # in turn, so that both meet the same load of the machine
            started = time.perf_counter()
            table, *_ = evaluate.respond(*asked)
            times[name].append(time.perf_counter() - started)
            assert len(table) == 11 * 128
    middle = {name: round(statistics.median(found[1:]), 3) for name, found in times.items()}
    told: dict[str, Any] = {name: {"responses": 11 * 128, "seconds": seconds} for name, seconds in middle.items()}
    told["ratio"] = round(told["grid"]["seconds"] / told["one"]["seconds"], 3)
    return told


def in_one_process(option: str, repeats: int) -> dict[str, Any]:
    """Run this file with a hidden option in a fresh process; returns what it prints."""
    command = [sys.executable, str(Path(__file__).resolve()), option, "--repeats", str(repeats)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def update_ratio(repeats: int) -> dict[str, Any]:
    """Return the time of MOC's update over that of PPO with a scalar reward, for :data:`steps.OBJECTIVES`.

    Measured in one process, in turn, with the batch of MOC's sandbox recipe.
    """
    return in_one_process("--inside-updates", repeats)


def table(told: dict[str, Any]) -> str:
    """Return the numbers as Markdown."""
    here = told["machine"]
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
    for row in told["rows"]:
        limit = "" if row["limit_seconds"] is None else f"<= {row['limit_seconds']:g}"
        size = row["peak_bytes"] / 2**20
        lines.append(f"| {row['what']} | `{row['command']}` | {row['seconds']:.2f} | {limit} | {size:.0f} |")
    for name, sentence in SENTENCES.items():
        if told.get(name) is not None:
            lines += ["", sentence(told[name])]
    return "\n".join(lines) + "\n"


def _grid(found: dict[str, Any]) -> str:
    return (
        f"Answering and scoring {found['grid']['responses']} responses in one warm process: 11 preferences "
        f"take {found['grid']['seconds']:.2f} s, one preference {found['one']['seconds']:.2f} s; "
        f"ratio {found['ratio']:.2f} (promised <= 1.5)."
    )


def _updates(found: dict[str, Any]) -> str:
    ratios = ", ".join(
        f"{found[f'moc-{size}']['ratio']:.2f} with {size} objectives (whole step, sampling included: "
        f"{found[f'moc-{size}']['ratio_of_steps']:.2f})"
        for size in steps.OBJECTIVES
    )
    return (
        f"MOC's update over that of PPO with one reward (MORLHF), {found['batch']} responses, medians of "
        f"{found['repeats']} in one warm process: {ratios}; promised <= 1.1."
    )


def _dpo(found: dict[str, Any]) -> str:
    return (
        f"A step of MODPO over one of plain DPO, {found['batch']} pairs, medians of {found['steps']} steps in one "
        f"warm process: {found['ratio']:.2f} (promised <= 1.05); over trl's own loss: {found['ratio_to_trl']:.2f}."
    )


def _rewards(found: dict[str, Any]) -> str:
    return (
        f"Reward models, medians of ratios in one process: scoring reaches {found['scoring']:.2f} of the throughput "
        "of a plain batched forward pass on length-sorted batches (promised >= 0.95); a step with MORE takes "
        f"{found['more_step']:.2f} of one with multitask (promised <= 1.1)."
    )


def _judge(found: dict[str, Any]) -> str:
    ratios = ", ".join(f"{m} objectives {ratio:.2f}" for m, ratio in found["hypervolume"].items())
    sizes = ", ".join(
        f"{words} words {made['bytes'] / 1e6:.1f} MB in {made['seconds']:.1f} s"
        for words, made in found["page"].items()
    )
    return (
        f"Hypervolume of {found['points']} points over moocore's own call on the same array, medians: {ratios} "
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
"""What a part of the record says below the table."""


def main() -> None:
    """Measure everything asked for and write both files."""
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
    asked = parser.parse_args()
    if asked.inside_dpo:
        print(json.dumps(steps.inside_dpo(asked.repeats)))
        return
    if asked.inside_updates:
        print(json.dumps(steps.inside_updates(asked.repeats)))
        return
    if asked.inside:
        print(json.dumps(inside(Path(asked.inside[0]), Path(asked.inside[1]), asked.repeats)))
        return
    if asked.rewards:
        print(json.dumps(rewards.reward_ratios(asked.repeats or 15)))
        return
    if asked.judge:
        print(json.dumps(judge.judged(asked.repeats or 25)))
        return
    told: dict[str, Any] = {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:  # the base is in the cache from here on
        run(["train", "prompting", "--no-eval", "--results", folder])
    for bench in every:
        if asked.only and bench.name not in asked.only:
            continue
        row = measure(bench, asked.repeats)
        told["rows"].append(row)
        print(f"{row['name']:14} {row['seconds']:8.2f} s  {row['peak_bytes'] / 2**20:7.0f} MiB", flush=True)
    whole = not asked.only or {"eval-grid", "eval-one"} <= set(asked.only)
    told["grid_ratio"] = grid_ratio(max(asked.repeats or 0, 5)) if whole else None
    updates = not asked.only or "updates" in asked.only
    told["update_ratio"] = update_ratio(max(asked.repeats or 0, 30)) if updates else None
    stepped = not asked.only or "dpo" in asked.only
    told["dpo_ratio"] = in_one_process("--inside-dpo", max(asked.repeats or 0, 6)) if stepped else None
    told["reward_ratios"] = rewards.reward_ratios(max(asked.repeats or 0, 15)) if whole else None
    told["judge"] = judge.judged(max(asked.repeats or 0, 25)) if whole else None
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "cpu.json").write_text(json.dumps(told, indent=2) + "\n")
    (asked.out / "cpu.md").write_text(table(told))
    print(table(told))


if __name__ == "__main__":
    main()
