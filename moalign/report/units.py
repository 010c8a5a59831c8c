"""Numbers, shares, sizes and times as text."""

from __future__ import annotations

from collections.abc import Sequence

from moalign.report.record import Row

NONE = "–"
"""Shown where there is no number."""


def number(value: float | None, digits: int = 3) -> str:
    """Return a fixed number of decimals, never ``-0.000``; NaN is no number.

    >>> number(0.98765), number(-0.0001)
    ('0.988', '0.000')
    """
    return NONE if value is None or value != value else f"{value:z.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a number with its sign; what rounds to zero has none.

    >>> signed(0.0521)
    '+0.052'
    """
    sign = "+" if value is not None and round(value, digits) > 0 else ""
    return sign + number(value, digits)


def interval(bounds: Sequence[float] | None, digits: int = 3) -> str:
    """Return ``[lo, hi]``."""
    return NONE if bounds is None else f"[{number(bounds[0], digits)}, {number(bounds[1], digits)}]"


def percent(share: float | None, digits: int = 0) -> str:
    """Return a share as percent.

    >>> percent(0.967)
    '97 %'
    """
    return NONE if share is None else f"{number(100 * share, digits)} %"


def nats(quality: Row) -> str:
    """Return the KL to base that quality guards hold, marked where it is an upper bound.

    >>> nats({"kl": 3.208}), nats({"kl": 0.6363, "kl_bound": True}), nats({})
    ('3.21', '≤ 0.64', '–')
    """
    value = quality.get("kl")
    return f"≤ {number(value, 2)}" if quality.get("kl_bound") and value is not None else number(value, 2)


def count(value: float | None) -> str:
    """Return a count in three figures.

    >>> count(1358367), count(45283), count(512)
    ('1.36 M', '45.3 k', '512')
    """
    if value is None:
        return NONE
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{_three_figures(value / size)} {unit}"
    return f"{value:.0f}"


def of_judge(usage: Row) -> str:
    """Return what an LLM judge was asked, and how many of its verdicts could not be read.

    >>> usage = {"model": "small", "verdicts": 40, "unreadable": 2, "failure_rate": 0.05}
    >>> of_judge({**usage, "prompt_tokens": 5200, "completion_tokens": 310})
    '40 verdicts of small (5.20 k tokens read, 310 written), 2 of them unreadable (5.0 %)'
    """
    failed = f", {usage['unreadable']} of them unreadable ({percent(usage['failure_rate'], 1)})"
    tokens = f"{count(usage['prompt_tokens'])} tokens read, {count(usage['completion_tokens'])} written"
    noun = "verdict" if usage["verdicts"] == 1 else "verdicts"
    return f"{usage['verdicts']} {noun} of {usage['model']} ({tokens}){failed if usage['unreadable'] else ''}"


def memory(size: float | None) -> str:
    """Return bytes in MiB or GiB.

    >>> memory(735465472)
    '701 MiB'
    """
    if size is None:
        return NONE
    mib = size / 2**20
    return f"{_three_figures(mib / 1024)} GiB" if mib >= 999.5 else f"{mib:.0f} MiB"


def duration(seconds: float | None) -> str:
    """Return a time in its two largest units.

    >>> duration(0.42), duration(60.7), duration(7384)
    ('0.4 s', '1 min 01 s', '2 h 03 min')
    """
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _three_figures(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"
