"""An ensemble of reward models as one objective: members standardised, put together, and how far they disagree.

A Bradley-Terry head has any offset and, trained for longer, a larger scale, neither of which is disagreement. So each
member's logit is taken in units of its own mean and sd on one set of texts: the responses of the calibration pairs that
it was trained beside (:data:`HEADS` in the model's folder). Aggregates are those of "Reward Model Ensembles Help
Mitigate Overoptimization" (Coste et al. 2023, arXiv 2310.02743): mean, worst case, and variance, their
uncertainty-weighted optimisation; the mean less k standard deviations is in members' own units.

An ensemble's folder is its first member's, an ordinary classifier; the others are its subfolders ``member-1`` and so
on. The labels of an ordinary classifier may be members, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moalign.config.objectives import ClassifierObjective
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, unknown
from moalign.lm import model_folder
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.rewards.model_scorer import share
from moalign.rewards.scorer import digest
from moalign.runs import atomic

HEADS = "heads.json"
"""File of a model's folder: label -> mean and sd of its logit on the responses of the calibration pairs."""


def aggregate(scores: Matrix, how: Literal["mean", "worst", "variance"], pessimism: float) -> Matrix:
    """Return one score per sample, ``[samples]``, from members' standardised scores ``[samples, members]``.

    Larger is better. mean: mean - pessimism x sd; variance: mean - pessimism x variance; worst: the smallest. Sd and
    variance are over members (divided by their number).
    """
    if how == "worst":
        return np.asarray(scores.min(axis=1))
    doubt = scores.std(axis=1) if how == "mean" else scores.var(axis=1)
    return np.asarray(scores.mean(axis=1) - pessimism * doubt)


def member_folders(folder: Path) -> list[Path]:
    """Return the folders of an ensemble's members; that alone of a model that is none."""
    numbered = [path for path in folder.glob("member-*") if path.name.partition("-")[2].isdecimal() and path.is_dir()]
    return [folder, *sorted(numbered, key=lambda path: int(path.name.partition("-")[2]))]


class EnsembleScorer:
    """A classifier objective with ``members``."""

    def __init__(self, spec: ClassifierObjective, base_dir: Path) -> None:
        """Find the members; raises RequestError for unknown or too few ones, and those whose scale is not known."""
        self.spec = spec
        self.name, self.maximise, self.cheap = spec.name, spec.maximise, spec.store is False
        self.where = f"objective {spec.name!r}"
        self.members = self._found(base_dir)
        share(self.members, keep=True)
        scales = [_scale(member) for member in self.members]
        self._mean, self._sd = np.array(scales).T

    def _found(self, base_dir: Path) -> list[ClassifierScorer]:
        alone = {"members": None, "pessimism": 0.0, "aggregate": "mean"}
        folder = model_folder.local_folder(self.spec.model, base_dir, self.where)
        folders = [] if folder is None else member_folders(folder)
        if len(folders) > 1:
            names = [f"member-{number}" for number in range(len(folders))]
            changes: list[dict[str, Any]] = [{"model": str(place)} for place in folders]
        else:
            first = ClassifierScorer(self.spec.model_copy(update={**alone, "label": 0}), base_dir)
            names = list(first.labels.values())
            changes = [{"label": index} for index in first.labels]
            if self.spec.label is not None:
                raise RequestError(
                    f"{self.where}: label and members exclude each other in a model that is no ensemble; its labels: "
                    f"{', '.join(names)}"
                )
        given = range(len(names)) if self.spec.members == "all" else self.spec.members or ()
        chosen = [self._number(member, names) for member in given]
        if len(set(chosen)) != len(chosen) or len(chosen) < 2:
            raise RequestError(
                f"{self.where}: members: at least two different ones are needed; found "
                f"{', '.join(names[at] for at in chosen)}; the model has {', '.join(names)} (moalign reward train "
                "--members 4 makes an ensemble)"
            )
        return [ClassifierScorer(self.spec.model_copy(update={**alone, **changes[at]}), base_dir) for at in chosen]

    def _number(self, member: int | str, names: Sequence[str]) -> int:
        if isinstance(member, int) and 0 <= member < len(names):
            return member
        if member not in names:
            raise unknown("member", str(member), names, f"{self.where}: members")
        return names.index(str(member))

    @property
    def labels(self) -> dict[int, str]:
        """Label index -> name, of each member's model."""
        return self.members[0].labels

    @property
    def scale(self) -> float:
        """Log odds of a preference in one unit of the score: the members' mean sd."""
        return float(self._sd.mean())

    @property
    def rows_shortened(self) -> int:
        """Rows so far that were longer than a member reads."""
        return self.members[0].rows_shortened

    @property
    def revision(self) -> str:
        """Hash of the members, their scales and how they are put together."""
        parts = sorted(zip([member.revision for member in self.members], self._mean, self._sd, strict=True))
        how = self.spec.aggregate, self.spec.pessimism
        turned = how != ("mean", 0.0) and not self.maximise  # then the doubtful score is the larger one
        return f"ensemble:{digest(parts, *how, turned)}"

    def prepare(self) -> None:
        """Load the members now."""
        for member in self.members:
            member.prepare()

    def rest(self) -> None:
        """Take the members off the GPU until they are used again."""
        for member in self.members:
            member.rest()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the aggregate of each pair, ``[samples]``; of a cost (``maximise: false``) doubt makes it larger."""
        apart = self._standardised(prompts, responses)
        turned = apart if self.maximise else 0.0 - apart
        together = aggregate(turned, self.spec.aggregate, self.spec.pessimism)
        values: list[float] = (together if self.maximise else 0.0 - together).tolist()
        return values

    def spread(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the sd over members of each pair's standardised scores, ``[samples]``."""
        values: list[float] = self._standardised(prompts, responses).std(axis=1).tolist()
        return values

    def _standardised(self, prompts: Sequence[str], responses: Sequence[str]) -> Matrix:
        raw = np.array([member.score(prompts, responses) for member in self.members], dtype=np.float64)
        return np.asarray((raw.T - self._mean) / self._sd)


def classifier(spec: ClassifierObjective, base_dir: Path) -> ClassifierScorer | EnsembleScorer:
    """Return the scorer of a classifier objective."""
    return ClassifierScorer(spec, base_dir) if spec.members is None else EnsembleScorer(spec, base_dir)


def write_scales(folder: Path, spec: ClassifierObjective, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Write :data:`HEADS` of the model that lies in ``folder`` from its logits on texts."""
    scorer = ClassifierScorer(spec.model_copy(update={"model": str(folder), "label": 0}), folder)
    logits = scorer.read(list(dict.fromkeys(zip(prompts, responses, strict=True)))).double().numpy()
    rows = zip(scorer.labels.values(), logits.mean(axis=0).tolist(), logits.std(axis=0).tolist(), strict=True)
    scales = {label: {"mean": mean, "sd": sd} for label, mean, sd in rows}
    (folder / HEADS).write_text(json.dumps(scales, indent=2) + "\n")


def _scale(member: ClassifierScorer) -> tuple[float, float]:
    """Return mean and sd of the member's logit; RequestError where its folder does not say them."""
    path, label = member.folder / HEADS, member.labels[member.index]
    try:
        entry = atomic.parsed_json(path.read_bytes())[label]
        mean, sd = float(entry["mean"]), float(entry["sd"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{member.where}: members need each label's mean and sd, which {path} does not say for {label!r} "
            f"({type(error).__name__}); moalign reward train writes it for several heads and for --members"
        ) from error
    if not (math.isfinite(mean) and math.isfinite(sd) and sd > 0):
        raise RequestError(f"{path}: {label}: found mean {mean} and sd {sd}; allowed: finite numbers, sd above 0")
    return mean, sd
