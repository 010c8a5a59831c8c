"""Finds finished runs by what a person calls them, and opens them with the results folder that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moalign.methods.base import Method, RunContext
from moalign.runs.run import Run
from moalign.runs.store import RunStore
from moalign.tasks.task import Say, silent
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


def results_of(run: Run, given: Path) -> Path:
    """Return the results folder of a run: the one it lies in, else ``given``.

    A run named by its path brings its own folder, whose normaliser its scores belong to.
    """
    layout = run.path.resolve().parents
    return layout[3] if len(layout) > 3 and layout[2].name == "runs" else given


def opened(run: Run, given: Path, say: Say = silent) -> tuple[Method, RunContext]:
    """Return the method and context of a finished run; see :func:`moalign.workflow.train.context_of`."""
    return context_of(run, results_of(run, given), say)
