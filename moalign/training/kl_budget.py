"""Limits to the KL of responses to the reference: a budget to steer to, and one to stop at.

``kl_budget``: the strength of a loss's KL term is adapted so that responses keep to a distance. Proportional control in
log space: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. ``kl_stop``: a stage ends where they are beyond one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moalign.training.rollout import mean_kl, rollout_metrics

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job
    from moalign.training.rollout import Rollout
    from moalign.training.settings import OnlineConfig


class KlStrength:
    """The strength of the KL term, ``beta`` of a DPO loss or ``kl_coef`` of PPO; fixed without ``kl_budget``."""

    def __init__(
        self, config: OnlineConfig, name: str, strength: float, state: dict[str, float], notes: dict[str, Any]
    ) -> None:
        """``name`` is the setting whose value ``strength`` is.

        What it is now is kept in the trainer's ``state``, which goes into checkpoints; what it is at the end goes to
        the run's ``notes``.
        """
        self.config, self.name, self.state, self.notes = config, name, state, notes
        state[name] = strength

    @property
    def now(self) -> float:
        """The strength of the next update."""
        return self.state[self.name]

    @property
    def metrics(self) -> dict[str, float]:
        """The strength by its name, where it is steered."""
        return {} if self.config.kl_budget is None else {self.name: self.now}

    def adapt(self, rollout: Rollout) -> None:
        """Take the KL of a rollout to the reference into account."""
        budget = self.config.kl_budget
        if budget is None:
            return
        after = adapted(self.now, mean_kl(rollout), budget, len(rollout.responses), self.config.kl_horizon)
        self.state[self.name] = after
        self.notes["kl_budget"] = {"nats": budget, f"{self.name}_at_the_end": after}


def adapted(strength: float, kl: float, budget: float, responses: int, horizon: int) -> float:
    """Return the next strength: up when ``kl`` is above ``budget``, by a fifth in ``horizon`` responses at most.

    Never by more than half or twice at once: with many responses to a short horizon it would turn negative.
    """
    error = min(max(kl / budget - 1, -0.2), 0.2)
    return strength * min(max(1 + error * responses / horizon, 0.5), 2.0)


def beyond(rollout: Rollout, job: Job, *, lm: LanguageModel, config: OnlineConfig, phase: str) -> bool:
    """Whether a rollout is further from the reference than ``kl_stop``; then the phase's end is noted and logged."""
    if config.kl_stop is None or (kl := mean_kl(rollout)) <= config.kl_stop:
        return False
    job.notes.setdefault("kl_stop", {})[phase] = {"steps": rollout.step, "of": config.steps, "kl": kl}
    if rollout.step == 0:
        away = f"{kl:.3g} nats from the reference at the start (kl_stop: {config.kl_stop:g})"
        job.warn([f"{phase}: nothing was trained: {away}"])
    job.run.log(rollout.step + 1, phase, **rollout_metrics(rollout, job.panel.names), **job.meter.cost())
    for step in range(rollout.step + 1, config.steps + 1):  # snapshots that are still due are of the policy as it stays
        job.advance(lm, phase, step, config.steps)
    return True
