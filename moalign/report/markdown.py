"""The comparison as a Markdown page: verdict, tables, figures, and the commands that reproduce it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moalign.report.units import NONE, any_nats, count, duration, interval, memory, nats, number, percent, signed


def page(record: Mapping[str, Any], folder: Path) -> str:
    """Return the page; its links are relative to ``folder``, where it will be written."""
    judged = [row for row in record["rows"] if row["status"] != "failed"]
    parts = [
        f"# Comparison on `{record['task']}`",
        escaped(record["description"]),
        *[escaped(s) for s in record["verdict"]],
    ]
    if record["figure"]:
        parts.append(_image("Mean rewards of every method by preference", record["figure"], folder))
    if record.get("html"):
        parts.append(f"[The same as a page, with what each method answers]({_link(record['html'], folder)})")
    parts += ["## Ranking", _protocol(record), _ranking(record)]
    if record["pairs"]:
        parts += ["## Paired differences in hypervolume", _PAIRS, _pairs(record["pairs"])]
    if judged:
        parts += ["## Quality and cost", f"{_COST} {_KL}" if any_nats(judged) else _COST, _cost(judged)]
    parts += _blocks(record, judged)
    more = {name: path for name, path in (record.get("figures") or {}).items() if name != "fronts"}
    if more:
        parts += ["## Figures", *(_image(_FIGURES[name], path, folder) for name, path in more.items())]
    failures = _failures(record["rows"])
    if failures:
        parts += ["## Failures", failures]
    parts += ["## Reproduce", _reproduce(record)]
    return "\n\n".join(parts) + "\n"


_PAIRS = (
    "Positive: the first is better. A difference is certain when its percentile interval and the reflected one "
    "(which allows for the spread that noise alone gives to a front) both exclude 0; intervals are not adjusted for "
    "the number of pairs."
)
_FIGURES = {
    "utility": "What each preference gets: utility of the policy asked for it",
    "cost": "Hypervolume against cost",
    "curves": "Learning curves",
}
_COST = (
    "Cost of training is the mean per seed (memory: the largest). Answering: what the evaluation's responses took. "
    "Collapsed: responses that are short, repetitive or looping."
)
_KL = (
    "KL to base: how far the policy has moved from the base that is asked without a preference, in nats per response, "
    "mean over the preferences; ≤ marks an upper bound."
)


def _protocol(record: Mapping[str, Any]) -> str:
    ref = ", ".join(f"{value:g}" for value in record["ref"])
    samples = record.get("samples") or 1  # older records lack it
    sentences = [
        f"Objectives: {', '.join(f'`{name}`' for name in record['objectives'])}, normalised by the task card "
        f"(`{record['card_hash']}`).",
        f"Reference point ({ref}); {len(record['grid'])} preferences; {record['prompts'] or 0} evaluation prompts"
        f"{f', {samples} answers to each' if samples > 1 else ''}; "
        f"{percent(record['level'])} intervals from {record['draws']} paired resamples.",
    ]
    if record["optimum"]:
        sentences.append(f"Hypervolume of the exact optimum: {number(record['optimum']['hypervolume'], 4)}.")
    if record["sensitivity"]:
        second = ", ".join(f"{value:g}" for value in record["sensitivity"]["ref"])
        order = ", ".join(escaped(label) for label in record["sensitivity"]["ranking"])
        turned = "the ranking changes" if record["sensitivity"]["flips"] else "the ranking stays"
        sentences.append(f"At the reference point ({second}) {turned}: {order}.")
    return " ".join(sentences)


def _ranking(record: Mapping[str, Any]) -> str:
    known = record["optimum"] is not None
    many = any(len(row["seeds"]) > 1 for row in record["rows"])
    heads = ["#", "method", "hypervolume", "95 % interval"]
    heads += ["% of optimum"] if known else []
    heads += ["each seed", "interquartile mean"] if many else []
    heads += ["tau", "inner product", "expected utility", *(["regret"] if known else []), "IGD+", "spacing"]
    lines = []
    for row in record["rows"]:
        if row["status"] == "failed":
            lines.append([NONE, f"{escaped(row['label'])} (failed)", *[NONE] * (len(heads) - 2)])
            continue
        indicators = row["indicators"]
        partial = " (partial)" if row["status"] == "partial" else ""
        cells = [
            str(row["rank"]),
            escaped(row["label"]) + partial,
            number(row["hypervolume"], 4),
            interval(row["ci"], 4),
        ]
        cells += [percent(row["optimal_share"], 1)] if known else []
        by_seed = [", ".join(number(v) for v in row["hypervolume_by_seed"]), number(row["hypervolume_iqm"], 4)]
        cells += by_seed if many else []
        cells += [number(indicators[name]) for name in ("tau", "inner_product", "expected_utility")]
        cells += [number(indicators.get("regret"))] if known else []
        # Fewer than two points have no spacing (the record holds 0).
        spacing = indicators.get("spacing") if row["front"] >= 2 else None
        lines.append([*cells, number(indicators["igd_plus"]), number(spacing)])
    return table(heads, lines)


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            escaped(pair["a"]),
            escaped(pair["b"]),
            signed(pair["difference"], 4),
            interval(pair["ci"], 4),
            interval(pair["ci_reflected"], 4),
            percent(pair["p_improve"], 1),
            "yes" if pair["certain"] else "no",
        ]
        for pair in pairs
    ]
    heads = ["method", "against", "difference", "95 % interval", "reflected", "above 0 in", "certain"]
    return table(heads, lines, left=2)


def _cost(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ["#", "method", "time", "tokens generated", "tokens trained on", "reward calls", "peak memory"]
    moved = any_nats(rows)
    heads += ["answering: tokens", "answering: reward calls", "collapsed", "mean length", "distinct-3"]
    heads += ["KL to base"] if moved else []
    lines = []
    for row in rows:
        spent, answering, quality = row["cost"], row["cost"]["answering"], row["quality"]
        lines.append(
            [
                str(row["rank"]),
                escaped(row["label"]),
                duration(spent["seconds"]),
                *[count(spent[unit]) for unit in ("tokens_generated", "tokens_trained", "reward_calls")],
                memory(spent["peak_memory_bytes"]),
                count(answering["tokens_generated"]),
                count(answering["reward_calls"]),
                percent(quality["rate"], 1),
                number(quality["mean_length"], 1),
                number(quality["distinct_3"]),
                *([nats(quality)] if moved else []),
            ]
        )
    return table(heads, lines)


def _blocks(record: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sections that only some comparisons have: held-out preferences, diagnostics, papers' numbers."""
    parts = []
    held = [row for row in judged if row.get("generalisation")]
    if held:
        parts += ["## Generalisation", _HELD_OUT, _generalisation(held)]
    if any(row.get("gap") is not None for row in judged):
        parts += ["## Trained on, and true", _GAP, _gaps(judged)]
    measured = [row for row in judged if row.get("diagnostics")]
    if measured:
        lines = [
            [escaped(row["label"]), escaped(k), f"{v:.4g}"] for row in measured for k, v in row["diagnostics"].items()
        ]
        parts += ["## Training diagnostics", _DIAGNOSTICS, table(["method", "quantity", "value"], lines)]
    if record.get("reported"):
        parts += ["## Reported by papers, not measured here", _REPORTED, _reported(record["reported"])]
    return parts


_DIAGNOSTICS = (
    "What each method measured of itself at the end of training, mean over seeds; the names are the method's own."
)
_HELD_OUT = (
    "Preferences that training did not see, beside those that it did; mean over seeds. Compare the two by utility (the "
    "mean of w.n, as a share of the optimum's): a hypervolume also depends on how close its preferences lie."
)
_GAP = (
    "Hypervolume by the rewards that were trained on, minus the judge's: what was gained in those rewards' eyes only. "
    "The larger, the more they were exploited."
)
_REPORTED = "Other models, data and judges: not comparable with any number above."


def _generalisation(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ["method", "preferences", "how many", "hypervolume", "% of optimum", "utility, % of optimum"]
    heads += ["tau", "inner product"]
    lines = [
        [
            escaped(row["label"]),
            side.replace("_", " "),
            str(numbers["preferences"]),
            number(numbers["hypervolume"], 4),
            percent(numbers["optimal_share"], 1),
            percent(numbers.get("utility_share"), 1),
            number(numbers["tau"]),
            number(numbers["inner_product"]),
        ]
        for row in rows
        for side, numbers in row["generalisation"].items()
    ]
    return table(heads, lines)


def _gaps(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [[escaped(row["label"]), number(row["hypervolume"], 4), signed(row.get("gap"), 4)] for row in rows]
    return table(["method", "hypervolume", "gap"], lines, left=1)


def _reported(reported: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [*(escaped(number[key]) for key in ("method", "metric", "setting", "source")), f"{number['value']:g}"]
        for number in reported
    ]
    return table(["method", "metric", "setting", "source", "value"], lines, left=4)


def _image(text: str, path: str, folder: Path) -> str:
    return f"![{text}]({_link(path, folder)})"


def _link(path: str, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"- **{escaped(row['label'])}**, seed {run['seed']}: {escaped(run['error'])}"
        for row in rows
        for run in row["runs"]
        if run["error"]
    )


def _reproduce(record: Mapping[str, Any]) -> str:
    lines = [_code([record["command"]]), "Each row by itself:"]
    for row in record["rows"]:
        lines.append(f"{escaped(row['label'])}:\n\n{_code([run['command'] for run in row['runs']])}")
    lines.append(f"Evaluated with {software(record['environment'])}.")
    return "\n\n".join(lines)


def software(environment: Mapping[str, Any]) -> str:
    """Return the versions of Python and packages in a captured environment, and the commit."""
    packages = environment.get("packages") or {}
    named = ", ".join(f"{name} {packages[name]}" for name in ("moalign", "torch", "transformers") if packages.get(name))
    changed = " with changes" if environment.get("dirty") else ""
    commit = f", commit `{environment['commit'][:12]}`{changed}" if environment.get("commit") else ""
    return f"Python {environment.get('python')}, {named or 'moalign'}{commit}"


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```sh", *lines, "```"])


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2, last_left: bool = False) -> str:
    """Return a Markdown table: ``left`` columns of text, then right-aligned numbers; the last may be text again."""
    ends = {len(heads) - 1} if last_left else set()
    rule = ["---" if index < left or index in ends else "---:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def escaped(text: str) -> str:
    """Return text on one line with Markdown's special characters escaped."""
    flat = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\`*_|<>" else char for char in flat).replace("](", "]\\(")
