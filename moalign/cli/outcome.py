"""What several verbs show of a run: its cost, its points, its hypervolume and indicators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moalign.cli import output
from moalign.report.units import count, duration, interval, memory, nats, number, percent

if TYPE_CHECKING:
    from moalign.runs.record import RunRecord

Content = Mapping[str, Any]


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


def show_points(content: Content) -> None:
    """Print the table of mean rewards: one row per preference, normalised with interval and raw; * is the front."""
    from moalign.core.preferences import label

    names = content["objectives"]
    scaled, raw = ([f"{name}\n{kind}" for name in names] for kind in ("normalised", "raw"))
    rows = []
    for point in content["points"]:
        means = [f"{number(mean)} {interval(ci, 2)}" for mean, ci in zip(point["mean"], point["ci"], strict=True)]
        row = {"preference": label(point["prefs"]) + (" *" if point["nondominated"] else "")}
        row |= dict(zip(scaled, means, strict=True)) | dict(zip(raw, map(number, point["raw"]), strict=True))
        rows.append(row)
    output.table([*output.columns("preference", left=True), *output.columns(*scaled, *raw)], rows)


def show_summary(content: Content, short: bool = False) -> None:
    """Print the hypervolume with its interval, the optimal share and (unless ``short``) the indicators."""
    indicators, quality = content["indicators"], content.get("quality") or {}
    corner = ", ".join(f"{value:g}" for value in content["ref"])
    volume = (
        f"{number(content['hypervolume'], 4)} {interval(content['hypervolume_ci'], 4)} from reference point ({corner})"
    )
    spacing = indicators.get("spacing")
    spread = "" if spacing is None or content["front"] < 2 else f", spacing {number(spacing)}"
    front = f"{content['front']} of {len(content['points'])} points on the front{'' if short else f' (*){spread}'}"
    rows = [("hypervolume", f"{volume} from reference point ({corner}), {front}")]
    if content.get("optimal_share") is not None:
        rows.append(("optimal share", f"{_share(content)} of the exact optimum's hypervolume"))
    rows += _generalisation_rows(content.get("generalisation") or {})
    if not short:
        rows += [
            ("Kendall's tau", number(indicators["tau"], 2)),
            ("inner product", number(indicators["inner_product"])),
            ("expected utility", number(indicators["expected_utility"])),
        ]
        if "rate" in quality:
            rows.append(("collapse rate", percent(quality["rate"], 1)))
        if quality.get("kl") is not None:
            rows.append(("KL to base", _moved(content)))
        if content.get("overlong"):
            rows.append(("prompts", overlong(content["overlong"])))
    output.pairs(rows)


def _share(content: Content) -> str:
    low, high = content["optimal_share_ci"]
    return f"{percent(content['optimal_share'], 1)} [{100 * low:.1f}, {100 * high:.1f}]"


def _moved(content: Content) -> str:
    """Return the mean KL to base and, where preferences differ, its range over them."""
    each = [point["kl"] for point in content["points"]]
    low, high = number(min(each), 2), number(max(each), 2)
    spread = f", {low} to {high} over the preferences" if low != high else ""
    return f"{nats(content['quality'])} nats per response{spread}"


def _generalisation_rows(content: Content) -> list[tuple[str, str]]:
    """Return a row for the preferences that were trained on and one for those that were held out."""
    rows = []
    for side, name in (("trained", "trained on"), ("held_out", "held out")):
        part = content.get(side)
        if part is None:
            continue
        text = f"{len(part['prefs'])} preferences: hypervolume {number(part['hypervolume'], 4)}"
        if part["optimal_share"] is not None:
            text += f", {_share(part)} of the optimum's"
        if part.get("utility_share") is not None:
            text += f"; utility {percent(part['utility_share'], 1)} of the optimum's"
        rows.append((name, text))
    return rows
