"""Reward models as runs: ``<results>/reward-models/<pairs>/<loss>/<run-id>/``, found by the hash of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moalign.config.objectives import ClassifierObjective
from moalign.core.progress import Progress, silent
from moalign.lm import model_folder
from moalign.reward_models import pairs, training
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.settings import RewardSettings
from moalign.reward_models.training import RewardJob
from moalign.runs.meter import Meter
from moalign.runs.run import Run
from moalign.runs.store import RunStore


class RewardStore(RunStore):
    """The reward models below a results folder."""

    kind = "reward-models"


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
    fitting, notice = training.check_loss(settings, [pair_set.name for pair_set in sets])
    parts = pairs.split_all(sets, fitting.splits)
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
    with run.lock(wait):
        if run.record.status == "done":
            return run, True
        run.mark("running")
        settings = request.settings
        job = RewardJob(
            run, settings, request.backbone, request.revision, request.train_sets, request.seed, Meter(), progress
        )
        try:
            training.train(job)
        except KeyboardInterrupt:
            run.mark("interrupted")
            raise
        except Exception as error:
            run.mark("failed", error=f"{type(error).__name__}: {error}")
            raise
        sizes = {split: {pair_set.name: len(pair_set) for pair_set in sets} for split, sets in request.parts.items()}
        run.record.notes = {**job.notes, "pairs": sizes, "heads": job.heads, "said": request.notice}
        run.mark("done", meter=job.meter)
        run.drop_checkpoints()
    return run, False


def objective(run: Run, name: str = "reward", head: str | None = None) -> ClassifierObjective:
    """Return the trained model as an objective of a task card.

    ``head`` names one of several heads; None is right for a model with one.
    """
    settings = RewardSettings.model_validate(run.record.recipe["settings"])
    return ClassifierObjective(
        name=name,
        kind="hf-classifier",
        model=str((run.path / training.MODEL).resolve()),
        label=head,
        template=settings.template,
        max_length=settings.max_tokens,
    )
