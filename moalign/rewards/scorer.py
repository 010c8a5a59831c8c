"""What a scorer is, and how one is built from a task card's objective.

A scorer gives one raw number per (prompt, response). Direction, finite checks, the store and the
normaliser are the panel's business (:mod:`moalign.rewards.panel`), so that a scorer stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from moalign.core.errors import RequestError, WorkError

if TYPE_CHECKING:
    from moalign.config.objectives import ObjectiveSpec


@runtime_checkable
class Scorer(Protocol):
    """One objective. Scores are raw: ``maximise`` says which way is better, the panel turns the sign."""

    @property
    def name(self) -> str:
        """The objective's name in the task card."""

    @property
    def maximise(self) -> bool:
        """False: smaller raw scores are better."""

    @property
    def revision(self) -> str:
        """Names what scores and changes whenever the scores may change.

        It is the store's key together with the texts, so two scorers with equal revisions share their scores.
        """

    @property
    def cheap(self) -> bool:
        """True: scoring is faster than a look-up, so the store is not used."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        """Return one raw score per (bare prompt, response), in the order given; ``[samples]``."""


@dataclass(frozen=True)
class FunctionScorer:
    """A scorer made of a plain function ``(prompts, responses) -> scores``."""

    name: str
    function: Callable[[Sequence[str], Sequence[str]], Sequence[float]]
    revision: str
    maximise: bool = True
    cheap: bool = False

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        """Return the function's scores, ``[samples]``."""
        return self.function(prompts, responses)


BUILDERS: dict[str, Callable[[Any, Path], Scorer]] = {}
"""Builders for kinds of objective that belong to one task; :mod:`moalign.tasks` registers them when it is imported."""


def build_scorer(spec: ObjectiveSpec, base_dir: Path) -> Scorer:
    """Return the scorer that ``spec`` asks for; heavy libraries are imported at its first use.

    Args:
        spec: one objective of a task card.
        base_dir: the card's folder; relative model folders and modules are looked up there.

    Raises:
        RequestError: unknown rule, function, option, label or model; a model folder that cannot be used.
        WorkError: a kind that :data:`BUILDERS` does not hold yet.
    """
    if spec.kind == "rule":
        from moalign.rewards.rules import RuleScorer

        return RuleScorer(spec)
    if spec.kind == "python":
        from moalign.rewards.python_scorer import PythonScorer

        return PythonScorer(spec, base_dir)
    if spec.kind == "hf-classifier":
        from moalign.rewards.hf_classifier import ClassifierScorer

        return ClassifierScorer(spec, base_dir)
    if spec.kind == "lm":
        from moalign.rewards.lm_scorer import LmScorer

        return LmScorer(spec, base_dir)
    if spec.kind not in BUILDERS:
        raise WorkError(f"objective {spec.name}: kind {spec.kind} is a task's own; import moalign.tasks first")
    return BUILDERS[spec.kind](spec, base_dir)


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

        share([scorer for scorer in scorers if isinstance(scorer, ModelScorer)])
    return scorers
