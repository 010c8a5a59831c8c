"""Settings of reward-model training, typed; importing them imports no engine (and no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from moalign.config.card import SplitSpec
from moalign.config.recipe import LoraSpec
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.core.schedule import ScheduleName

Loss = Literal["bt", "multitask", "more"]


class RewardSettings(Strict):
    """How a reward model is trained. Defaults are those of arXiv 2312.07401 unless marked as a choice of ours."""

    loss: Loss = "bt"
    """bt: Bradley-Terry on one data set; multitask: the same on several, as many pairs of each in every batch;
    more: several, weighted by the min-norm point of their gradients on the reward head."""
    heads: Literal["shared", "each"] = "shared"
    """shared: one reward for all data sets; each: one trunk with one head per data set (multitask only)."""
    members: int = Field(default=1, ge=1)
    """More than 1: an ensemble. Every member is a model of its own, trained from the backbone on its own bootstrap
    sample of the pairs. Choice: four bagged heads on one trunk agree too well (on the sandbox a spread of .06 sd where
    the error is .5; four models .34) and their mean is further from the truth."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over all pairs together; ``steps`` goes before it."""
    steps: int | None = Field(default=None, ge=1)
    batch: int = Field(default=80, ge=1)
    """Pairs in a step."""
    accumulate: int = Field(default=1, ge=1)
    """Each step is read in this many parts; with ``more`` every part has weights of its own."""
    lr: float = Field(default=1e-6, gt=0)
    """The paper's, for models of 1.4 to 7 thousand million parameters; small models need more."""
    schedule: ScheduleName = "cosine"
    """choice"""
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """choice"""
    clip: float = Field(default=1.0, gt=0)
    """choice"""
    max_tokens: int = Field(default=512, ge=8)
    """Longest row; the prompt is cut on its left, so that the answer stays."""
    template: str = "{prompt}{response}"
    """The text that the model reads; the objective that uses the model needs the same."""
    normalise_gradients: bool = True
    """more: head gradients have length 1 before the min-norm step (public code)."""
    momentum: float = Field(default=0.99, gt=0, le=1)
    """more: share of the new gradient, g = (1 - momentum) * old + momentum * new (public code)."""
    lora: LoraSpec | None = None
    """Train low-rank adapters and the head instead of all weights; folded into the weights when saved."""
    reproducible: bool = False
    """Train the same weights, bit for bit, on every machine (:mod:`moalign.lm.reproducible`): in double precision, and
    rounded. For small Llama models: double precision costs time."""
    splits: SplitSpec = SplitSpec()
    """By a hash of the prompt: trained on train, judged on eval, temperature fitted on calibration."""
    checkpoint_every: int = Field(default=100, ge=1)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> RewardSettings:
        if self.heads == "each" and self.loss != "multitask":
            raise ValueError(
                f"heads: each goes with loss: multitask; found loss: {self.loss} (bt has one data set, and heads "
                "that share nothing leave more nothing to weigh)"
            )
        if self.reproducible and self.lora is not None:
            raise ValueError("reproducible: true is for training of all weights; found lora settings")
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate; found {self.batch} and {self.accumulate}")
        return self


def check_loss(settings: RewardSettings, names: Sequence[str]) -> tuple[RewardSettings, str | None]:
    """Return the settings that fit these data sets, and a notice for the user, if any.

    Raises RequestError for several data sets with ``bt`` and for a batch that cannot hold all groups alike.
    """
    notice = None
    if len(names) == 1 and settings.loss != "bt" and settings.heads == "shared":
        notice = f"loss {settings.loss}: there is one data set only ({names[0]}), so this is plain Bradley-Terry (bt)"
        settings = settings.model_copy(update={"loss": "bt"})
    if len(names) == 2 and settings.loss == "more" and settings.normalise_gradients:
        notice = (
            "loss more: the min-norm point of two gradients of length 1 is always their middle, so that this trains as "
            "multitask; three data sets or more, or --set normalise_gradients=false, leave it something to weigh"
        )
    if len(names) > 1 and settings.loss == "bt":
        raise RequestError(
            f"loss bt is for one data set; found {len(names)} ({', '.join(names[:5])}); "
            "take --loss multitask or --loss more"
        )
    parts = len(names) * settings.accumulate
    if settings.batch % parts:
        near = max(parts, round(settings.batch / parts) * parts)
        raise RequestError(
            f"batch {settings.batch}: every batch holds as many pairs of each of the {len(names)} data sets, so it "
            f"must be a multiple of data sets x accumulate = {parts}; nearest: --set batch={near}"
        )
    return settings, notice
