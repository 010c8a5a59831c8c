"""Finds finished runs by what a person calls them, and opens them with the results folder that they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moalign.errors import RequestError
from moalign.methods.base import Method, RunContext
from moalign.preferences import Preference
from moalign.runs.run import Run
from moalign.runs.store import RunStore
from moalign.tasks.task import Say, silent
from moalign.workflow.evaluate import preferences_for
from moalign.workflow.train import context_of


def find(names: Sequence[str], results: Path) -> list[Run]:
    """Return the named runs in order, each once; without names the run that finished last.

    Raises RequestError for an unknown or ambiguous name, and when there is no finished run at all.
    """
    store = RunStore(results)
    if not names:
        return [store.newest_finished()]
    found = [store.find(name) for name in names]
    return list({run.path.resolve(): run for run in found}.values())


def best_of(comparison: Path, wanted: Sequence[Preference], results: Path) -> Run:
    """Return the run of a comparison that is first in its ranking and answers for every preference in ``wanted``.

    Of a method with several seeds it is the first. ``comparison`` is a ``compare.json`` or the folder that holds it.

    Raises RequestError for a file that is no comparison, and when no row can answer.
    """
    file = comparison / "compare.json" if comparison.is_dir() else comparison
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        rows = sorted((row for row in told["rows"] if row["runs"] and row["rank"]), key=lambda row: int(row["rank"]))
        places = [str(row["runs"][0]["run"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{file}: it is no comparison that moalign wrote ({type(error).__name__})") from None
    refused = "it has no finished run"
    for place in places:
        run = find([place], results)[0]
        method, context = opened(run, results)
        try:
            preferences_for(method, context, wanted)
        except RequestError as error:
            refused = str(error)
        else:
            return run
    raise RequestError(f"{file}: none of its runs answers for these preferences; the last said: {refused}")


def results_of(run: Run, given: Path) -> Path:
    """Return the results folder of a run: the one it lies in, else ``given``.

    A run named by its path brings its own folder, whose normaliser its scores belong to.
    """
    layout = run.path.resolve().parents
    return layout[3] if len(layout) > 3 and layout[2].name == "runs" else given


def opened(run: Run, given: Path, say: Say = silent) -> tuple[Method, RunContext]:
    """Return the method and context of a finished run; see :func:`moalign.workflow.train.context_of`."""
    return context_of(run, results_of(run, given), say)
