"""Renew the card hashes and run identifiers in published comparisons, after the way of hashing has changed.

    python results/published/renew_ids.py [--dry-run] [FOLDER]...   # default: every folder beside this file
    python -m moalign.comparison.publish results/published results/LEADERBOARD.md   # then: the pages, of the records

A record holds what is needed to make its hashes again: the command of every run. Each is planned as today. Where the
former way of hashing (every default written out) gives the recorded hash for that plan, nothing but the hashing has
changed, and today's hash takes its place wherever it stands in ``compare.json``. Where it does not (the recipe or the
card has changed since) or the command cannot be planned here (its model is missing), a line says so and the identifier
stays as it is. Nothing else in a record changes, and a second call finds nothing to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from moalign.config import card as cards
from moalign.core.errors import RequestError
from moalign.experiment.train import Plan, TrainRequest, plan
from moalign.runs import atomic, store
from moalign.tasks.task import Task

REMEDY = "restore it from git"


def main(arguments: list[str]) -> int:
    """Renew the records of the folders; returns 1 when an identifier could not be renewed."""
    parser = argparse.ArgumentParser(description="Renew card hashes and run identifiers of published comparisons.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="say what would change; write nothing")
    options = parser.parse_args(arguments)
    folders = options.folders or sorted(path.parent for path in Path(__file__).parent.glob("*/compare.json"))
    left = [renew(folder / "compare.json", options.dry_run) for folder in folders]
    return 1 if any(left) else 0


def renew(file: Path, dry_run: bool = False) -> list[str]:
    """Renew one record; returns the identifiers that had to stay as they are."""
    record = atomic.read_json(file, REMEDY)
    renewed, left, task = _runs_and_card(record)
    folder = Path(record["json"]).parent.name
    name = _comparison(record, renewed, task)
    if name is None:
        left[folder] = "the name of the comparison's folder does not follow from the record"
    else:
        renewed[folder] = name
    changed = {old: new for old, new in renewed.items() if old != new}
    text = file.read_text(encoding="utf-8")
    for old, new in changed.items():
        text = re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", new, text)
    if changed and not dry_run:
        atomic.write_text(file, text)
    print(f"{file}: {len(changed)} renewed, {len(renewed) - len(changed)} as they were, {len(left)} left")
    for old, reason in left.items():
        print(f"  {old} left: {reason}")
    return list(left)


def _runs_and_card(record: dict[str, Any]) -> tuple[dict[str, str], dict[str, str], Task | None]:
    """Return old -> new of the card's hash and of the runs, what must stay with the reason, and the task."""
    renewed: dict[str, str] = {}
    left: dict[str, str] = {}
    task: Task | None = None
    for run in [run for row in record["rows"] for run in row["runs"]]:
        try:
            made = plan(request_of(run["command"]))
        except RequestError as error:
            left[run["run_id"]] = f"{run['command']}: {error}"
            continue
        if record["card_hash"] not in (made.task.hash, *former_card_hashes(made.task)):
            return {}, {record["card_hash"]: "the task card, or what it points to, has changed since"}, None
        task = made.task
        renewed[record["card_hash"]] = task.hash
        if run["run_id"] in (made.folder.name, *former_run_ids(made, record["card_hash"])):
            renewed[run["run_id"]] = made.folder.name
        else:
            left[run["run_id"]] = f"{run['command']}: its recipe or settings have changed since"
    return renewed, left, task


def request_of(command: str) -> TrainRequest:
    """Return the request of a ``moalign train`` command as records hold it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("--task")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--prefs", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--results", type=Path, default=Path("results"))
    given = parser.parse_args(shlex.split(command)[2:])
    return TrainRequest(
        given.method,
        given.task,
        given.recipe,
        prefs=given.prefs,
        overrides=given.set,
        seed=given.seed,
        results=given.results,
    )


def former_card_hashes(task: Task) -> set[str]:
    """Return the card's hash with every default but null written out; also with the one answer a prompt of before."""
    left_out = cards._NOT_HASHED | ({"model"} if task.identity else set())
    hashes = set()
    for samples in (task.card.evaluation.samples, 1):
        content = task.card.model_dump(mode="json", exclude=left_out, exclude_none=True)
        content["evaluation"]["samples"] = samples
        for objective in content["objectives"]:
            objective.pop("called", None)  # there was no such setting
        text = json.dumps([cards._without_folders(content), task.identity], sort_keys=True, ensure_ascii=False)
        hashes.add(hashlib.sha256(text.encode()).hexdigest()[:16])
    return hashes


def former_run_ids(made: Plan, card_hash: str) -> set[str]:
    """Return the run's identifier with every default written out; also without one of them, for a setting added since.

    A setting that did not exist acted as its default does: the run would be the same one today.
    """
    config = made.config.model_dump(mode="json")
    at_default = set(config) - set(made.config.model_dump(exclude_defaults=True))
    request = {
        "card": card_hash,
        "policy": made.recipe.policy.model_dump(mode="json"),
        "seed": made.seed,
        "prefs": made.given,
        "method": made.method.name,
        "task": made.card.name,
        **({"holdout": made.holdout} if made.holdout else {}),
    }
    configs = [config, *({k: v for k, v in config.items() if k != name} for name in at_default)]
    return {store.identity({**request, "config": settings}) for settings in configs}


def _comparison(record: dict[str, Any], renewed: dict[str, str], task: Task | None) -> str | None:
    """Return the new name of the comparison's folder; None when its present name does not follow from the record."""
    grid = re.search(r"--grid (\d+)", record["command"])
    runs = [run["run_id"] for row in record["rows"] for run in row["runs"]]

    def name(rename: dict[str, str], samples: int | None) -> str:
        content: dict[str, Any] = {
            "card": rename.get(record["card_hash"], record["card_hash"]),
            "runs": sorted(rename.get(run, run) for run in runs),
            "grid": int(grid[1]) if grid else None,
        }
        content |= {"samples": samples} if samples is not None else {}
        return f"{record['task']}-{store.identity(content)[:8]}"

    present = Path(record["json"]).parent.name
    if present not in [name({}, samples) for samples in (None, record["samples"])]:
        return None
    if task is None:
        return present
    return name(renewed, None if task.card.evaluation.samples == record["samples"] else record["samples"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
