"""The verdict of a comparison in sentences: the winner, how certain that is, and caveats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moalign.report.units import interval, machines, number, percent, signed

COLLAPSED = 0.05
"""Share of collapsed responses at which a row gets a warning."""


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Return the verdict, one sentence or two per item: first the winner (or that there is none), then caveats."""
    judged = [row for row in record["rows"] if row["status"] != "failed"]
    lines = [_outcome(record, judged)]
    lines += _asked_for(record, judged)
    lines += _failures(record["rows"])
    flips = (record["sensitivity"] or {}).get("flipped", [])
    if flips:
        ref = ", ".join(f"{value:g}" for value in record["sensitivity"]["ref"])
        orders = "; ".join(f"{b} before {a}" for a, b in flips)
        lines.append(f"The ranking depends on the reference point: at ({ref}) it is {orders}.")
    for row in judged:
        if row["quality"]["rate"] >= COLLAPSED:
            lines.append(
                f"{row['label']}: {percent(row['quality']['rate'])} of its responses are collapsed "
                "(short, repetitive or looping); read some before trusting its hypervolume."
            )
    own = [row["label"] for row in judged if row["own_preferences"]]
    if own:
        others = "answered for other preferences than the comparison's grid, which can cost hypervolume."
        lines.append(f"{_listed(own)} {others}")
    if len(judged) > 1:
        lines.append(_seeds(judged))
    different = machines(record)
    if len(different) > 1:
        lines.append(f"Trained on different machines ({'; '.join(different)}): times of training cannot be compared.")
    return lines


def _outcome(record: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> str:
    if not judged:
        return "No method finished, so there is nothing to compare."
    if len(judged) == 1:
        return f"Only {judged[0]['label']} can be judged, so there is nothing to compare it with."
    if record["winner"] is None:
        return _no_winner(record, judged)
    label = record["winner"]
    pair = min((_seen_from(label, pair) for pair in _pairs_of(label, record["pairs"])), key=lambda p: p["difference"])
    wins = (
        f"{label} wins: its hypervolume is above that of {_everyone(len(judged) - 1)} with {_level(record)} certainty"
    )
    adjusted = ", each pair by itself" if len(judged) > 2 else ""
    return (
        f"{wins}{adjusted}. Its lead over {pair['other']}{', the next' if len(judged) > 2 else ''}: "
        f"{signed(pair['difference'])} {interval(pair['ci'])}."
    )


def _asked_for(record: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return who leads by inner product: a front can be good although its points answer other preferences."""
    pairs = [pair["inner_product"] for pair in record["pairs"] if pair.get("inner_product")]
    if not pairs:  # records of older versions do not hold it
        return []
    compared = {pair[side] for pair in pairs for side in "ab"}
    leader = max(
        (row for row in judged if row["label"] in compared), key=lambda row: row["indicators"]["inner_product"]
    )
    seen = [_seen_from(leader["label"], pair) for pair in _pairs_of(leader["label"], pairs)]
    near = min(seen, key=lambda pair: pair["difference"])
    how = "with certainty" if near["certain"] else f"which may be chance (above 0 in {percent(near['p_improve'])})"
    return [
        f"By what each preference asked for (inner product) {leader['label']} leads {near['other']} by "
        f"{signed(near['difference'])} {interval(near['ci'])}, {how}."
    ]


def _everyone(others: int) -> str:
    return "the other method" if others == 1 else f"each of the {others} others"


def _no_winner(record: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> str:
    leader = judged[0]
    seen = [_seen_from(leader["label"], pair) for pair in _pairs_of(leader["label"], record["pairs"])]
    open_ = [pair for pair in seen if not pair["certain"]]
    if not open_:
        return f"No method wins: {leader['label']} leads, but not all of its seeds finished."
    near = min(open_, key=lambda pair: pair["difference"])
    beaten = [pair["other"] for pair in seen if pair["certain"]]
    more = f" It is above {_listed(beaten)} with {_level(record)} certainty." if beaten else ""
    if near["difference"] == 0:
        return f"No method wins: {leader['label']} and {near['other']} have the same hypervolume.{more}"
    return (
        f"No method wins with certainty: {leader['label']} leads, but its lead over {near['other']} may be chance: "
        f"{signed(near['difference'])} {interval(near['ci'])}, above 0 in {percent(near['p_improve'])} of the "
        f"resamples.{more}"
    )


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [row["label"] for row in rows if row["status"] == "failed"]
    lines = [f"{_listed(failed)} failed and {'is' if len(failed) == 1 else 'are'} not ranked."] if failed else []
    for row in rows:
        if row["status"] == "partial":
            lost = sum(run["status"] != "done" for run in row["runs"])
            lines.append(
                f"{row['label']}: {lost} of {len(row['runs'])} seeds failed; its numbers are those of the others, "
                "and it cannot be named the winner."
            )
    return lines


def _seeds(judged: Sequence[Mapping[str, Any]]) -> str:
    trained = [row for row in judged if row["seeded"]]
    if not trained:
        return "Nothing was trained: the intervals are those of the evaluation prompts."
    fewest, most = (pick(len(row["seeds"]) for row in trained) for pick in (min, max))
    if fewest == 1:
        once = [row["label"] for row in trained if len(row["seeds"]) == 1]
        whose = "One training seed" if most == 1 else f"One training seed for {_listed(once)}"
        return (
            f"{whose}: the intervals tell how sure the numbers are for these runs, "
            "not how much another seed would change (--seeds 3)."
        )
    few = ", so few that their spread is itself uncertain: it is widened by Student's t" if fewest < 6 else ""
    return f"Intervals are over prompts and {fewest} training seeds{few}."


def _pairs_of(label: str, pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [pair for pair in pairs if label in (pair["a"], pair["b"])]


def _seen_from(label: str, pair: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pair with its difference as ``label`` minus ``other``."""
    if pair["a"] == label:
        return {**pair, "other": pair["b"]}
    lo, hi = pair["ci"]
    turned = {"difference": -pair["difference"], "ci": [-hi, -lo], "p_improve": 1 - pair["p_improve"]}
    return {**pair, **turned, "other": pair["a"]}


def lead_over_each(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pairs of the first-ranked row as its lead over each other row."""
    judged = [row for row in record["rows"] if row["status"] != "failed"]
    if len(judged) < 2:
        return []
    label = judged[0]["label"]
    return [_seen_from(label, pair) for pair in _pairs_of(label, record["pairs"])]


def sure(pair: Mapping[str, Any]) -> str:
    """Return whether a difference is certain, in words."""
    return "certain" if pair["certain"] else f"open (above 0 in {number(100 * pair['p_improve'], 0)} %)"


def _level(record: Mapping[str, Any]) -> str:
    return percent(record["level"])


def _listed(names: Sequence[str], most: int = 5) -> str:
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
