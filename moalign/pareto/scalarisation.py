"""Scalarisations: how a vector of rewards becomes the one number that responses are ordered by.

For a preference w and normalised rewards z (larger is better) the score s is

* linear: ``w . z``;
* tchebycheff: ``-max_i w_i (u - z_i) + rho w . z``, the augmented Tchebycheff distance from the utopia point u (Steuer
  and Choo 1983), negated: the objective that falls short most, by its weight, decides;
* smooth: the same with ``mu log sum_i exp(w_i (u - z_i) / mu)`` for the maximum (Lin et al. 2024, arXiv 2402.19078);
* exponential: ``sum_i w_i (1 - exp(-a z_i)) / a``, exponential utility of constant risk aversion a (Pratt 1964): a
  reward's next unit is worth ``exp(-a z_i)`` of the first, so that no reward, however large, outweighs another's lack.

A linear score has its maximum at a corner of what can be reached wherever a front is not curved outwards, so that
neighbouring preferences jump from one end to the other; a Tchebycheff score reaches every point of any front.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from moalign.core.arrays import Matrix

Scalarisation = Literal["linear", "tchebycheff", "smooth", "exponential"]

UTOPIA = 3.0
"""u, in standard deviations of each reward."""
RHO = 0.05
"""Weight of the linear part, so that of answers alike in the worst objective the better one wins."""
SMOOTHING = 0.1
"""mu, in units of z."""
RISK_AVERSION = 0.25
"""a, per unit of z: at three standard deviations a reward's next unit is worth half as much as at the mean."""


def scores(z: Matrix, preferences: Matrix, how: Scalarisation = "linear") -> Matrix:
    """Return s of rewards ``[..., objectives]`` at ``preferences`` that fit them by broadcasting; ``[...]``."""
    linear = (z * preferences).sum(axis=-1)
    if how == "linear":
        return np.asarray(linear)
    if how == "exponential":
        return np.asarray((preferences * -np.expm1(-RISK_AVERSION * z)).sum(axis=-1) / RISK_AVERSION)
    short = preferences * (UTOPIA - z)
    most = short.max(axis=-1)
    if how == "smooth":
        most = most + SMOOTHING * np.log(np.exp((short - most[..., None]) / SMOOTHING).sum(axis=-1))
    return np.asarray(RHO * linear - most)
