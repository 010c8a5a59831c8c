"""The entries of a comparison: runs grouped by method and settings over their seeds, each with a unique label."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from moalign.comparison.jobs import ComparedRun
from moalign.comparison.ranking import EntryRuns, SeedResult, average
from moalign.config.recipe import PolicySpec, RolloutSpec
from moalign.report import figures, verdict
from moalign.runs import store


def entries_of(runs: Sequence[ComparedRun]) -> list[EntryRuns]:
    """Return one entry per method and settings, with the results of its runs."""
    entries = []
    engines = {run.evaluation.result.engine for run in runs if run.evaluation is not None}
    for label, group in grouped(runs).items():
        finished = []
        for run in group:
            if run.evaluation is not None and run.run is not None:
                record = run.run.record
                cost = {**record.cost.model_dump(), "seconds": record.seconds}
                diagnostics = record.notes.get("diagnostics") or {}
                learned = figures.condense(run.run.metrics())
                warnings = [*(record.notes.get("warnings") or []), *_warnings(run, group)]
                if len(engines) > 1 and run.evaluation.result.engine is not None:
                    warnings.append("answered by vLLM, other rows not: their answers share no random numbers")
                finished.append(SeedResult(run.seed, run.evaluation, cost, diagnostics, learned, warnings))
        method, summaries = group[0].method, [run.summary for run in group]
        able = method.capabilities
        entries.append(EntryRuns(label, method.name, summaries, finished, able.trains, able.family))
    return entries


def _warnings(run: ComparedRun, group: Sequence[ComparedRun]) -> list[str]:
    """Return what a seed's answers and judges warn of, but for what the mean over the seeds of its group does."""
    assert run.evaluation is not None
    result = run.evaluation.result.content
    qualities = [other.evaluation.result.content["quality"] for other in group if other.evaluation is not None]
    texts = [
        *verdict.cautions(result["quality"], known=average(qualities)),
        *verdict.cautions_at(result["quality"], result["points"]),
        *verdict.unread(result.get("judges") or {}),
    ]
    return [f"seed {run.seed}, {text}" if len(group) > 1 else text for text in texts]


def grouped(runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """Return the runs of each entry in the order of their seeds, by the entry's unique label."""
    requests: dict[str, list[ComparedRun]] = {}
    for run in runs:
        rest = {key: value for key, value in run.identity.items() if key != "seed"}
        requests.setdefault(json.dumps([run.method.name, rest], sort_keys=True), []).append(run)
    groups = [group for alike in requests.values() for group in _of_same_defaults(alike)]
    ordered = [sorted(group, key=lambda run: run.seed) for group in groups]
    return dict(zip(_labels(ordered), ordered, strict=True))


def _of_same_defaults(runs: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
    """Divide the runs of one request, which leaves out what is at its default, by the defaults they were trained under.

    A setting that only one of two records has was added between them, and keeps nothing apart. Together are the runs
    that agree with the same ones: a run that would fit two groups which differ belongs to neither.
    """
    recorded = [_recorded(run) for run in runs]
    groups: dict[tuple[int, ...], list[ComparedRun]] = {}
    for run, own in zip(runs, recorded, strict=True):
        agreeing = tuple(k for k, other in enumerate(recorded) if not any(store.changes(own, other)))
        groups.setdefault(agreeing, []).append(run)
    return list(groups.values())


def _recorded(run: ComparedRun) -> dict[str, Any]:
    """Return the settings that a run was trained with, as its record holds them; none for a run that failed."""
    return {} if run.run is None else store.settings_of(run.run.record.recipe)


def _labels(groups: Sequence[Sequence[ComparedRun]]) -> list[str]:
    """Return a label for each entry (given by its runs): the method and, where the method has several entries, all
    settings in which these differ.

    Where these are too long to be written out, the label ends with the first run's identifier: no two labels are alike.
    """
    runs, settings = [group[0] for group in groups], [_settings(group) for group in groups]
    stated = {key for run in runs for key in _layered(_defaults(run), run.identity)}
    labels = []
    for run, own in zip(runs, settings, strict=True):
        alike = [other for of, other in zip(runs, settings, strict=True) if of.method.name == run.method.name]
        labels.append(f"{run.method.name}{_differences(own, alike, stated)}")
    repeated = {label for label in labels if labels.count(label) > 1}
    return [
        f"{label} [{run.folder.name[:6]}]" if label in repeated else label
        for label, run in zip(labels, runs, strict=True)
    ]


def _settings(group: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return an entry's settings by dotted name, with those that the identity of its runs leaves out: as their records
    hold them, else the defaults.
    """
    return _layered(_defaults(group[0]), *map(_recorded, group), group[0].identity)


def _defaults(run: ComparedRun) -> dict[str, Any]:
    sections = {"config": run.method.Config.model_construct(), "policy": PolicySpec(), "rollout": RolloutSpec()}
    return {name: section.model_dump(mode="json") for name, section in sections.items()}


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by dotted name, each as the last layer has it that holds it."""
    settings: dict[str, Any] = {}
    for layer in layers:
        own = dict(_flat(layer))
        # Not the settings of a whole part that is switched off.
        off = [key for key in settings if any(key.startswith(f"{name}.") for name in own)]
        settings = {key: value for key, value in settings.items() if key not in off} | own
    return settings


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value


def _differences(own: Mapping[str, Any], alike: Sequence[Mapping[str, Any]], stated: Container[str]) -> str:
    """Return, in brackets, the settings in which the entries of one method differ, the most telling first.

    One that is not ``stated``, by a request or as a default, belongs to a part that is off by default: it tells entries
    apart only where both have that part.
    """
    keys = dict.fromkeys(key for settings in alike for key in settings if key != "seed")
    values = {key: [settings.get(key) for settings in alike if key in settings or key in stated] for key in keys}
    counts = {key: len(set(map(json.dumps, values[key]))) for key in keys}
    telling = sorted((key for key in keys if counts[key] > 1), key=lambda key: -counts[key])
    texts = [f"{key.removeprefix('config.')}={_text(own.get(key), values[key], counts[key])}" for key in telling]
    return f" ({', '.join(texts)})" if texts else ""


def _text(value: Any, values: Sequence[Any], different: int) -> str:
    """Return a setting's value as a label shows it: short where all ``different`` values stay apart, else longer."""
    if len(set(map(_short, values))) < different and len(set(map(_long, values))) == different:
        return _long(value)
    return _short(value)


def _short(value: Any) -> str:
    return _cut(f"{value:g}" if isinstance(value, float) else str(value), 16)


def _long(value: Any) -> str:
    return _cut(str(value), 48)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
