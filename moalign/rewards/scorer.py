"""What a scorer is, and how one is built from a task card's objective.

A scorer gives one raw number per (prompt, response). Direction, finite checks, the store and the
normaliser are the panel's business (:mod:`moalign.rewards.panel`), so that a scorer stays small.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from moalign.core.errors import RequestError, WorkError

if TYPE_CHECKING:
    from moalign.config.card import TaskCard
    from moalign.config.objectives import ObjectiveSpec


@runtime_checkable
class Scorer(Protocol):
    """One objective. Scores are raw: ``maximise`` says which way is better, the panel turns the sign.

    ``revision`` names what scores and changes whenever the scores may change. It is the store's key together with the
    texts, so that scorers with equal revisions share their scores. The store is not used for a ``cheap`` scorer, which
    is faster than a look-up. A scorer with members has ``spread``, too, called as ``score`` is: the sd over members of
    their standardised scores. A slow one may have ``stream``, called as ``score`` is: it yields (sample, score) as
    scores come, each of which is kept at once; NaN is a score that it leaves out.
    """

    @property
    def name(self) -> str: ...
    @property
    def maximise(self) -> bool: ...
    @property
    def revision(self) -> str: ...
    @property
    def cheap(self) -> bool: ...
    @property
    def score(self) -> Callable[[Sequence[str], Sequence[str]], Sequence[float]]:
        """Gives one raw score per (bare prompt, response), in the order given; ``[samples]``."""


class ScorerFault(Exception):
    """A scorer's call that failed as a whole; the message goes on after "the scorer"."""


@dataclass(frozen=True)
class FunctionScorer:
    """A scorer made of a plain function ``(prompts, responses) -> scores``."""

    name: str
    score: Callable[[Sequence[str], Sequence[str]], Sequence[float]]
    revision: str
    maximise: bool = True
    cheap: bool = False


def digest(*parts: object) -> str:
    """Return 16 hex digits over values that JSON can hold; others count by their ``repr``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]


BUILDERS: dict[str, Callable[[Any, Path], Scorer]] = {}
"""Builders for kinds of objective that belong to one task; :mod:`moalign.tasks` registers them when it is imported."""


def build_scorer(spec: ObjectiveSpec, base_dir: Path) -> Scorer:
    """Return the scorer of one objective of a task card; heavy libraries are imported at its first use.

    Relative model folders and modules are looked up in ``base_dir``, the card's folder.

    Raises RequestError for an unknown rule, function, option, label or model, a model folder that cannot be used, and a
    judge without template or key; WorkError for a kind that :data:`BUILDERS` does not hold yet.
    """
    if spec.kind == "rule":
        from moalign.rewards.rules import RuleScorer

        return RuleScorer(spec)
    if spec.kind == "python":
        from moalign.rewards.python_scorer import PythonScorer

        return PythonScorer(spec, base_dir)
    if spec.kind == "hf-classifier":
        from moalign.rewards import ensemble

        return ensemble.classifier(spec, base_dir)
    if spec.kind == "lm":
        from moalign.rewards.lm_scorer import LmScorer

        return LmScorer(spec, base_dir)
    if spec.kind == "judge":
        from moalign.rewards.judge import JudgeScorer

        return JudgeScorer(spec, base_dir)
    if spec.kind not in BUILDERS:
        raise WorkError(f"objective {spec.name}: kind {spec.kind} is a task's own; import moalign.tasks first")
    return BUILDERS[spec.kind](spec, base_dir)


def fingerprints(card: TaskCard, base_dir: Path) -> dict[str, str]:
    """Return what scores a task, and what judges it, by content: part of what the task is.

    In it are functions, folders of models and a judge's template, which may change under one name; a rule, a hub id and
    a task's own kinds are told by the card. No model is loaded, and no key needed.
    """
    roles = {"scorer": card.objectives, "gold": card.gold_objectives or ()}
    found = {f"{role}.{spec.name}": _fingerprint(spec, base_dir) for role, specs in roles.items() for spec in specs}
    return {key: value for key, value in found.items() if value is not None}


def _fingerprint(spec: ObjectiveSpec, base_dir: Path) -> str | None:
    if spec.kind == "python":
        from moalign.rewards import python_scorer

        file = python_scorer.file_of(spec.function, base_dir)
        if file is None:
            return build_scorer(spec, base_dir).revision
        return python_scorer.fingerprint(file) if file.is_file() else None
    if spec.kind in ("hf-classifier", "lm"):
        return build_scorer(spec, base_dir).revision if os.path.isdir(spec.model) else None
    if spec.kind == "judge":
        from moalign.rewards import judge

        return judge.revision(spec, judge.read_template(spec, base_dir))
    return None


def build_scorers(specs: Sequence[ObjectiveSpec], base_dir: Path) -> list[Scorer]:
    """Build every objective of a card; all problems are reported in one RequestError.

    Objectives that one model scores share it.
    """
    scorers: list[Scorer] = []
    problems: list[str] = []
    for spec in specs:
        try:
            scorers.append(build_scorer(spec, base_dir))
        except RequestError as error:
            problems.extend(error.problems)
    if problems:
        raise RequestError(*problems)
    if any(spec.kind in ("hf-classifier", "lm") for spec in specs):
        from moalign.rewards.model_scorer import ModelScorer, share

        parts = [part for scorer in scorers for part in getattr(scorer, "members", [scorer])]
        share([part for part in parts if isinstance(part, ModelScorer)])
    return scorers
