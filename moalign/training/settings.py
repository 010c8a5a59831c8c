"""Settings of the engines, typed; importing them imports no engine (and no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moalign.config.strict import Strict
from moalign.core.amounts import Amount, Amounts
from moalign.core.preferences import Preference, corner
from moalign.core.records import Labels
from moalign.core.schedule import ScheduleName

Steps = Annotated[int, Field(ge=0, le=10**9)]
"""Update steps of a stage."""


class SftConfig(Strict):
    """Settings of one supervised stage."""

    steps: Steps
    batch: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    """Each step of ``batch`` rows is read in this many parts."""
    lr: float = Field(default=1.4e-4, gt=0)
    schedule: ScheduleName = "linear"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, ge=8)
    """Longest row; the prompt is cut on its left, so that the response stays."""
    checkpoint_every: int = Field(default=100, ge=1)
    log_every: int = Field(default=10, ge=1)
    """A line of the log is the mean of the steps since the last one; a checkpoint ends one, too."""

    @model_validator(mode="after")
    def _even_parts(self) -> SftConfig:
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate; found {self.batch} and {self.accumulate}")
        return self


class DistilConfig(SftConfig):
    """Settings of the distillation."""

    steps: Steps = 300
    n: int = Field(default=8, ge=1)
    """Responses per prompt that the best is picked from."""
    alpha: float = Field(default=0.5, gt=0)
    """Dirichlet concentration of the preferences."""
    resolution: int | None = Field(default=20, ge=1)
    """Preferences are drawn in steps of one over this; None: as the Dirichlet gives them."""
    choose: Literal["best", "tilted"] = "best"
    """Which of the n responses is learned from: the one with the largest score s at the drawn preference, or one drawn
    with probability proportional to ``exp(s / beta)``."""
    beta: float = Field(default=0.1, gt=0)
    """Of ``choose: tilted``: strength of the KL term, in units of the score."""


class CostHints(Strict):
    """Mixed into the settings of methods whose cost is more than the steps of their stages; preflight and bench ask.

    What is said here, ``train`` does: tests compare the two for every method.
    """

    sampled_by: ClassVar[Sequence[str]] = ()
    """Settings that count responses sampled between stages; bench reduces them like steps."""
    repeated_by: ClassVar[Mapping[str, str]] = {}
    """Stages that each policy goes through several times -> the setting that says how often."""

    def responses_sampled(self, task: Amounts) -> int:
        """Return how many responses are sampled, and scored, between stages at most."""
        return 0

    def learns_from(self, task: Amounts) -> Amount:
        """Return which of the task's own responses a run learns from, and counts as its cost."""
        return Amount()

    def reads(self, task: Amounts) -> Amount:
        """Return which of the task's own responses are made for a run that does not count them."""
        return Amount()

    def expert_runs(self) -> tuple[str, dict[str, Any]] | None:
        """Return method and settings of the run that experts come from, one at each of :meth:`expert_vectors`."""
        return None

    def expert_vectors(self, objectives: int) -> list[Preference]:
        """Return the preference that each expert is trained at: the corners of the simplex."""
        return [corner(objectives, index) for index in range(objectives)] if self.expert_runs() else []

    @property
    def own_scorers(self) -> int | None:
        """How many rewards of its own, at most, score a response in the place of the task's objectives; None: these."""
        return None

    @property
    def switched_off(self) -> set[str]:
        """The settings of stages that these settings leave out."""
        return set()

    @property
    def one_policy(self) -> bool:
        """Whether these settings train one policy for all preferences, though the method trains one for each."""
        return False


class NamesModels(Strict):
    """Mixed into the settings of methods that read models beside the task's: their content is part of a run's identity.

    ``moalign check`` looks for them.
    """

    @property
    def models(self) -> dict[str, str]:
        """Return the models that these settings name, by setting: a folder or a hub id."""
        return {}


class NamesFiles(Strict):
    """Mixed into the settings of methods that read files beside the task's: their content is part of a run's identity.

    ``moalign check`` looks for them.
    """

    def contents(self) -> dict[str, str]:
        """Return the sum of each file, by how it is named; RequestError for one that is not there."""
        return {}


class RefusesTasks(Strict):
    """Mixed into the settings of methods that some preferences or objectives do not suit.

    They are refused before a run is made, and by ``moalign check``.
    """

    def require_suited(self, names: Sequence[str], preferences: Sequence[Preference]) -> None:
        """Raise RequestError for objectives, by name, or preferences to train on that these settings cannot have."""


class WarmStart(CostHints):
    """Mixed into the settings of methods whose policy reads its preference from the prompt."""

    warm_start: Literal["none", "hindsight"] = "none"
    """hindsight: distil the best of n for every preference before the method's own training."""
    distil: DistilConfig = DistilConfig()
    """Settings of ``warm_start: hindsight``; what is not given is taken from the task's recipe of hindsight."""
    may_distil_nothing: ClassVar[bool] = False
    """Whether ``distil.steps: 0`` goes with ``warm_start: hindsight``."""

    @model_validator(mode="after")
    def _warm(self) -> WarmStart:
        if self.warm_start == "hindsight" and not self.distil.steps and not self.may_distil_nothing:
            raise ValueError(
                "warm_start: hindsight needs distil.steps of 1 or more; found 0 (the task's recipe of hindsight, where "
                "it is not given here)"
            )
        return self

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`."""
        distils = self.warm_start == "hindsight" and self.distil.steps
        return task.scored(self.distil.n) if distils else Amount()

    @property
    def switched_off(self) -> set[str]:
        """See :class:`CostHints`."""
        return {"distil"} if self.warm_start == "none" else set()

    @classmethod
    def borrows(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Distillation is hindsight's, and its recipe knows what it needs on a task."""
        return {"distil": "hindsight"} if given.get("warm_start") == "hindsight" else {}


class GroupsUsers(CostHints):
    """Mixed into the settings of methods that put the users who label a task's pairs into groups."""

    clusters: int = Field(default=2, ge=1)
    """Groups of users; 1: all are alike."""

    @property
    def own_scorers(self) -> int | None:
        """See :class:`CostHints`."""
        return self.clusters


class OnlineConfig(Strict):
    """Settings of the engine, shared by every online method."""

    steps: Steps = 300
    batch: int = Field(default=64, ge=1)
    """Prompts per rollout."""
    samples: int = Field(default=2, ge=1)
    """Responses per prompt."""
    temperature: float = Field(default=1.0, gt=0)
    lr: float = Field(default=1e-4, gt=0)
    schedule: ScheduleName = "constant"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    micro_batch: int = Field(default=256, ge=1)
    """Most rows in one forward and backward pass; a step's gradient does not depend on it."""
    sample_batch: int | None = Field(default=None, ge=1)
    """Most rows sampled at once, of ``batch * samples``; None: all. What is drawn does not depend on it."""
    epochs: int = Field(default=1, ge=1)
    """Updates on each rollout."""
    reference: Literal["base", "start"] = "base"
    """What the KL term compares with: the base (adapter off), or the policy as it was at the start."""
    ref_sync_steps: int | None = Field(default=None, ge=1)
    """Copy the policy into the reference every so many steps; None keeps it fixed."""
    kl_budget: float | None = Field(default=None, gt=0)
    """KL of a response to the reference, in nats, that the strength of the KL term (``beta``; of PPO ``kl_coef``) is
    steered to (Ziegler et al. 2019, arXiv 1909.08593, section 2.2); None keeps it fixed."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Responses that it takes to change the strength by up to a fifth, when steered."""
    kl_stop: float | None = Field(default=None, gt=0)
    """A stage ends before its steps are done once responses are further from the reference, in nats each, on average
    over a rollout; the policy stays as it is then. None: never."""
    reward_cap: Literal["none", "log", "clip"] = "none"
    """What a normalised reward is worth beyond the upper bound of the calibration data (``bounds`` of the normaliser),
    where nothing in the data ever was: as much as below it, its logarithm, or nothing."""
    support: float | None = Field(default=None, ge=0)
    """How many nats less likely to the base than any token of the calibration responses a token of a response may be,
    before the response's rewards are no longer believed (:mod:`moalign.training.support`); None: they always are."""
    share_prompts: bool = False
    """Read a prompt once for all its responses in a micro-batch, in place of once for each: the same gradients, up to
    rounding, in less time where prompts are long. It excludes gradient checkpointing."""
    group_by_length: bool = False
    """Put rows of like length into the same micro-batch, without the padding that others need: the same gradients, up
    to rounding, in less time."""
    checkpoint_every: int = Field(default=50, ge=1)
    log_every: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _strength_to_steer(self) -> OnlineConfig:
        for name in ("beta", "kl_coef"):
            if self.kl_budget is not None and getattr(self, name, None) == 0:
                raise ValueError(
                    f"kl_budget steers {name} by factors, so it must start above 0; found {name}: 0 and kl_budget: "
                    f"{self.kl_budget:g}"
                )
        return self

    @property
    def rows(self) -> int:
        """Responses of a rollout."""
        return self.batch * self.samples

    @property
    def rows_at_once(self) -> int:
        """Most of them that are sampled together."""
        return min(self.rows, self.sample_batch or self.rows)

    @property
    def own_reference(self) -> bool:
        """Whether the reference is a frozen copy of the adapter instead of the base."""
        return self.reference == "start" or self.ref_sync_steps is not None

    @property
    def rows_per_prompt(self) -> int:
        """How many rows of an update have a prompt in common: the two of a pair; preflight asks."""
        return 2


class PpoConfig(OnlineConfig):
    """Settings of clipped PPO with value heads, shared by MOC, MORLHF and the experts trained with it.

    The defaults are MOC's for a 7B model (arXiv 2604.04497); the sandbox's recipes set their own.
    """

    samples: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    temperature: float = Field(default=0.7, gt=0)
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """A probability ratio outside 1 - clip_range .. 1 + clip_range is not pushed further out."""
    kl_coef: float = Field(default=0.2, ge=0)
    """Cost of a nat of every token's log ratio to the reference, in units of the normalised reward."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value heads' squared error, summed over heads."""
    value_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the value heads; None: the policy's."""
    whiten: Literal["none", "scale", "full"] = "scale"
    """Advantages of each head over the batch's tokens: as they are, divided by their standard deviation, or also
    centred."""

    @property
    def rows_per_prompt(self) -> int:
        """All responses to it."""
        return self.samples


class ConditionedPpoConfig(PpoConfig, WarmStart):
    """The same for one policy that reads its preference from the prompt."""

    groups: int = Field(default=8, ge=1)
    """Preferences per rollout, each for an equal part of the batch; at most as many as are trained on."""
    style: Literal["percent", "fraction"] = "fraction"
    """How weights are written into the prompt: ``30.0%`` or ``0.3``."""

    @model_validator(mode="after")
    def _a_prompt_each(self) -> ConditionedPpoConfig:
        if self.groups > self.batch:
            raise ValueError(f"groups must be at most batch; found {self.groups} and {self.batch}")
        return self


class DpoStage(SftConfig):
    """Settings of one stage of DPO on fixed pairs; ``batch`` and ``accumulate`` count pairs.

    The defaults are MODPO's for a 7B model (arXiv 2310.03708); the sandbox's recipes set their own.
    """

    steps: Steps = 300
    batch: int = Field(default=96, ge=1)
    lr: float = Field(default=5e-4, gt=0)
    schedule: ScheduleName = "cosine"
    weight_decay: float = Field(default=0.05, ge=0)
    beta: float = Field(default=0.1, gt=0)
    """Strength of the KL term, in units of the reward."""
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """sigmoid: ``-log sigma(z)``; hinge: ``max(0, 1 - z)``."""
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean negative log-likelihood per token, added to the loss: DPO sees only differences, and both
    responses of a pair may become unlikely (arXiv 2404.19733)."""
    sft_on: Literal["chosen", "both"] = "chosen"
    """Of which responses: chosen favours them, both only keeps to the language of the data."""
    share_prompts: bool = False
    """Read the prompt of a pair once for both responses: the same gradients, up to rounding, in less time where prompts
    are long. It excludes gradient checkpointing, which a GPU has otherwise."""
    group_by_length: bool = False
    """Put pairs of like length into the same part of a batch (of ``accumulate``): the same gradients, up to rounding,
    in less time."""

    @property
    def rows_per_pair(self) -> int:
        """How many rows are read for each pair; preflight asks."""
        return 2

    def gradients_kept(self, objectives: int) -> int:
        """Return how many gradients of all that is trained are held beside the optimizer's own; preflight asks."""
        return 0


class DpoConfig(DpoStage, CostHints):
    """The same with where its pairs come from, shared by MODPO, dpo-lw and the experts trained with it."""

    pairs: Literal["auto", "data", "scored"] = "auto"
    """data: the task's own preference labels for the objective; scored: built from scored responses, ordered by the
    objective; auto: the data's where it has them."""
    per_prompt: int = Field(default=8, ge=1)
    """Most pairs of a prompt that are built from its scored responses."""
    labels: Labels = "order"
    """Of pairs built from scores. order: the better response is chosen. bradley-terry: it is chosen with probability
    ``sigma(r_better - r_worse)`` of the normalised scores; the loss is the expectation over that choice."""

    def builds_pairs(self, labelled: Sequence[bool]) -> bool:
        """Whether pairs are built from scored responses; ``labelled``: whether the data has some for each objective."""
        return self.pairs == "scored" or (self.pairs == "auto" and not all(labelled))

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`."""
        return task.scored() if self.builds_pairs([pairs > 0 for pairs in task.labelled]) else Amount()
