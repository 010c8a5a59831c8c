"""Hindsight: distil the best of n for every preference, then online DPO.

Source: none yet, the method is ours. From a base for which a stated preference means nothing, online methods mostly
improve the average and answer all preferences alike. The remedy needs no new data: the base's own scored samples
already show what to answer at each preference.

1. Pool: n scored responses per training prompt.
2. Distil: supervised training on the best of n for drawn preferences (:mod:`moalign.training.distil`).
3. Online: MO-ODPO from there; the reference is the base (``reference: base``) or the distilled policy
   (``reference: start``).

So it is MO-ODPO with its ``warm_start`` always on (:meth:`moalign.methods.mo_odpo.MoOdpo.train`).

``steps: 0`` leaves the online part out: a preference-conditioned distillation of best-of-n, an offline method. The
parts are known (best-of-n distillation, hindsight relabelling, online DPO). What each of them is worth is measured in
results/ablations/hindsight.md: by hypervolume the online part alone is not told apart from both together; with the
distillation seeds end closer together and answers are nearer to what was asked (regret .008, without it .016).

With learned rewards the settings of recipes/sandbox find what the reward model wrongly likes, until nothing else is
left (README, results/published/sandbox-learned). ``beta``, the temperature or ``sft_coef`` alone do not help; with all
three as MO-ODPO's it does as well as that. ``steps: 0`` moves least from the base.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moalign.methods import mo_odpo


class Config(mo_odpo.Config):
    """Settings of hindsight: ``distil`` for the distillation, the others for the online part."""

    warm_start: Literal["hindsight"] = "hindsight"
    resolution: int | None = Field(default=20, ge=1)
    """As ``distil.resolution``."""


class Hindsight(mo_odpo.MoOdpo):
    """One policy for every preference: first taught what a preference means, then trained online."""

    name: ClassVar[str] = "hindsight"
    summary: ClassVar[str] = "best of n distilled for every preference, then online DPO (ours)"
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "distil": {"steps": 2, "batch": 4, "n": 2, "max_tokens": 128},
        "steps": 2,
        "batch": 4,
        "warmup": 0,
    }
