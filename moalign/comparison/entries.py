"""The entries of a comparison: runs grouped by method and settings over their seeds, each with a unique label."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moalign.comparison.jobs import Work
from moalign.comparison.ranking import Entry
from moalign.report import curves


def entries_of(works: Sequence[Work]) -> list[Entry]:
    """Return one entry per method and settings, with the results of its runs."""
    entries = []
    for label, group in grouped(works).items():
        method = group[0].method
        entry = Entry(label, method.name, seeded=method.capabilities.trains, runs=[work.summary for work in group])
        for work in group:
            if work.evaluation is not None and work.run is not None:
                record = work.run.record
                entry.seeds.append(work.seed)
                entry.evaluations.append(work.evaluation)
                entry.costs.append({**record.cost.model_dump(), "seconds": record.seconds})
                entry.diagnostics.append(record.notes.get("diagnostics") or {})
                entry.curves.append(curves.condense(work.run.metrics()))
        entries.append(entry)
    return entries


def grouped(works: Sequence[Work]) -> dict[str, list[Work]]:
    """Return the runs of each entry in the order of their seeds, by the entry's unique label."""
    groups: dict[str, list[Work]] = {}
    for work in works:
        rest = {key: value for key, value in work.identity.items() if key != "seed"}
        groups.setdefault(json.dumps([work.method.name, rest], sort_keys=True), []).append(work)
    ordered = [sorted(group, key=lambda work: work.seed) for group in groups.values()]
    return dict(zip(_labels([group[0] for group in ordered]), ordered, strict=True))


_SHORT, _LONG = 16, 48
"""Characters of a value in a label: the short form, and the long one for values that are alike in the short one."""


def _labels(works: Sequence[Work]) -> list[str]:
    """Return a label for each entry (given by its first run): the method and, where the method has several entries,
    all settings in which these differ.

    Where these are too long to be written out, the label ends with the run's identifier: no two labels are alike.
    """
    by_method: dict[str, list[Work]] = {}
    for work in works:
        by_method.setdefault(work.method.name, []).append(work)
    differences = {id(work): text for group in by_method.values() for work, text in _distinguishing(group)}
    labels = [f"{work.method.name}{differences[id(work)]}" for work in works]
    repeated = {label for label in labels if labels.count(label) > 1}
    return [
        f"{label} [{work.folder.name[:6]}]" if label in repeated else label
        for label, work in zip(labels, works, strict=True)
    ]


def _distinguishing(works: Sequence[Work]) -> Iterator[tuple[Work, str]]:
    """Yield each run of one method with the settings that tell these runs apart, the most telling first."""
    settings = [_settings(work) for work in works]
    columns = {key: [row.get(key) for row in settings] for key in dict.fromkeys(key for row in settings for key in row)}
    counts = {key: len(set(map(json.dumps, values))) for key, values in columns.items() if key != "seed"}
    keys = sorted((key for key, count in counts.items() if count > 1), key=lambda key: -counts[key])
    texts = {key: _texts(columns[key], counts[key]) for key in keys}
    for index, work in enumerate(works):
        text = ", ".join(f"{key.removeprefix('config.')}={texts[key][index]}" for key in keys)
        yield work, f" ({text})" if text else ""


def _settings(work: Work) -> dict[str, Any]:
    """Return a run's settings by dotted name, with the method's defaults where its identity leaves them out."""
    settings = dict(_flat(work.identity))
    defaults = work.method.Config.model_construct().model_dump(mode="json")
    for key, value in _flat({"config": defaults}):
        if not any(key.startswith(f"{name}.") for name in settings):  # a whole part that is switched off
            settings.setdefault(key, value)
    return settings


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value


def _texts(values: Sequence[Any], different: int) -> list[str]:
    """Return a setting's values as a label shows them: short where all ``different`` ones stay apart, else longer."""
    short = [_cut(f"{value:g}" if isinstance(value, float) else str(value), _SHORT) for value in values]
    long = [_cut(str(value), _LONG) for value in values]
    return long if len(set(short)) < different and len(set(long)) == different else short


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
