"""Bone soups: RL experts on mixed rewards, their weights combined so that the rewards' mixture is the preference.

Source: "Bone Soups: A Seek-and-Soup Model Merging Approach for Controllable Multi-Objective Generation",
arXiv 2502.10762 (ACL 2025); facts of the public code andyclsr/BoneSoups are marked "code".

For m objectives expert i is trained on ``h_i = sum_j B_ij r_j``, B circulant and symmetric: ``beta`` on its diagonal,
``(1 - beta) / (m - 1)`` elsewhere (two objectives: beta and 1 - beta). A preference w is answered by the base with the
change of weights ``dW = sum_i l_i dW_i``, ``l = B^-1 w``: the rewards' mixture ``sum_i l_i h_i`` is then w . r. In
closed form ``l_i = (w_i - a) / (beta - a)``, ``a = (1 - beta) / (m - 1)``; they sum to 1. ``beta: 1`` is rewarded
soups, with the same experts.

Negative weights: for a preference outside the hull of B's rows (two objectives: a weight above beta) some l_i is below
0, and the model lies beyond the experts. It is kept as it is, as the code has it: at beta .7 w = (1, 0) is 1.75 of the
first expert less .75 of the second.

``extrapolate`` (code) goes further from the base: for each objective i the model at its corner is moved to ``k_i B^-1
e_i``, ``k = 1 / (1 - alpha)``, with the alpha of the list whose answers to ``prompts`` of the calibration split have
the best mean reward i; a preference has the weights ``B^-1 (k_i w_i)_i``. The code always searches .1 to .5, on a part
of its training prompts; here it is off unless a list is given, so that the method is the formula above, and 0 may be
in the list. What the search samples and scores counts as this method's cost.

Choices of ours: the experts are one run of ``morlhf`` at the rows of B (``dpo_experts``: of ``modpo``), as rewarded
soups' are at the corners; their cost counts as this method's. ``beta`` is above one half, whatever m, so that every
expert has an objective of its own (at 1 / m all are alike and B has no inverse). The code has two objectives only; for
more, B is our reading of "symmetric circulant".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from moalign.core.amounts import Amounts
from moalign.core.arrays import Matrix
from moalign.core.preferences import Preference, corner
from moalign.methods import rewarded_soups
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import DpoConfig

if TYPE_CHECKING:
    from moalign.policies.policy import Policy

STRETCH = "extrapolation"
"""Name of the stage, and of its file with each objective's k, ``[objectives]``."""


class AnyExperts(rewarded_soups.Config):
    """Settings of soups whose experts are those of rewarded soups or, if ``dpo_experts`` is set, of DPO soups."""

    dpo_experts: DpoConfig | None = None
    """The settings of ``modpo``, which then trains the experts in place of ``morlhf``."""

    def expert_runs(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~moalign.training.settings.CostHints`."""
        if self.dpo_experts is not None:
            return "modpo", self.dpo_experts.model_dump(mode="json")
        return super().expert_runs()

    @property
    def switched_off(self) -> set[str]:
        """See :class:`~moalign.training.settings.CostHints`."""
        return set() if self.dpo_experts is None else {"experts"}

    @classmethod
    def borrows(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """The experts are trained as those of rewarded soups on the task, unless they come from DPO."""
        return {} if given.get("dpo_experts") else {"experts": "rewarded-soups"}


class Config(AnyExperts):
    """Settings of bone soups."""

    beta: float = Field(default=0.7, le=1)
    """Weight of an expert's own objective in the reward that it is trained on; the paper's: .6, .7 or .8."""
    extrapolate: tuple[float, ...] = ()
    """Alphas to choose from for each objective, 0 up to but not including 1; the code's: .1 to .5. Empty: none."""
    prompts: int = Field(default=64, ge=1)
    """Prompts of the calibration split that ``extrapolate`` is chosen on; all of them where they are fewer."""

    @field_validator("beta")
    @classmethod
    def _has_an_inverse(cls, beta: float) -> float:
        if beta <= 0.5:
            raise ValueError(
                f"found {beta:g}; allowed: above 0.5, up to 1: at one over the number of objectives all experts are "
                "alike and B has no inverse, and up to one half an expert's own objective is not half of its reward"
            )
        return beta

    @field_validator("extrapolate")
    @classmethod
    def _within(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        wrong = [alpha for alpha in alphas if not 0 <= alpha < 1]
        if wrong:
            raise ValueError(f"found {wrong[0]:g}; allowed: 0 up to, but not including, 1")
        return alphas

    def expert_vectors(self, objectives: int) -> list[Preference]:
        """See :class:`~moalign.training.settings.CostHints`: the rows of B."""
        return [tuple(row) for row in backbone(objectives, self.beta).tolist()]

    def responses_sampled(self, task: Amounts) -> int:
        """Each alpha is tried for each objective."""
        return task.objectives * len(self.extrapolate) * self.prompts


class BoneSoups:
    """One model per preference, made of experts on mixed rewards without further training."""

    name: ClassVar[str] = "bone-soups"
    summary: ClassVar[str] = "RL experts on mixed rewards B r, weights combined by B^-1 w (arXiv 2502.10762)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="merged", needs_online_rewards=True, snapshots=False, interpolates=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "experts": {"steps": 2, "batch": 4, "warmup": 0},
        "extrapolate": [0.0, 0.3],
        "prompts": 4,
    }

    def train(self, job: Job) -> None:
        """Obtain the experts, trained or found, and choose how far to extrapolate, where that is asked for."""
        from moalign.training.experts import bring_experts

        method, settings = job.config.expert_runs()
        bring_experts(job, method, settings, job.config.expert_vectors(len(job.task.names)))
        if job.config.extrapolate and not job.stage_done(STRETCH):
            choose_stretch(job)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the model whose weights are the experts' combined by ``B^-1 w``."""
        from moalign.policies.mixed import interpolated

        stretch = None
        if context.config.extrapolate:
            stretch = context.run.load_tensors(STRETCH)["k"].numpy()
        return interpolated(context, coefficients(preference, context.config.beta, stretch))


def backbone(objectives: int, beta: float) -> Matrix:
    """Return B, ``[experts, objectives]``: the weights of the reward that each expert is trained on."""
    if objectives == 1:
        return np.ones((1, 1))
    matrix = np.full((objectives, objectives), (1 - beta) / (objectives - 1))
    np.fill_diagonal(matrix, beta)
    return matrix.round(12)  # .3 and not .30000000000000004: the preference that a user would type


def coefficients(preference: Sequence[float], beta: float, stretch: Matrix | None = None) -> list[float]:
    """Return the experts' weights ``B^-1 (k_i w_i)_i``, ``[experts]``; they may be negative.

    ``stretch``: k, ``[objectives]``; None: all 1.
    """
    wanted = np.asarray(preference, dtype=np.float64) * (1.0 if stretch is None else stretch)
    solved = np.linalg.solve(backbone(len(preference), beta), wanted)
    weights: list[float] = solved.round(12).tolist()  # at a row of B exactly its expert
    return weights


def choose_stretch(job: Job) -> None:
    """Try each alpha at each corner and keep each objective's best k with the run."""
    import torch

    from moalign.core.seeds import derive
    from moalign.policies.measured import calibration_prompts, mean_rewards
    from moalign.policies.mixed import interpolated, put_away

    config, count = job.config, len(job.task.names)
    tried = [1 / (1 - alpha) for alpha in config.extrapolate]
    prompts, seed = calibration_prompts(job, config.prompts), derive(job.seed, STRETCH)
    best = []
    for index in range(count):
        found = []
        for number, k in enumerate(tried):
            at = coefficients(corner(count, index), config.beta, np.full(count, k))
            found.append(float(mean_rewards(job, interpolated(job, at), prompts, seed)[index]))
            job.progress(STRETCH, index * len(tried) + number + 1, count * len(tried))
        best.append(tried[int(np.argmax(found))])
    put_away(job)
    job.notes[STRETCH] = dict(zip(job.task.names, best, strict=True))
    job.run.save_tensors(STRETCH, {"k": torch.tensor(best, dtype=torch.float64)})
    job.finish_stage(STRETCH)
