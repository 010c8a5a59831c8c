"""What several verbs show of a run: its cost, its points, its hypervolume and indicators."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moalign.cli import output
from moalign.report.units import count, duration, interval, memory, nats, number, percent, signed

if TYPE_CHECKING:
    from moalign.evaluation.result import EvalResult, GroupUtilities, ProxyReward, Side, Volume
    from moalign.runs.record import RunRecord


def cost_of(record: RunRecord) -> str:
    """Return what a run took, in one line."""
    cost = record.cost
    return (
        f"{duration(record.seconds)}, {count(cost.tokens_generated)} tokens generated, "
        f"{count(cost.tokens_trained)} trained, {count(cost.reward_calls)} scores, "
        f"peak {memory(cost.peak_memory_bytes)}"
    )


def overlong(counts: Mapping[str, int]) -> str:
    """Return how many prompts were cut or dropped, in one line."""
    if "dropped" in counts:
        return f"{counts['dropped']} of {counts['prompts']} dropped: longer than generation.max_prompt_tokens"
    share = f"{counts['cut']} of {counts['prompts']} cut"
    return f"{share} to generation.max_prompt_tokens, {counts['cut_tokens']:,} tokens in all"


def show_points(result: EvalResult) -> None:
    """Print the table of mean rewards: one row per preference, normalised with interval and raw; * is the front."""
    from moalign.core.preferences import label

    scaled, raw = ([f"{name}\n{kind}" for name in result.objectives] for kind in ("normalised", "raw"))
    rows = []
    for point in result.points:
        means = [f"{number(mean)} {interval(ci, 2)}" for mean, ci in zip(point.mean, point.interval, strict=True)]
        row = {"preference": label(point.preference) + (" *" if point.nondominated else "")}
        row |= dict(zip(scaled, means, strict=True)) | dict(zip(raw, map(number, point.raw), strict=True))
        rows.append(row)
    output.table([*output.columns("preference", left=True), *output.columns(*scaled, *raw)], rows)
    if result.proxy_reward is not None:
        _show_believed(result, result.proxy_reward)


def _show_believed(result: EvalResult, believed: ProxyReward) -> None:
    """Print the mean rewards that were trained on beside the judge's, and the KL at which they were earned."""
    from moalign.core.preferences import label

    names = [*result.objectives, "w·n"]
    headings = [f"{name}\n{kind}" for name in names for kind in ("believed", "true")]
    rows = []
    for point, other in zip(result.points, believed.points, strict=True):
        sides = [(*mean, sum(map(operator.mul, point.preference, mean))) for mean in (other.mean, point.mean)]
        kl = nats({"kl": point.kl, "kl_bound": point.kl_bound})
        numbers = [number(value) for pair in zip(*sides, strict=True) for value in pair]
        rows.append(
            {"preference": label(point.preference), "KL\n(nats)": kl, **dict(zip(headings, numbers, strict=True))}
        )
    output.table([*output.columns("preference", left=True), *output.columns("KL\n(nats)", *headings)], rows)


def show_summary(result: EvalResult, short: bool = False) -> None:
    """Print the hypervolume with its interval, the optimal share and (unless ``short``) the indicators."""
    indicators, quality = result.indicators, result.quality
    corner = ", ".join(f"{value:g}" for value in result.reference_point)
    volume = f"{number(result.hypervolume, 4)} {interval(result.hypervolume_interval, 4)}"
    spread = f", spacing {number(indicators.spacing)}" if result.front > 1 else ""
    front = f"{result.front} of {len(result.points)} points on the front{'' if short else f' (*){spread}'}"
    rows = [("hypervolume", f"{volume} from reference point ({corner}), {front}")]
    if result.optimal_share is not None:
        rows.append(("optimal share", f"{_share(result)} of the exact optimum's hypervolume"))
    if result.proxy_reward is not None:
        rows.append(("believed", _believed(result.proxy_reward)))
    if result.generalisation is not None:
        rows.append(("trained on", _side(result.generalisation.trained)))
        rows.append(("held out", _side(result.generalisation.held_out)))
    if not short:
        rows += [
            ("Kendall's tau", number(indicators.tau, 2)),
            ("inner product", number(indicators.inner_product)),
            ("expected utility", number(indicators.expected_utility)),
            ("collapse rate", percent(quality.rate, 1)),
        ]
        if quality.kl is not None:
            rows.append(("KL to base", _moved(result)))
        if result.share_at_kl is not None:
            best = "of what the best policy at the same KL gains over the base"
            rows.append(("share at its KL", f"{percent(result.share_at_kl, 1)} {best}"))
        if result.groups is not None:
            rows.append(("worst group", _worst_off(result.groups)))
        if result.overlong:
            rows.append(("prompts", overlong(result.overlong)))
    rows += [("warning", text) for text in result.warnings or ()]
    output.pairs(rows)


def _believed(believed: ProxyReward) -> str:
    """Return the hypervolume and inner product by the rewards that the method was trained on."""
    bounds = believed.hypervolume_interval
    spread = "" if bounds is None else f" {interval(bounds, 4)}"
    return f"hypervolume {number(believed.hypervolume, 4)}{spread}, inner product {number(believed.inner_product)}"


def _worst_off(groups: GroupUtilities) -> str:
    """Return the utility of the worst-off group, and which group it is where."""
    from moalign.core.preferences import label

    value, at = f"{signed(groups.worst, 3)} {interval(groups.worst_interval, 3)}", label(groups.preference)
    return f"{value}: {groups.group}, at {at}, in log odds against the average answer"


def _share(volume: Volume) -> str:
    assert volume.optimal_share_interval is not None
    low, high = volume.optimal_share_interval
    return f"{percent(volume.optimal_share, 1)} [{100 * low:.1f}, {100 * high:.1f}]"


def _side(side: Side) -> str:
    """Return the numbers of the preferences that were trained on, or of those that were held out."""
    text = f"{len(side.prefs)} preferences: hypervolume {number(side.hypervolume, 4)}"
    if side.optimal_share is not None:
        text += f", {_share(side)} of the optimum's"
    if side.utility_share is not None:
        text += f"; utility {percent(side.utility_share, 1)} of the optimum's"
    return text


def _moved(result: EvalResult) -> str:
    """Return the mean KL to base and, where preferences differ, its range over them."""
    each = [point.kl for point in result.points if point.kl is not None]
    low, high = number(min(each), 2), number(max(each), 2)
    spread = f", {low} to {high} over the preferences" if low != high else ""
    return f"{nats(result.quality.model_dump())} nats per response{spread}"
