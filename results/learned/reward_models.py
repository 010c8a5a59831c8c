"""Reward models of several sizes on more and fewer pairs: how well calibrated are they, and does it matter?

Three parts, in reward_models.yaml beside this file:

* ``ranking``: does the calibration error tell which of many reward models leads to the truth? Each picks the best of n
  answers of the sandbox's base at every preference, and the exact rewards judge what it picked. Nothing is trained
  against it: best-of-n is the mildest way to optimise. With ``--policies`` a few of them are what a method trains on.
* ``sandbox``: Bradley-Terry, multitask and MORE on five annotator groups that disagree.
* ``hh``: the same on real people's pairs. A model that is a folder is looked for in ``../shared``, or where
  ``MOALIGN_SHARED`` says; where it is not, its cells are left out.

``bt`` is a reward model for each group, trained on the group's own pairs alone, in as many steps of a batch as much
smaller: together they read what ``multitask`` and ``more`` read, and each is judged on its own group. The last two are
one reward for all groups.

Every finished cell is kept in ``reward_models.json`` at once; the same command goes on where it ended, and an
interrupted training from its checkpoint. After ``--minutes`` no further cell is begun. ``reward_models.md`` and
``reward_models.png`` are made of the record (by reward_models_page.py). The command may run several times side by side:
each process takes the next cell that none has begun. What the frozen layers of SmolLM2 say of the texts is kept in
``reward-models/states`` of the results (about 2 GB) and may go when all cells are there.

    python results/learned/reward_models.py [--minutes M] [--parts [ranking] [sandbox] [hh]] [--seeds N] [--policies]
        [--page] [--settings FILE] [--results DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import reward_models_page as page
from reward_models_ranking import chosen, of_policy, of_ranking
from reward_models_training import model_of, of_people, of_sandbox

from moalign.config import yaml_lines
from moalign.core.errors import MoalignError, RequestError
from moalign.core.paths import CHECKOUT

HERE = Path(__file__).resolve().parent
PARTS = ("ranking", "sandbox", "hh")
GROWING = ("layers", "pairs", "flipped", "losses", "seeds", "count")
"""What may grow in a part that has cells already: everything else decides what a cell is."""

Cell = dict[str, Any]
"""One number of layers, of pairs, and so on: what is trained and judged at once."""


# -- which cells there are ------------------------------------------------------------------------------------------


def cells(spec: Mapping[str, Any], part: str) -> list[Cell]:
    """Return a part's cells: all of seed 0 before those of seed 1, and the cheap ones first."""
    mine = spec[part]
    backbones = mine.get("backbones", {"sandbox": mine})
    every = [
        {
            "part": part,
            "backbone": name,
            "layers": layers,
            "loss": loss,
            "pairs": pairs,
            "flipped": flipped,
            "seed": seed,
        }
        for name, backbone in backbones.items()
        for layers, loss, pairs, flipped, seed in itertools.product(
            backbone["layers"],
            mine.get("losses", ["multitask"]),
            backbone["pairs"],
            mine.get("flipped", [0.0]),
            range(mine["seeds"]),
        )
    ]
    order = list(backbones)
    return sorted(every, key=lambda cell: (cell["seed"], order.index(cell["backbone"]), cell["layers"] * cell["pairs"]))


def fixed(settings: Any) -> Any:
    """Return settings without what may grow."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: fixed(value) for key, value in settings.items() if key not in GROWING}


def key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a cell from the others."""
    return tuple(cell[name] for name in ("part", "backbone", "layers", "loss", "pairs", "flipped", "seed"))


def opened(path: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record, new or as it was left; raises RequestError when its cells were made by other settings."""
    if not path.is_file():
        return {"settings": dict(spec), "cells": []}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part in sorted({cell["part"] for cell in record["cells"]}):
        if fixed(record["settings"][part]) != fixed(spec[part]):
            raise RequestError(
                f"{path}: its cells of {part} were made by other settings than are given now; put the "
                "settings back, or move the record away to begin again"
            )
    return {**record, "settings": dict(spec)}


# -- the command ----------------------------------------------------------------------------------------------------

WORK: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], Path], dict[str, Any]]] = {
    "ranking": of_ranking,
    "sandbox": of_sandbox,
    "hh": of_people,
    "policies": of_policy,
}


def missing(record: Mapping[str, Any], wanted: Sequence[Cell]) -> Iterator[Cell]:
    """Yield the cells that the record lacks."""
    there = {key(cell) for cell in record["cells"]}
    yield from (cell for cell in wanted if key(cell) not in there)


def write_page(record: Mapping[str, Any], out: Path) -> None:
    """Write the page and the figure."""
    (out / "reward_models.md").write_text(page.markdown(record), encoding="utf-8")
    (out / "reward_models.png").write_bytes(page.draw(record))


def keep(path: Path, lock: Path, spec: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Add a cell to the record as it stands by now, with what other parts have put there; returns the record."""
    from filelock import FileLock

    from moalign.runs import atomic, environment

    with FileLock(str(lock)):
        record = opened(path, spec)
        record["cells"].append(cell)
        record["environment"] = environment.capture()
        atomic.write_json(path, record)
    return record


def run(options: argparse.Namespace, spec: Mapping[str, Any]) -> None:
    """Train and judge what the record lacks, until the time is over; then write the page."""
    path, started = options.out / "reward_models.json", time.monotonic()
    record = opened(path, spec)
    wanted = [cell for part in options.parts for cell in cells(spec, part)]
    absent = [name for name, how in spec["hh"]["backbones"].items() if model_of(how["model"]) is None]
    if absent and "hh" in options.parts:
        wanted = [cell for cell in wanted if cell["backbone"] not in absent]
        print(f"hh: left out {', '.join(absent)}, which is not there; set MOALIGN_SHARED to the folder that has it")
    if options.policies:
        wanted += chosen(record, spec)
    folder = options.results / "reward-models"
    for cell in [] if options.page else wanted:
        if time.monotonic() - started >= 60 * options.minutes:
            break
        with taken(folder, cell) as mine:
            record = opened(path, spec)  # as other processes have left it by now
            if mine and list(missing(record, [cell])):
                record = keep(path, folder / "scaling.lock", spec, measured(cell, spec, options.results))
    write_page(record, options.out)
    print(f"{len(list(missing(record, wanted)))} cells are left")


@contextlib.contextmanager
def taken(folder: Path, cell: Cell) -> Iterator[bool]:
    """Hold a cell while it is worked on; yields False where another process holds it."""
    from filelock import FileLock, Timeout

    (folder / "locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / "locks" / ("-".join(map(str, key(cell))) + ".lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def measured(cell: Cell, spec: Mapping[str, Any], results: Path) -> Cell:
    """Train and judge a cell; returns it with its numbers and what they took."""
    begun, cpu = time.monotonic(), time.process_time()
    numbers = WORK[cell["part"]](cell, spec, results)
    spent = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    shown = {name: round(numbers[name], 4) for name in ("accuracy", "ece", "true_ece", "share") if name in numbers}
    print(*key(cell), shown, f"{spent['cpu_seconds']:.0f} s of CPU", flush=True)
    return {**cell, **numbers, **spent}


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none, with --policies alone")
    parser.add_argument("--seeds", type=int, help="fewer or more seeds than the settings say, for every part")
    parser.add_argument("--policies", action="store_true", help="train the method on some of the ranked reward models")
    parser.add_argument("--page", action="store_true", help="train nothing; make page and figure from the record")
    parser.add_argument("--results", type=Path, default=CHECKOUT / "results", help="where models and runs are kept")
    parser.add_argument("--settings", type=Path, default=HERE / "reward_models.yaml")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    spec = yaml_lines.load(options.settings).data
    for part in PARTS:
        spec[part]["seeds"] = options.seeds or spec[part]["seeds"]
    try:
        for folder in (options.out, options.results / "reward-models"):
            folder.mkdir(parents=True, exist_ok=True)
        run(options, spec)
    except MoalignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
