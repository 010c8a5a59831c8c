"""The verdict of a comparison in sentences: the winner, how certain that is, and caveats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moalign.core import preferences
from moalign.report.record import Row, judged, machines
from moalign.report.tables import MARK
from moalign.report.units import interval, number, percent, signed

COLLAPSED = 0.05
"""Share of collapsed responses at which a row gets a warning."""

UNREAD = 0.05
"""Share of a judge's verdicts without a score above which an evaluation gets a warning."""

KL_PER_TOKEN = 3.0
"""Nats of KL to base for each token of a response above which a row gets a warning.

The KL is at most the cross entropy: above this the base finds the responses as hard to foresee as with a perplexity of
e^3 = 20 or more, token by token. That is about what text of its own kind costs a small language model, and responses
that the policy has learnt to give should be far likelier. (Policies of the published comparisons that answer in the
base's language are at .03 to 1.8, those that left it at 3.9 and 4.2.)
"""


def lead_over_each(record: Row, label: str | None = None, key: str | None = None) -> list[dict[str, Any]]:
    """Return every pair that ``label`` (the first-ranked row) is in, as its lead over the ``other``.

    ``key`` names the part of a pair that holds another quantity's difference; pairs without it are left out.
    """
    rows = judged(record)
    if len(rows) < 2:
        return []
    leader = rows[0]["label"] if label is None else label
    leads = []
    for pair in record["pairs"]:
        difference = pair if key is None else pair[key]
        if leader not in (pair["a"], pair["b"]) or difference is None:
            continue
        if pair["a"] == leader:
            leads.append({**difference, "other": pair["b"]})
        else:
            low, high = difference["ci"]
            turned = {"difference": -difference["difference"], "ci": [-high, -low]}
            share = {"share_above_zero": 1 - difference["share_above_zero"]}
            leads.append({**difference, **turned, **share, "other": pair["a"]})
    return leads


def sure(lead: Row) -> str:
    """Return whether a difference is certain, in words."""
    return "certain" if lead["certain"] else f"open{_above(lead, ' (above 0 in {})')}"


def _above(lead: Row, text: str) -> str:
    """Return the share of resamples above 0 in words, for a difference that is open.

    Nothing where the share alone would call it certain: it knows the seeds that there are; an interval, how few, too.
    """
    share = float(lead["share_above_zero"])
    return text.format(percent(share)) if 0.025 < share < 0.975 else ""


def sentences(record: Row) -> list[str]:
    """Return the verdict, one sentence or two per item: first the winner (or that there is none), then caveats."""
    rows = judged(record)
    lines = [_outcome(record, rows), *_by_inner_product(record, rows), *_false_wins(rows), *_failures(record["rows"])]
    sensitivity = record["sensitivity"]
    if sensitivity and sensitivity["flipped"]:
        ref = ", ".join(f"{value:g}" for value in sensitivity["ref"])
        orders = "; ".join(f"{b} before {a}" for a, b in sensitivity["flipped"])
        lines.append(f"The ranking depends on the reference point: at ({ref}) it is {orders}.")
    lines += [
        f"{row['label']}: {text}." for row in rows for text in [*cautions(row["quality"]), *row.get("warnings", ())]
    ]
    own = [row["label"] for row in rows if row["own_preferences"]]
    if own:
        others = "answered for other preferences than the comparison's grid, which can cost hypervolume."
        lines.append(f"{_listed(own)} {others}")
    if len(rows) > 1:
        lines.append(_seeds(rows))
    different = machines(record)
    if len(different) > 1:
        lines.append(f"Trained on different machines ({'; '.join(different)}): times of training cannot be compared.")
    return lines


def unread(judges: Mapping[str, Row]) -> list[str]:
    """Return a warning for each LLM judge of whose verdicts many could not be read; usage by objective."""
    rates = {name: usage["failure_rate"] for name, usage in judges.items()}
    return [
        f"{percent(rate)} of the verdicts on {name} could not be read and are in no mean"
        for name, rate in rates.items()
        if rate is not None and rate > UNREAD
    ]


def cautions(quality: Row, known: Row | None = None) -> list[str]:
    """Return what a row's quality warns of: collapsed responses, and a policy that has left the base's language.

    Not of what ``known``, the quality over all seeds, warns of already.
    """
    told = _beyond(known) if known is not None else {}
    texts = [text for kind, text in _beyond(quality).items() if kind not in told]
    return [f"{text}; read some before trusting its hypervolume" for text in texts]


def cautions_at(quality: Row, points: Sequence[Row]) -> list[str]:
    """Return what single preferences warn of where ``quality``, the mean over all, does not.

    Each of ``points`` has its own ``collapsed`` (a rate), ``mean_length`` and KL; points of older files have not.
    """
    everywhere = _beyond(quality)
    return [
        f"at {preferences.label(point['prefs'])} {text}; read some before trusting that point"
        for point in points
        if point.get("collapsed") is not None
        for kind, text in _beyond({**point, "rate": point["collapsed"]}).items()
        if kind not in everywhere
    ]


def _beyond(quality: Row) -> dict[str, str]:
    """Return what is beyond its limit (``collapse``, ``kl``), in words."""
    texts, kl, length = {}, quality.get("kl"), max(1.0, float(quality["mean_length"]))
    if quality["rate"] >= COLLAPSED:
        texts["collapse"] = f"{percent(quality['rate'])} of its responses are collapsed (short, repetitive or looping)"
    if kl is not None and not quality.get("kl_bound") and kl > KL_PER_TOKEN * length:
        texts["kl"] = (
            f"its KL to base is {number(kl / length, 1)} nats per token (above {KL_PER_TOKEN:g}): the base would "
            "hardly ever give its responses"
        )
    return texts


def _outcome(record: Row, rows: Sequence[Row]) -> str:
    if not rows:
        return "No method finished, so there is nothing to compare."
    if len(rows) == 1:
        return f"Only {rows[0]['label']} can be judged, so there is nothing to compare it with."
    label, others = record["winner"], len(rows) - 1
    if label is None:
        return _no_winner(record, rows[0]["label"])
    near = _smallest(lead_over_each(record, label))
    everyone = "the other method" if others == 1 else f"each of the {others} others"
    adjusted, following = (", each pair by itself", ", the next") if others > 1 else ("", "")
    return (
        f"{label} wins: its hypervolume is above that of {everyone} with {percent(record['level'])} "
        f"certainty{adjusted}. Its lead over {near['other']}{following}: {_difference(near)}."
    )


def _no_winner(record: Row, leader: str) -> str:
    leads = lead_over_each(record, leader)
    uncertain = [lead for lead in leads if not lead["certain"]]
    if not uncertain:
        return f"No method wins: {leader} leads, but not all of its seeds finished."
    near = _smallest(uncertain)
    beaten = [lead["other"] for lead in leads if lead["certain"] and lead["difference"] > 0]
    more = f" It is above {_listed(beaten)} with {percent(record['level'])} certainty." if beaten else ""
    if near["difference"] == 0:
        return f"No method wins: {leader} and {near['other']} have the same hypervolume.{more}"
    return (
        f"No method wins with certainty: {leader} leads, but its lead over {near['other']} may be chance: "
        f"{_difference(near)}{_above(near, ', above 0 in {} of the resamples')}.{more}"
    )


def _by_inner_product(record: Row, rows: Sequence[Row]) -> list[str]:
    """Return who leads by inner product: a front can be good although its points answer other preferences."""
    compared = {pair[side] for pair in record["pairs"] if pair["inner_product"] for side in "ab"}
    compared -= {row["label"] for row in rows if row.get("own_preferences")}  # of other preferences than the grid's
    if len(compared) < 2:
        return []
    label = max(
        (row for row in rows if row["label"] in compared), key=lambda row: float(row["indicators"]["inner_product"])
    )["label"]
    near = _smallest([lead for lead in lead_over_each(record, label, "inner_product") if lead["other"] in compared])
    lead = f"{label} leads {near['other']} by {_difference(near)}"
    how = "with certainty" if near["certain"] else f"which may be chance{_above(near, ' (above 0 in {})')}"
    return [f"By what each preference asked for (inner product) {lead}, {how}."]


def _false_wins(rows: Sequence[Row], most: int = 3) -> list[str]:
    """Return which leads in believed reward are none in truth: of each method the one that is furthest behind."""
    worst = []
    for row in rows:
        wins = (row.get("believed") or {}).get("false_wins", ())
        if wins:
            win = min(wins, key=lambda win: (not win["certain"], float(win["difference"])))
            worst.append((len(wins) - 1, {**win, "label": row["label"]}))
    texts = [
        f"{win['label']} over {win['over']}{', the nearest to the base,' if win['nearest_to_base'] else ''} "
        f"({win['quantity'].replace('_', ' ')}: believed {signed(win['believed'])}, true {_difference(win)}"
        f"{'' if win['certain'] else ', which may be chance'}{f'; and {others} more' if others else ''})"
        for others, win in sorted(worst, key=lambda item: float(item[1]["difference"]))
    ]
    left = len(texts) - most
    rest = f"; and {left} other method{'s' if left > 1 else ''}" if left > 0 else ""
    listed = "; ".join(texts[:most])
    return [f"{MARK} Ahead by the rewards that were trained on, but not in truth: {listed}{rest}."] if texts else []


def _smallest(leads: Sequence[Row]) -> Row:
    return min(leads, key=lambda lead: float(lead["difference"]))


def _difference(lead: Row) -> str:
    return f"{signed(lead['difference'])} {interval(lead['ci'])}"


def _failures(rows: Sequence[Row]) -> list[str]:
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


def _seeds(rows: Sequence[Row]) -> str:
    trained = [row for row in rows if row["seeded"]]
    if not trained:
        return "Nothing was trained: the intervals are those of the evaluation prompts."
    counts = [len(row["seeds"]) for row in trained]
    if min(counts) == 1:
        once = [row["label"] for row in trained if len(row["seeds"]) == 1]
        whose = "One training seed" if max(counts) == 1 else f"One training seed for {_listed(once)}"
        return (
            f"{whose}: the intervals tell how sure the numbers are for these runs, "
            "not how much another seed would change (--seeds 3)."
        )
    few = ", so few that their spread is itself uncertain: it is widened by Student's t" if min(counts) < 6 else ""
    most = f" to {max(counts)}" if max(counts) > min(counts) else ""
    return f"Intervals are over prompts and {min(counts)}{most} training seeds{few}."


def _listed(names: Sequence[str], most: int = 5) -> str:
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
