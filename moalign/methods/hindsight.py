"""Hindsight: distil the base's own scored samples for every preference, then online DPO.

Source: none yet, the method is ours. From a base for which a stated preference means nothing, online methods mostly
improve the average and answer all preferences alike. The remedy needs no new data: the base's own scored samples
already show what to answer at each preference.

1. Pool: n scored responses per training prompt.
2. Distil: supervised training on one of the n for drawn preferences (:mod:`moalign.training.distil`).
3. Online: MO-ODPO from there; the reference is the base (``reference: base``) or the distilled policy
   (``reference: start``).

So it is MO-ODPO with its ``warm_start`` always on (:meth:`moalign.methods.mo_odpo.MoOdpo.train`). ``steps: 0`` leaves
the online part out: a preference-conditioned distillation, an offline method. ``distil.steps: 0`` leaves the
distillation out, for a base that steers already when it is asked (``moalign train prompting`` says whether it does).

**What it minimises** (second version: ``labels: bradley-terry``, ``extremes: advantage``). For every preference w

    max_pi  E_x [ E_{y ~ pi} s_w(x, y) - beta KL(pi(.|x) || pi_base(.|x)) ]

with a score s_w of :mod:`moalign.pareto.scalarisation`. Its one solution is ``pi_w(y|x) = pi_base(y|x) exp(s_w(x, y) /
beta) / Z_w(x)``, and both parts have it as their fixed point:

* Distillation: the base's samples drawn with weights ``exp(s_w / beta)`` are samples of pi_w as n grows (``choose:
  tilted``); with few of them, or a small beta, it is the best of n, ``log n - (n - 1) / n`` nats on the way to it.
* Online: with ``D = log pi - log pi_base`` the expected loss of a pair, ``-p log sigma(beta (D1 - D2)) - (1 - p) log
  sigma(beta (D2 - D1))`` with ``p = sigma(s1 - s2)``, is least where ``beta (D1 - D2) = s1 - s2``. That holds for all
  pairs if and only if ``pi = pi_w``. Labels that only say which is better (``order``) have no such place: their margin
  grows as long as a policy is trained, and with a learned reward the policy ends where that reward is most wrong.

Distillation comes first since the online part only sees what the policy says already. As long as it reads nothing in
a preference, it draws the same responses for all of them, and what it learns for one it unlearns for another; the
targets of the distillation depend on w from the first step.

**Where rewards are learned**, three things keep it from what they are wrong about, none of which has to know that
they are (results/learned): the minimum itself; ``scalarisation: exponential``, which lets no large reward outweigh
the lack of another; ``support``, which does not believe rewards of responses that the base would never give.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moalign.methods import mo_odpo


class Config(mo_odpo.Config):
    """Settings of hindsight: ``distil`` for the distillation, the others for the online part."""

    may_distil_nothing: ClassVar[bool] = True
    warm_start: Literal["hindsight"] = "hindsight"
    resolution: int | None = Field(default=20, ge=1)
    """As ``distil.resolution``."""


class Hindsight(mo_odpo.MoOdpo):
    """One policy for every preference: first taught what a preference means, then trained online."""

    name: ClassVar[str] = "hindsight"
    summary: ClassVar[str] = "scored samples distilled for every preference, then online DPO (ours)"
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "distil": {"steps": 2, "batch": 4, "n": 2, "max_tokens": 128},
        "steps": 2,
        "batch": 4,
        "warmup": 0,
    }
