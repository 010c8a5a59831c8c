"""The most reward at a KL to the base, where every answer's rewards and probability are known.

Among all policies with ``mean over prompts of KL(pi || pi_ref) <= c`` the mean of a utility u is largest for

    pi_b(y | x) = pi_ref(y | x) exp(u(x, y) / b) / Z(x),

the closed form of the KL-regularised optimum, with the one temperature b, shared by all prompts, at which its own mean
KL is c: the KL is a single constraint, so it has a single multiplier. Over b these policies are the frontier: from the
reference (b infinite) to the unregularised optimum (b = 0), increasing and concave, with slope ``dE[u] / dKL = b``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moalign.core.arrays import Matrix

COLDEST, HOTTEST = 1e-6, 1e4
"""Range of b: utilities that differ by less than the first are equal, and at the second nothing has moved yet."""
CURVE = np.geomspace(30, 0.004, 45).tolist()
"""Values of b between the two for :meth:`Frontier.curve`; in units of a standard deviation the utility bends here."""
EXACT = 1e-4
"""Nats by which the KL of :meth:`Frontier.at_kl` may miss what was requested."""


@dataclass(frozen=True)
class Frontier:
    """The frontier of one preference over x prompts with up to y answers each, in rewards ``[m]``."""

    log_reference: Matrix
    """log pi_ref, ``[x, y]``; -inf for what it never gives, and to fill up. What a row's sum lacks of 1 is the
    reference's alone: the optimum gives no other answers, so its KL is at least minus the log of that sum."""
    rewards: Matrix
    """``[x, y, m]``."""
    utility: Matrix
    """``[x, y]``."""
    shares: Matrix
    """How much each prompt counts, ``[x]``; they sum to 1."""

    def at(self, beta: float) -> tuple[float, Matrix]:
        """Return mean KL to the reference, in nats, and mean rewards ``[m]`` of the policy at a temperature above 0."""
        gain = self.utility / beta
        gain -= (self.log_reference + gain).max(axis=1, keepdims=True)  # a constant changes neither KL nor policy
        weight = np.exp(self.log_reference + gain)
        total = weight.sum(axis=1)
        chance = weight / total[:, None]
        kl = (chance * gain).sum(axis=1) - np.log(total)
        return float(self.shares @ kl), np.einsum("x,xy,xym->m", self.shares, chance, self.rewards)

    def at_kl(self, kl: float) -> Matrix:
        """Return the optimum's mean rewards ``[m]`` at a mean KL in nats.

        Below the least that moves anything they are the reference's own; above the largest attainable, those of the
        unregularised optimum.
        """
        if kl >= self.at(COLDEST)[0]:
            return self.best
        moved, rewards = self.at(HOTTEST)
        if kl <= moved:
            return rewards
        cold, hot = np.log(COLDEST), np.log(HOTTEST)
        while abs(moved - kl) > EXACT:
            middle = (cold + hot) / 2
            moved, rewards = self.at(float(np.exp(middle)))
            cold, hot = (middle, hot) if moved > kl else (cold, middle)
        return rewards

    def curve(self) -> tuple[Matrix, Matrix]:
        """Return the frontier as KLs ``[n]``, rising from 0, and mean rewards ``[n, m]``."""
        points = [self.at(beta) for beta in (HOTTEST, *CURVE, COLDEST)]
        kls, rewards = np.array([kl for kl, _ in points]), np.array([mean for _, mean in points])
        kls[0], rewards[-1] = 0.0, self.best
        return kls, rewards

    @property
    def best(self) -> Matrix:
        """Mean rewards of the unregularised optimum, ``[m]``."""
        first = np.where(np.isfinite(self.log_reference), self.utility, -np.inf).argmax(axis=1)
        return np.asarray(self.shares @ self.rewards[np.arange(len(first)), first])
