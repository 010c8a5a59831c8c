"""Several reference models as one: MRPO's virtual reference (arXiv 2405.16388), of log-probabilities alone.

    pi~(y) = ( sum_k a_k / pi_k(y) )^-1,      a on the simplex: the harmonic mean of K references

is what takes the reference's place in DPO's loss. It is no distribution, which the loss does not need: what is missing
to 1 depends on the prompt alone and cancels. The first reference is the one that training starts from.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from moalign.core.arrays import Matrix

Trust = Literal["confident", "even", "code"]
"""Whose a_k is large. confident: the reference's that tells the two responses of the pair apart most,
``a_k = |log pi_k(y_w) - log pi_k(y_l)|`` over their sum; even: 1 / K; code: as confident, but for the two exchanged, as
the public code has it (of two references alone)."""

TINY = 1e-6
"""Added to the sum of the gaps, in nats: references that tell nothing apart leave all trust to the first (code)."""


def virtual_reference(logps: Matrix, trust: Trust = "confident", region: float | None = 0.1) -> Matrix:
    """Return ``log pi~`` of the responses of each pair, ``[pairs, 2]``.

    Args:
        logps: of each pair's chosen and rejected response under every reference, the first first, ``[K, pairs, 2]``.
        trust: see :data:`Trust`.
        region: see :func:`clipped`; None: nothing is clipped.

    Raises ValueError for ``trust: code`` of any but two references.
    """
    a = trusted(logps, trust)
    near = logps if region is None else clipped(logps, region)
    with np.errstate(divide="ignore"):  # a weight of 0 leaves its reference out
        terms = np.log(a)[:, :, None] - near
    most = terms.max(axis=0)
    virtual: Matrix = -(most + np.log(np.exp(terms - most).sum(axis=0)))
    return virtual


def trusted(logps: Matrix, trust: Trust) -> Matrix:
    """Return ``a``, the weights of the references for each pair, ``[K, pairs]``; arguments as above."""
    count = len(logps)
    if trust == "even":
        return np.full(logps.shape[:2], 1.0 / count)
    if trust == "code" and count != 2:
        raise ValueError(f"trust: code is of two references; found {count}")
    gaps = np.abs(logps[..., 0] - logps[..., 1])
    others = gaps[1:] / (gaps.sum(axis=0) + TINY)
    a = np.concatenate([1.0 - others.sum(axis=0, keepdims=True), others])
    return a[::-1] if trust == "code" else a


def clipped(logps: Matrix, region: float) -> Matrix:
    """Return log-probabilities of the further references within a trust region around the first, as ``logps``.

    Those of a response lie between ``(1 + e) log pi_1`` and ``(1 - e) log pi_1``; e is ``region`` times the response's
    share of the pair's nats, of the mean over the references: the less likely of the two has more room (adaptive).
    """
    nats = np.abs(logps.mean(axis=0))
    e = region * nats / np.maximum(nats.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    first = logps[0]
    return np.concatenate([logps[:1], np.clip(logps[1:], first * (1 + e), first * (1 - e))])
