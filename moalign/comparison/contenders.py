"""The rows of a comparison: runs grouped by method and setting over their seeds, each with a label that is its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moalign.comparison.jobs import Work
from moalign.comparison.standings import Contender
from moalign.report import curves


def contenders(works: Sequence[Work]) -> list[Contender]:
    """Return the rows: one per method and setting, with what its runs gave."""
    rows = []
    for label, group in grouped(works).items():
        method = group[0].method
        row = Contender(label, method.name, seeded=method.capabilities.trains, runs=[work.told for work in group])
        for work in group:
            if work.evaluation is not None and work.run is not None:
                record = work.run.record
                row.seeds.append(work.seed)
                row.evaluations.append(work.evaluation)
                row.costs.append({**record.cost.model_dump(), "seconds": record.seconds})
                row.diagnostics.append(record.notes.get("diagnostics") or {})
                row.curves.append(curves.condense(work.run.metrics()))
        rows.append(row)
    return rows


def grouped(works: Sequence[Work]) -> dict[str, list[Work]]:
    """Return the runs of each row, in the order of their seeds, by the row's label; labels are unique."""
    groups: dict[str, list[Work]] = {}
    for work in works:
        rest = {key: value for key, value in work.identity.items() if key != "seed"}
        groups.setdefault(json.dumps([work.method.name, rest], sort_keys=True), []).append(work)
    found = [sorted(group, key=lambda work: work.seed) for group in groups.values()]
    return dict(zip(_labels(found), found, strict=True))


def _labels(groups: Sequence[Sequence[Work]]) -> list[str]:
    """Name each row by its method; where a method has several, by the settings in which they differ."""
    labels = []
    for group in groups:
        one = group[0]
        rivals = [other[0] for other in groups if other[0].method.name == one.method.name]
        if len(rivals) == 1:
            labels.append(one.method.name)
            continue
        mine = dict(_flat(one.identity))
        telling = _telling([dict(_flat(rival.identity)) for rival in rivals])
        told = ", ".join(f"{key.removeprefix('config.')}={_short(mine.get(key))}" for key in telling)
        labels.append(f"{one.method.name} ({told})" if told else one.method.name)
    repeated = {label for label in labels if labels.count(label) > 1}
    return [
        f"{label} [{group[0].folder.name[:6]}]" if label in repeated else label
        for label, group in zip(labels, groups, strict=True)
    ]


def _telling(settings: Sequence[Mapping[str, Any]], most: int = 2) -> list[str]:
    """Return the keys that tell these settings apart best, the most telling first."""
    keys = [key for key in dict.fromkeys(key for one in settings for key in one) if key != "seed"]
    chosen: list[str] = []

    def apart(more: str) -> int:
        return len({tuple(str(one.get(key)) for key in (*chosen, more)) for one in settings})

    while keys and len(chosen) < most:
        best = max(keys, key=apart)
        if (chosen and apart(best) == apart(chosen[-1])) or apart(best) == 1:
            break
        chosen.append(best)
    return chosen


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 16 else text[:15] + "…"
