"""Finds finished runs by what a person calls them, and opens them with the results folder that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.evaluation.evaluate import preferences_for
from moalign.experiment.train import context_of
from moalign.methods import registry
from moalign.methods.base import Method
from moalign.runs.run import Run
from moalign.runs.store import RunStore
from moalign.training.job import RunContext


def find(names: Sequence[str], results: Path) -> list[Run]:
    """Return the named runs in order, each once; without names the run that finished last.

    Raises RequestError for an unknown or ambiguous name, and when there is no finished run at all.
    """
    store = RunStore(results)
    if not names:
        return [store.newest_finished()]
    found = [store.find(name) for name in names]
    return list({run.path.resolve(): run for run in found}.values())


def best_of(file: Path, comparison: Mapping[str, Any], wanted: Sequence[Preference], results: Path) -> tuple[Run, int]:
    """Return the best-ranked trained run of a comparison that answers for every preference in ``wanted``, and its rank.

    Of a method with several seeds it is the first that finished. A method that trains nothing is passed over: what is
    asked for is what training made.

    Args:
        file: the ``compare.json``; runs are looked for where it says, else in the results folder that it lies in.
        comparison: its content.

    Raises:
        RequestError: no row can answer (why not, row by row), or the run that can is gone or has changed.
    """
    layout = file.resolve().parents
    home = layout[2] if layout[1].name == "compare" else results
    refused = []
    for row in sorted((row for row in comparison["rows"] if row["rank"]), key=lambda row: int(row["rank"])):
        told = next((run for run in row["runs"] if run["status"] == "done"), None)
        if told is None:
            continue
        run = find([told["run"] if Path(told["run"]).is_dir() else told["run_id"]], home)[0]
        if not registry.get(run.record.method).capabilities.trains:
            refused.append(f"{row['label']} trains nothing")
            continue
        method, context = opened(run, home)
        try:
            preferences_for(method, context, wanted)
        except RequestError as error:
            refused.append(str(error))
        else:
            return run, int(row["rank"])
    raise RequestError(f"{file}: no run can be asked: {'; '.join(refused) or 'none is finished'}")


def results_of(run: Run, given: Path) -> Path:
    """Return the results folder of a run: the one it lies in, else ``given``.

    A run named by its path brings its own folder, whose normaliser its scores belong to.
    """
    layout = run.path.resolve().parents
    return layout[3] if len(layout) > 3 and layout[2].name == "runs" else given


def opened(run: Run, given: Path, progress: Progress = silent) -> tuple[Method, RunContext]:
    """Return the method and context of a finished run; see :func:`moalign.experiment.train.context_of`."""
    return context_of(run, results_of(run, given), progress)
