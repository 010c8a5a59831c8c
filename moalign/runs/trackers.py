"""Mirrors of a run's metrics in TensorBoard, W&B, trackio or MLflow, through accelerate's own trackers.

``metrics.jsonl`` is the record: a mirror receives exactly its lines, and no number is computed from a mirror. So a
mirror that fails (no network, a full disk) is closed and named once, and training goes on.

Mirrors that keep files keep them in ``<results>/trackers/<tracker>/``, unless the library's own settings (its
environment variables) say otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moalign.core import foreign
from moalign.core.errors import RequestError
from moalign.core.text import visible

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""Tracker -> the package that it needs, by the name it is imported and installed with."""

_STORES = {"trackio": "TRACKIO_DIR", "wandb": "WANDB_DIR", "mlflow": "MLFLOW_TRACKING_URI"}
"""Tracker -> the environment variable for the place where its library keeps files."""

_STEPS_GROW = {"wandb"}
"""Trackers that drop a step below the last one. Every phase of a run begins again at step 1, so they count steps
themselves and receive the phase's step as one more number."""

Warn = Callable[[str], None]


def require_installed(names: Sequence[str]) -> None:
    """Raise RequestError naming every tracker whose library is not installed."""
    problems = [
        f"trackers: {name}: the package {PACKAGES[name]} is not installed; pip install {PACKAGES[name]}, or leave "
        f"{name} out (metrics.jsonl holds every metric in any case)"
        for name in names
        if importlib.util.find_spec(PACKAGES[name]) is None
    ]
    if problems:
        raise RequestError(*problems)


class Mirrors:
    """The trackers of one run; started with the first line of metrics, so a finished run starts none."""

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], warn: Warn | None = None
    ) -> None:
        """Name the trackers of the run in ``folder`` (``<results>/runs/<task>/<method>/<run-id>``).

        ``settings`` are the run's, for trackers that show them; ``warn`` is called once for each tracker that fails
        (None: a line on stderr).
        """
        self._waiting = list(dict.fromkeys(names))
        self._open: dict[str, Any] = {}
        self._folder = folder
        self._settings = dict(settings)
        self._warn = warn or (lambda text: print(visible(f"warning: {text}"), file=sys.stderr, flush=True))

    def __enter__(self) -> Mirrors:
        return self

    def __exit__(self, *_: object) -> None:
        """Close every tracker."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
            self._open.pop(name, None)

    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """Send every tracker one line of ``metrics.jsonl``: numbers only, each as ``phase/name``."""
        numbers = {
            f"{phase}/{key}": value
            for key, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        while self._waiting:
            name = self._waiting.pop(0)
            self._try(name, self._start, name)
        for name, tracker in list(self._open.items()):
            if name in _STEPS_GROW:
                self._try(name, tracker.log, {**numbers, f"{phase}/step": step}, None)
            else:
                self._try(name, tracker.log, numbers, step)

    def _start(self, name: str) -> None:
        from accelerate import PartialState, tracking

        PartialState()  # accelerate's trackers log, and its logger needs this state; harmless where it exists
        *_, task, method, run_id = self._folder.parts
        place = (self._folder.parents[3] / "trackers" / name).resolve()
        place.mkdir(parents=True, exist_ok=True)
        if name in _STORES:
            os.environ.setdefault(_STORES[name], f"sqlite:///{place}/mlflow.db" if name == "mlflow" else str(place))
        project, title, settings = "moalign", f"{task}/{method}/{run_id}", self._settings
        if name == "tensorboard":
            tracker = tracking.TensorBoardTracker(title, place)
        elif name == "wandb":
            tracker = tracking.WandBTracker(project, name=title, id=run_id, resume="allow", config=settings)
        elif name == "trackio":
            tracker = tracking.TrackioTracker(project, name=title, resume="allow", config=settings)
        else:
            tags = {key: str(value)[:500] for key, value in settings.items()}
            tracker = tracking.MLflowTracker(experiment_name=project, run_name=title, tags=tags)
        tracker.start()
        self._open[name] = tracker

    def _try(self, name: str, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            with foreign.call():
                work(*arguments)
        except foreign.STOPS:
            raise
        except BaseException as error:  # any error of a third-party library: a mirror must not end a run
            self._open.pop(name, None)
            message = " ".join(foreign.described(error).split())
            self._warn(f"{name}: {message}; it is told no more, metrics.jsonl goes on")
