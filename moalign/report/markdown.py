"""The comparison as a Markdown page: verdict, tables, figure, and the command that makes each row again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moalign.report.units import NONE, count, duration, interval, memory, number, percent, signed


def page(told: Mapping[str, Any], folder: Path) -> str:
    """Return the page; links are relative to ``folder``, where it will lie."""
    judged = [row for row in told["rows"] if row["status"] != "failed"]
    parts = [f"# Comparison on `{told['task']}`", _text(told["description"]), *[_text(s) for s in told["verdict"]]]
    if told["figure"]:
        link = Path(os.path.relpath(told["figure"], folder)).as_posix()
        parts.append(f"![Mean rewards of every method by preference]({quote(link)})")
    parts += ["## Ranking", _protocol(told), _ranking(told)]
    if told["pairs"]:
        parts += ["## Paired differences in hypervolume", _PAIRS, _pairs(told["pairs"])]
    if judged:
        parts += ["## Quality and cost", _COST, _cost(judged)]
    failures = _failures(told["rows"])
    if failures:
        parts += ["## Failures", failures]
    parts += ["## Reproduce", _reproduce(told)]
    return "\n\n".join(parts) + "\n"


_PAIRS = (
    "Positive: the first is better. A difference is certain when its percentile interval and the reflected one "
    "(which allows for the spread that noise alone gives to a front) both exclude 0; intervals are not adjusted for "
    "the number of pairs."
)
_COST = (
    "Cost of training is the mean per seed (memory: the largest). Answering: what the evaluation's responses took. "
    "Collapsed: responses that are short, repetitive or looping."
)


def _protocol(told: Mapping[str, Any]) -> str:
    ref = ", ".join(f"{value:g}" for value in told["ref"])
    said = [
        f"Objectives: {', '.join(f'`{name}`' for name in told['objectives'])}, normalised by the task card "
        f"(`{told['card_hash']}`).",
        f"Reference point ({ref}); {len(told['grid'])} preferences; {told['prompts'] or 0} evaluation prompts; "
        f"{percent(told['level'])} intervals from {told['draws']} paired resamples.",
    ]
    if told["optimum"]:
        said.append(f"Hypervolume of the exact optimum: {number(told['optimum']['hypervolume'], 4)}.")
    if told["sensitivity"]:
        second = ", ".join(f"{value:g}" for value in told["sensitivity"]["ref"])
        order = ", ".join(_text(label) for label in told["sensitivity"]["ranking"])
        turned = "the ranking changes" if told["sensitivity"]["flips"] else "the ranking stays"
        said.append(f"At the reference point ({second}) {turned}: {order}.")
    return " ".join(said)


def _ranking(told: Mapping[str, Any]) -> str:
    known = told["optimum"] is not None
    many = any(len(row["seeds"]) > 1 for row in told["rows"])
    heads = ["#", "method", "hypervolume", "95 % interval"]
    heads += ["% of optimum"] if known else []
    heads += ["each seed"] if many else []
    heads += ["tau", "inner product", "expected utility", *(["regret"] if known else []), "IGD+"]
    lines = []
    for row in told["rows"]:
        if row["status"] == "failed":
            lines.append([NONE, f"{_text(row['label'])} (failed)", *[NONE] * (len(heads) - 2)])
            continue
        found = row["indicators"]
        partial = " (partial)" if row["status"] == "partial" else ""
        cells = [str(row["rank"]), _text(row["label"]) + partial, number(row["hypervolume"], 4), interval(row["ci"], 4)]
        cells += [percent(row["optimal_share"], 1)] if known else []
        cells += [", ".join(number(v) for v in row["hypervolume_by_seed"])] if many else []
        cells += [number(found[name]) for name in ("tau", "inner_product", "expected_utility")]
        cells += [number(found.get("regret"))] if known else []
        lines.append([*cells, number(found["igd_plus"])])
    return _table(heads, lines)


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            _text(pair["a"]),
            _text(pair["b"]),
            signed(pair["difference"], 4),
            interval(pair["ci"], 4),
            interval(pair["ci_reflected"], 4),
            percent(pair["p_improve"], 1),
            "yes" if pair["certain"] else "no",
        ]
        for pair in pairs
    ]
    heads = ["method", "against", "difference", "95 % interval", "reflected", "above 0 in", "certain"]
    return _table(heads, lines, left=2)


def _cost(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ["#", "method", "time", "tokens generated", "tokens trained on", "reward calls", "peak memory"]
    heads += ["answering: tokens", "answering: reward calls", "collapsed", "mean words", "distinct-3"]
    lines = []
    for row in rows:
        spent, answering, quality = row["cost"], row["cost"]["answering"], row["quality"]
        lines.append(
            [
                str(row["rank"]),
                _text(row["label"]),
                duration(spent["seconds"]),
                *[count(spent[unit]) for unit in ("tokens_generated", "tokens_trained", "reward_calls")],
                memory(spent["peak_memory_bytes"]),
                count(answering["tokens_generated"]),
                count(answering["reward_calls"]),
                percent(quality["rate"], 1),
                number(quality["mean_length"], 1),
                number(quality["distinct_3"]),
            ]
        )
    return _table(heads, lines)


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"- **{_text(row['label'])}**, seed {run['seed']}: {_text(run['error'])}"
        for row in rows
        for run in row["runs"]
        if run["error"]
    )


def _reproduce(told: Mapping[str, Any]) -> str:
    lines = [_code([told["command"]]), "Each row by itself:"]
    for row in told["rows"]:
        lines.append(f"{_text(row['label'])}:\n\n{_code([run['command'] for run in row['runs']])}")
    used = told["environment"]
    packages = used.get("packages") or {}
    named = ", ".join(f"{name} {packages[name]}" for name in ("moalign", "torch", "transformers") if packages.get(name))
    changed = " with changes" if used.get("dirty") else ""
    commit = f", commit `{used['commit'][:12]}`{changed}" if used.get("commit") else ""
    lines.append(f"Evaluated with Python {used.get('python')}, {named or 'moalign'}{commit}.")
    return "\n\n".join(lines)


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```sh", *lines, "```"])


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """Return a Markdown table; from the third column on (``left`` = 2) numbers, right-aligned."""
    rule = ["---" if index < left else "---:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def _text(text: str) -> str:
    """Return text that means nothing to Markdown and stays on one line."""
    flat = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\`*_|<>" else char for char in flat).replace("](", "]\\(")
