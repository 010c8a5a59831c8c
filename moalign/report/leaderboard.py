"""``make results``: the leaderboard and its figures, made from the committed records alone.

A record is the ``compare.json`` of one comparison, kept as ``results/published/<name>/compare.json``. From each, the
figures beside it (light and dark) and its ``compare.md`` are made again, and from all of them one ``LEADERBOARD.md``.
The same records give the same bytes: nothing is trained or measured, and no date is written.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moalign.core.errors import MoalignError, RequestError
from moalign.report import drawings, markdown
from moalign.report.markdown import escaped, software, table
from moalign.report.units import NONE, any_nats, count, duration, interval, memory, nats, number, percent
from moalign.runs import atomic

_INTRO = (
    "Made by `make results` from the records in [published]({published}); every number is in them, and nothing here is "
    "written by hand. Each row carries the command that made it: the same command on the same machine gives the same "
    "scores. Intervals: 95 %, over prompts and, where there are several, training seeds."
)


def make(records: Path, page: Path) -> list[Path]:
    """Make figures, ``compare.md`` and the leaderboard ``page`` from the records below ``records``.

    Returns the files written. Raises RequestError when there is no record, or naming one that is damaged.
    """
    records_by_path = {path: _read(path) for path in sorted(records.glob("*/compare.json"))}
    if not records_by_path:
        raise RequestError(f"{records}: no record; each is a file NAME/compare.json, as moalign compare writes it")
    written: list[Path] = []
    for path, record in records_by_path.items():
        figures = _draw(record, path.parent)
        paths = {name: str(files[0]) for name, files in figures.items()}
        text = markdown.page({**record, "figure": paths.get("fronts"), "figures": paths, "html": None}, path.parent)
        atomic.write_text(path.with_suffix(".md"), text)
        written += [*(file for files in figures.values() for file in files), path.with_suffix(".md")]
    atomic.write_text(page, leaderboard(records_by_path, page.parent))
    return [*written, page]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path}: not a record ({error}); write it again with moalign compare") from None
    lacking = [key for key in ("task", "objectives", "grid", "rows", "pairs", "command") if key not in record]
    if lacking:
        raise RequestError(f"{path}: not a record of a comparison: it lacks {', '.join(lacking)}")
    return dict(record)


def _draw(record: Mapping[str, Any], folder: Path) -> dict[str, list[Path]]:
    """Draw every figure that applies, light and dark, beside the record; return its files by name."""
    figures: dict[str, list[Path]] = {}
    if not any(row["points"] for row in record["rows"]):
        return figures
    for name, draw in drawings.ALL.items():
        for suffix, theme in (("", "light"), ("-dark", "dark")):
            content = draw(record, ".png", theme)
            if content is not None:
                path = folder / f"{name}{suffix}.png"
                atomic.write_bytes(path, content)
                figures.setdefault(name, []).append(path)
    return figures


def leaderboard(records: Mapping[Path, Mapping[str, Any]], folder: Path) -> str:
    """Return the leaderboard; its links are relative to ``folder``, where it will be written."""
    published = quote(Path(os.path.relpath(next(iter(records)).parent.parent, folder)).as_posix())
    parts = ["# Leaderboard", _INTRO.format(published=published), _contents(records)]
    for path, record in records.items():
        parts += _section(path, record, folder)
    return "\n\n".join(parts) + "\n"


def _contents(records: Mapping[Path, Mapping[str, Any]]) -> str:
    lines = []
    for path, record in records.items():
        first = record["rows"][0]
        leads = f"{escaped(record['winner'])} wins" if record["winner"] else "no winner with certainty"
        share = "" if first.get("optimal_share") is None else f", {percent(first['optimal_share'])} of the optimum"
        lines.append(
            f"- [{escaped(path.parent.name)}](#{path.parent.name}): {len(record['rows'])} methods, "
            f"{len(record['objectives'])} objectives, {_seeds(record)}; {leads} "
            f"(first: {escaped(first['label'])}, hypervolume {number(first['hypervolume'])}{share})"
        )
    return "\n".join(lines)


def _seeds(record: Mapping[str, Any]) -> str:
    counts = {len(row["seeds"]) for row in record["rows"]}
    most = max(counts)
    return f"{'' if len(counts) == 1 else 'up to '}{most} seed{'' if most == 1 else 's'}"


def _section(path: Path, record: Mapping[str, Any], folder: Path) -> list[str]:
    relative = Path(os.path.relpath(path.parent, folder)).as_posix()
    parts = [f"## {escaped(path.parent.name)}", escaped(record["description"]), *map(escaped, record["verdict"])]
    samples = record.get("samples") or 1  # older records lack it
    if samples > 1:
        parts.append(
            f"{record['prompts']} evaluation prompts, each answered {samples} times at every preference: "
            f"`moalign eval RUN --samples {samples}`."
        )
    if any(row["points"] for row in record["rows"]):
        parts.append(_picture(relative, "fronts", "Mean rewards of every method by preference"))
    parts += [_ranking(record), _cost(record), _origin(record, relative)]
    return parts


def _picture(folder: str, name: str, text: str) -> str:
    """Return a figure that follows the reader's colour scheme."""
    light, dark = quote(f"{folder}/{name}.png"), quote(f"{folder}/{name}-dark.png")
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{text}"></picture>'
    )


def _ranking(record: Mapping[str, Any]) -> str:
    known = record.get("optimum") is not None
    heads = ["#", "method", "hypervolume", "95 % interval", *(["% of optimum"] if known else []), "each seed"]
    moved = any_nats(record["rows"])
    heads += ["tau", "inner product", "collapsed", *(["KL to base"] if moved else []), "command"]
    lines = []
    for row in record["rows"]:
        if row["status"] == "failed":
            lines.append([NONE, f"{escaped(row['label'])} (failed)", *[NONE] * (len(heads) - 3), _command(row)])
            continue
        cells = [str(row["rank"]), escaped(row["label"]), number(row["hypervolume"], 4), interval(row["ci"], 4)]
        cells += [percent(row["optimal_share"], 1)] if known else []
        cells += [", ".join(number(value) for value in row["hypervolume_by_seed"])]
        cells += [number(row["indicators"]["tau"], 2), number(row["indicators"]["inner_product"])]
        cells += [percent(row["quality"]["rate"], 1), *([nats(row["quality"])] if moved else [])]
        lines.append([*cells, _command(row)])
    return table(heads, lines, last_left=True)


def _command(row: Mapping[str, Any]) -> str:
    """Return the command of the row's first seed, and which other seeds there are."""
    first, *others = row["runs"]
    more = f" (and seeds {', '.join(str(run['seed']) for run in others)})" if others else ""
    return f"`{first['command'].replace('|', chr(92) + '|')}`{more}"


def _cost(record: Mapping[str, Any]) -> str:
    heads = ["method", "time", "tokens generated", "tokens trained on", "reward calls", "peak memory"]
    heads += ["answering: tokens", "answering: reward calls"]
    lines = [
        [
            escaped(row["label"]),
            duration(row["cost"]["seconds"]),
            *(count(row["cost"][unit]) for unit in ("tokens_generated", "tokens_trained", "reward_calls")),
            memory(row["cost"]["peak_memory_bytes"]),
            count(row["cost"]["answering"]["tokens_generated"]),
            count(row["cost"]["answering"]["reward_calls"]),
        ]
        for row in record["rows"]
        if row["status"] != "failed"
    ]
    return "Cost of training, mean per seed (memory: the largest):\n\n" + table(heads, lines, left=1)


def _origin(record: Mapping[str, Any], relative: str) -> str:
    environment = record.get("environment") or {}
    where = ", ".join(filter(None, (environment.get("cpu"), *(environment.get("gpus") or []))))
    more = f"Paired differences, diagnostics and figures: [compare.md]({quote(relative)}/compare.md)."
    return f"All of it: `{record['command']}`, with {software(environment)}{', on ' + where if where else ''}. {more}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as ``python -m moalign.report.leaderboard RECORDS PAGE``; prints the files written."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if len(given) != 2:
            raise RequestError(f"found {shlex.join(given) or 'nothing'}; needed: the folder of records, and the page")
        for path in make(Path(given[0]), Path(given[1])):
            print(path)
    except MoalignError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
