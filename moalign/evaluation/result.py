"""The result of an evaluation, as ``eval.json`` holds it, and what every stored result shares: version and loader."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from moalign.config.strict import faults
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.runs import atomic, record

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]
"""Lower and upper bound of a 95 % interval (:func:`moalign.pareto.statistics.interval`)."""

VERSION: Final = 1
KEYS = {
    "entries": "rows",
    "hypervolume_interval": "hypervolume_ci",
    "interval": "ci",
    "json_file": "json",
    "optimal_share_interval": "optimal_share_ci",
    "preference": "prefs",
    "raw_interval": "raw_ci",
    "reference_point": "ref",
    "settings": "set",
    "worst_interval": "worst_ci",
}
"""Keys in JSON of the fields that have another name in Python."""


class Content(BaseModel):
    """Part of a stored result; null stands for what is not known."""

    model_config = ConfigDict(
        alias_generator=lambda name: KEYS.get(name, name), populate_by_name=True, defer_build=True
    )

    @property
    def content(self) -> dict[str, Any]:
        """Everything, as ``--json`` prints it and the file holds it."""
        return self.model_dump(mode="json", by_alias=True)


class StoredResult(Content):
    """The content of a result's file."""

    KIND: ClassVar[str]
    REMEDY: ClassVar[str]
    """What to do about a damaged file; ``{folder}`` is where it lies."""

    version: Literal[1] = VERSION
    """Of the file's layout."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of this version or an older one.

        Raises RequestError for one that is damaged or of a newer version: what is wrong (with line or key), what to do.
        """
        remedy = cls.REMEDY.format(folder=shlex.quote(str(path.parent)))
        content = atomic.read_json(path, remedy)
        try:
            version = content.get("version", 0)
            if isinstance(version, int) and version > VERSION:
                raise RequestError(f"{path}: a newer moalign wrote it (version {version} of the file); update moalign")
            return cls.model_validate(cls.migrated(content, path.parent))
        except ValidationError as error:
            wrong = "; ".join(faults(error)[:3])
            raise RequestError(f"{path}: not {cls.KIND} that moalign wrote ({wrong}); {remedy}") from error
        except (LookupError, TypeError, AttributeError) as error:  # of the migration, or no JSON object at all
            raise RequestError(f"{path}: not {cls.KIND} that moalign wrote; {remedy}") from error
        except ValueError as error:  # of the migration, from what it calculates
            raise RequestError(f"{path}: not {cls.KIND} that moalign wrote ({error}); {remedy}") from error

    @classmethod
    def migrated(cls, content: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return the content of a file as this version has it; one of version 0 does not say its version.

        What older versions did not measure has a default of "not known" in the fields. Raises LookupError, TypeError,
        AttributeError or ValueError for content that is damaged.
        """
        return content


class Point(Content):
    """The mean rewards of a run's answers at one preference."""

    preference: Preference
    mean: tuple[float, ...]
    """Mean rewards in normalised units, ``[objectives]``; larger is better."""
    interval: tuple[Interval, ...]
    """Of ``mean``, ``[objectives]``; over prompts."""
    raw: tuple[float, ...]
    """The same means in the units of the task's scorers, larger is better."""
    kl: float | None = None
    """KL divergence of the policy from the base, in nats per response; None where it is not known."""
    kl_bound: bool = False
    """``kl`` is an upper bound."""


class OptimumAtKl(Content):
    """The optimum for a preference among the policies that are no further from the base than the one evaluated."""

    mean: tuple[float, ...]
    """Mean rewards in normalised units, ``[objectives]``."""
    utility: float
    """w.n."""


class EvaluatedPoint(Point):
    """A point of one run."""

    raw_interval: tuple[Interval, ...]
    nondominated: bool
    """Whether no other point of the run is at least as good in every objective and better in one; of equal points, as
    a policy has that answers all preferences alike, the first alone."""
    optimum_at_kl: OptimumAtKl | None = None
    """None where no optimum or no KL is known, or the KL is an upper bound; the key is then left out."""
    collapsed: float | None = None
    """Share of its responses that are collapsed; None in files of older versions."""
    mean_length: float | None = None
    """Of its responses, in tokens."""


class Indicators(Content):
    """Numbers beside the hypervolume (:mod:`moalign.pareto.indicators`)."""

    tau: float | None
    """None for a single preference: there is nothing that it could follow."""
    tau_per_objective: tuple[float, ...]
    inner_product: float
    expected_utility: float
    spacing: float
    regret: float | None = None
    """None where no optimum is known."""
    igd_plus: float | None = None
    regularised_regret: float | None = None
    """The same against the optimum at the policy's own KL to base; None where one of the two is not known."""


class Quality(Content):
    """Guards against rewards won by broken text (:mod:`moalign.lm.quality`), and the distance from the base."""

    rate: float
    causes: dict[str, float]
    mean_length: float
    distinct_3: float
    kl: float | None = None
    """Mean KL to base over the preferences, in nats per response; None where one is not known."""
    kl_bound: bool = False


class AnsweringCost(Content):
    """What answering the evaluation took."""

    tokens_generated: int | float
    reward_calls: int | float
    """Scores by which a policy chose its answers; those of the judge are not counted."""
    seconds: float
    peak_memory_bytes: int | None = None
    """Most GPU memory while it answered and was judged; None without one, where a process's peak is its training's."""


class SecondReference(Content):
    """The hypervolume from the second reference point of the task card."""

    reference_point: tuple[float, ...]
    hypervolume: float


class Optimum(Content):
    """The exact optimum for the evaluated preferences."""

    hypervolume: float
    points: tuple[tuple[float, ...], ...]
    """Mean rewards in normalised units, ``[preferences][objectives]``."""


class FrontierCurve(Content):
    """The most that any policy reaches for one preference, by its KL to base; the first point is the base's own."""

    preference: Preference
    kl: tuple[float, ...]
    """Nats per response, rising from 0; beyond the last the optimum stays where it is."""
    mean: tuple[tuple[float, ...], ...]
    """Mean rewards in normalised units at each, ``[points][objectives]``."""


class Volume(Content):
    """How good a set of points is as a whole."""

    hypervolume: float
    """Volume between the points' front and the reference point."""
    hypervolume_interval: Interval
    optimal_share: float | None = None
    """The hypervolume over that of the exact optimum; None where no optimum is known."""
    optimal_share_interval: Interval | None = None
    indicators: Indicators


class Side(Volume):
    """The trained or the held-out preferences by themselves; ``optimal_share`` is relative to their own optimum."""

    prefs: tuple[Preference, ...]
    utility_share: float | None = None
    """Mean w.n over that of the optimum: unlike a hypervolume it does not depend on how close the preferences lie."""


class Generalisation(Content):
    """The evaluation separately for preferences that were trained on and for those held out of training."""

    trained: Side
    held_out: Side


class ProxyPoint(Content):
    """Mean believed rewards (those trained on) at one preference, in their own normalised units."""

    preference: Preference
    mean: tuple[float, ...]


class ProxyReward(Content):
    """The evaluation by the rewards that the method was trained on: what it is believed to have gained."""

    points: tuple[ProxyPoint, ...]
    hypervolume: float
    hypervolume_interval: Interval | None = None
    """None where it was not measured (older files), or not from this reference point."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def inner_product(self) -> float:
        """Mean over the preferences of w.n."""
        gained = [w * n for point in self.points for w, n in zip(point.preference, point.mean, strict=True)]
        return sum(gained) / len(self.points)


class GroupUtilities(Content):
    """What the answers are worth to groups of users with tastes of their own, where the task knows of some.

    In log odds by which a group prefers such an answer to the average one of the task's data.
    """

    names: tuple[str, ...]
    utilities: tuple[tuple[float, ...], ...]
    """Means, ``[preferences][groups]``."""
    preference: Preference
    """At which the group that is worst off is best off."""
    group: str
    """The group that is worst off there."""
    worst: float
    """Its utility."""
    worst_interval: Interval
    """Over prompts."""


class Judgement(Volume):
    """What one judge says of a matrix of scores."""

    points: tuple[EvaluatedPoint, ...]
    """One for each preference, in the requested order."""
    reference_point: tuple[float, ...]
    sensitivity: SecondReference
    front: int
    """How many points are not dominated."""
    prompts: int
    optimum: Optimum | None = None


class EvaluatedRun(StoredResult):
    """Which run was evaluated."""

    run: str
    """The run's folder."""
    run_id: str
    method: str
    task: str
    card_hash: str
    seed: int
    objectives: tuple[str, ...]


class EvalResult(Judgement, EvaluatedRun):
    """Points, hypervolume and indicators of one run, from one judge.

    Rewards are in normalised units, unless they are called raw: 0 and 1 are the 1 % and 99 % quantiles of what the base
    and the data score on the task's calibration split.
    """

    KIND: ClassVar[str] = "an evaluation"
    SPARSE: ClassVar[tuple[str, ...]] = (
        "optimal_share_ci",
        "optimum",
        "proxy_reward",
        "gap",
        "share_at_kl",
        "frontier",
        "overlong",
        "judges",
        "engine",
        "generalisation",
        "groups",
        "warnings",
    )
    """Keys that are left out where there is nothing to say."""
    REMEDY: ClassVar[str] = "remove it and evaluate again: moalign eval {folder}"

    samples: int
    """Answers to each prompt at each preference."""
    quality: Quality
    cost: AnsweringCost
    proxy_reward: ProxyReward | None = None
    """Believed rewards, beside the true ones of the judge; None where the judge's are those trained on."""
    gap: float | None = None
    """Believed hypervolume minus the true one; growth during training is reward hacking."""
    share_at_kl: float | None = None
    """Of the reward that the best policy gains over the base at the same KL, the share that was gained; mean over the
    preferences (:mod:`moalign.evaluation.at_kl`). None where it is not known."""
    frontier: tuple[FrontierCurve, ...] | None = None
    """The optimum by KL at the corners of the grid and at its middle, where it is known."""
    overlong: dict[str, int] | None = None
    """How many prompts were cut or dropped, where any was."""
    judges: dict[str, dict[str, Any]] | None = None
    """What each LLM judge was asked for it (:func:`moalign.rewards.judge.total`), by objective; a gold one as
    ``gold NAME``. None without such a judge."""
    engine: Literal["vllm"] | None = None
    """What sampled the answers, where it was not our own engine."""
    generalisation: Generalisation | None = None
    """Where preferences were held out of training."""
    groups: GroupUtilities | None = None
    """Where the task knows of groups of users."""
    warnings: tuple[str, ...] | None = None
    """What speaks against the numbers, of training and of the responses, where anything does."""

    @property
    def content(self) -> dict[str, Any]:
        """See :attr:`Content.content`."""
        content = super().content
        for point in content["points"]:
            if point["optimum_at_kl"] is None:
                del point["optimum_at_kl"]
        return {key: value for key, value in content.items() if value is not None or key not in self.SPARSE}

    @classmethod
    def migrated(cls, content: dict[str, Any], folder: Path) -> dict[str, Any]:
        """See :meth:`StoredResult.migrated`; ``run`` becomes the folder that the file lies in now."""
        content = {**content, "run": str(folder)}
        if "version" in content:
            return content
        if "samples" not in content:  # written when there were as many as the card said, and no others
            card = record.read(folder).recipe.get("card") or {}
            content["samples"] = (card.get("evaluation") or {}).get("samples", 1)
        if "spacing" not in content["indicators"]:
            from moalign.pareto.indicators import spacing

            means = [point["mean"] for point in content["points"]]
            try:
                content["indicators"] = {**content["indicators"], "spacing": spacing(means)}
            except RequestError as error:  # it knows the points, not the file
                raise ValueError(str(error)) from error
        if "believed" in content:
            content["proxy_reward"] = content.pop("believed")
        return content

    def to_frame(self) -> pd.DataFrame:
        """Return one row a point: ``preference``, mean, bounds (``_low``, ``_high``) and ``_raw`` per objective."""
        import pandas as pd

        rows = []
        for point in self.points:
            row: dict[str, Any] = {"preference": point.preference}
            for k, name in enumerate(self.objectives):
                row[name], (row[f"{name}_low"], row[f"{name}_high"]) = point.mean[k], point.interval[k]
                row[f"{name}_raw"] = point.raw[k]
            rows.append({**row, "nondominated": point.nondominated, "kl": point.kl})
        return pd.DataFrame(rows)
