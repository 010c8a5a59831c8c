"""Reward models as runs: ``<results>/reward-models/<pairs>/<loss>/<run-id>/``, found by the hash of the request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moalign.config.objectives import ClassifierObjective
from moalign.core import seeds
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.lm import model_folder
from moalign.reward_models import pairs
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.settings import RewardSettings, check_loss
from moalign.runs.run import Run
from moalign.runs.store import RunStore

MODEL = "model"
"""The model's folder inside its run."""


class RewardStore(RunStore):
    """The reward models below a results folder."""

    kind = "reward-models"
    command = "moalign reward train"


@dataclass(frozen=True)
class RewardRequest:
    """A checked request for a reward model; see :func:`make`."""

    name: str
    """Name of the pairs: a task's, or that of the data sets."""
    settings: RewardSettings
    backbone: str
    revision: str | None
    parts: dict[str, list[PairSet]]
    """The data sets by split."""
    seed: int
    results: Path
    notice: str | None = None
    """A notice for the user about the settings, if any."""
    as_given: dict[str, Any] = field(default_factory=dict)

    @property
    def train_sets(self) -> list[PairSet]:
        """The pairs that are trained on."""
        return self.parts["train"]

    @property
    def heads(self) -> list[str]:
        """The names of the model's outputs."""
        return [pair_set.name for pair_set in self.train_sets] if self.settings.heads == "each" else ["reward"]

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        total = sum(map(len, self.train_sets))
        return self.settings.steps or math.ceil(self.settings.epochs * total / self.settings.batch)

    def identity(self) -> dict[str, Any]:
        """Return what the run's identifier is the hash of; settings at their default are left out."""
        folder = model_folder.resolve(self.backbone, self.revision, "--model")
        return {
            "settings": self.settings.model_dump(mode="json", exclude_defaults=True),
            "backbone": model_folder.fingerprint(folder, "--model"),
            "pairs": content(self.parts),
            "seed": self.seed,
        }


def content(parts: dict[str, list[PairSet]]) -> str:
    """Return 16 hex digits over the pairs of every split."""
    return pairs.content_hash([pair_set for name in sorted(parts) for pair_set in parts[name]])


def make(
    name: str,
    settings: RewardSettings,
    backbone: str,
    sets: Sequence[PairSet],
    *,
    revision: str | None = None,
    seed: int = 0,
    results: Path = Path("results"),
    as_given: dict[str, Any] | None = None,
) -> RewardRequest:
    """Check a request and split its pairs; raises RequestError for what cannot be trained."""
    if not 0 <= seed <= seeds.MOST:
        raise RequestError(f"seed: found {seed}; allowed: 0 to {seeds.MOST}")
    fitting, notice = check_loss(settings, [pair_set.name for pair_set in sets])
    parts = pairs.split_all(sets, fitting.splits)
    if fitting.members > 1 and not any(map(len, parts["calibration"])):
        raise RequestError(
            f"members {fitting.members}: members are put on one scale by the pairs of the split calibration, and it is "
            "empty; give more pairs or larger shares (--set splits={train: .., calibration: .., eval: ..})"
        )
    return RewardRequest(name, fitting, backbone, revision, parts, seed, results, notice, as_given or {})


def obtain(request: RewardRequest, progress: Progress = silent, wait: bool = False) -> tuple[Run, bool]:
    """Train the reward model unless it is trained already; returns (run, whether it was).

    The model's folder is ``<run>/model``. ``wait``: wait for another process that trains it instead of refusing.
    Raises what :func:`moalign.reward_models.training.train` raises.
    """
    identity = request.identity()
    method, store = request.settings.loss, RewardStore(request.results)
    recipe = {
        "settings": request.settings.model_dump(mode="json"),
        "model": request.backbone,
        "revision": request.revision,
    }
    existing = store.lookup(method, request.name, identity, recipe)
    if existing is not None and existing.record.status == "done":
        return existing, True
    run = store.open(
        method,
        request.name,
        identity,
        card_hash=identity["pairs"],
        seed=request.seed,
        recipe=recipe,
        as_given=request.as_given,
    )
    from moalign.lm.trainers import quiet_libraries

    with run.training(wait) as meter:
        if meter is None:
            return run, True
        with quiet_libraries():
            from moalign.reward_models.training import RewardJob, train

            notes = train(RewardJob(run, request, meter, progress))
        sizes = {split: {pair_set.name: len(pair_set) for pair_set in sets} for split, sets in request.parts.items()}
        run.record.notes = {**notes, "pairs": sizes, "heads": request.heads, "said": request.notice}
    return run, False


def settings_of(run: Run) -> RewardSettings:
    """Return what a reward model was trained with; RequestError for a policy's run, or a damaged record."""
    try:
        return RewardSettings.model_validate(run.record.recipe["settings"])
    except (KeyError, ValidationError) as error:
        raise RequestError(
            f"run {run.path}: it is no run of moalign reward train: its record (method {run.record.method}) holds no "
            "settings of a reward model; moalign eval is for runs of moalign train"
        ) from error


def objective(run: Run, name: str = "reward", head: str | None = None) -> ClassifierObjective:
    """Return the trained model as an objective of a task card.

    ``head`` names one of several heads; None is right for a model with one. Of an ensemble it is the members' mean.
    """
    settings = settings_of(run)
    members = "all" if settings.members > 1 else None
    return reading((run.path / MODEL).resolve(), settings, name=name, label=head, members=members)


def reading(folder: Path, settings: RewardSettings, **more: Any) -> ClassifierObjective:
    """Return an objective that reads texts as a model in ``folder`` was trained to; ``more`` of its settings."""
    how = {"template": settings.template, "max_length": settings.max_tokens}
    return ClassifierObjective(**{"name": "reward", "kind": "hf-classifier", "model": str(folder), **how, **more})
