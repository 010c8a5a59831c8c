"""The files of a comparison: JSON, Markdown, figures and, on request, the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moalign.comparison.entries import grouped
from moalign.comparison.jobs import ComparedRun
from moalign.comparison.result import CompareResult
from moalign.config.card import TaskCard
from moalign.core.errors import RequestError
from moalign.core.preferences import label as to_label
from moalign.report import figures, markdown, page, style
from moalign.runs import atomic

PAGES = (".html", ".htm")


@dataclass(frozen=True)
class OutputPaths:
    """Paths of the files to write."""

    json: Path
    figure: Path
    markdown: Path
    html: Path | None = None

    @property
    def folder(self) -> Path:
        """The comparison's own folder: what was given no other path goes there."""
        return self.json.parent

    def require_writable(self) -> None:
        """Raise RequestError for a wrong suffix or a path that cannot be written."""
        for option, path, suffixes in (
            ("--figure", self.figure, style.FORMATS),
            ("--html", self.html, PAGES),
            ("--markdown", self.markdown, ()),
        ):
            if path is not None and suffixes and path.suffix not in suffixes:
                raise RequestError(f"{option} {path}: allowed: a name ending in {', '.join(suffixes)}")
            if path is not None and path.is_dir():
                raise RequestError(f"{option} {path}: it is a folder; give the name of a file")
            if path is not None and path.parent != self.folder:
                atomic.require_writable(path.parent, f"choose another place with {option} FILE")
        atomic.require_writable(self.folder)
        given = (("--figure", self.figure), ("--html", self.html), ("--markdown", self.markdown), ("record", self.json))
        names: dict[Path, str] = {}
        for option, path in given:
            if path is not None and names.setdefault(path.resolve(), option) != option:
                raise RequestError(
                    f"{option} {path}: {names[path.resolve()]} is to be written there, too; name another"
                )


def write(result: CompareResult, paths: OutputPaths, runs: Sequence[ComparedRun], card: TaskCard) -> None:
    """Write figures, page, Markdown and, last, the JSON; ``result`` is completed with their paths."""
    if any(entry.points for entry in result.entries):
        for name, draw in figures.ALL.items():
            path = paths.figure if name == "fronts" else paths.folder / f"{name}.png"
            drawing = draw(result.content, path.suffix)
            if drawing is not None:
                atomic.write_bytes(path, drawing)
                result.figures[name] = str(path)
        result.figure = result.figures["fronts"]
    result.markdown, result.json_file = str(paths.markdown), str(paths.json)
    if paths.html is not None:
        result.html = str(paths.html)
        atomic.write_bytes(paths.html, page.page(result.content, answers(runs, card)))
    atomic.write_text(paths.markdown, markdown.page(result.content, paths.markdown.parent))
    atomic.write_json(paths.json, result.content)


def answers(runs: Sequence[ComparedRun], card: TaskCard) -> list[page.Answers]:
    """Return the answers of each entry's first finished seed; of several samples of a prompt, the first."""
    answered = []
    for label, group in grouped(runs).items():
        run = next((run for run in group if run.evaluation is not None), None)
        if run is None or run.run is None or run.table is None or run.evaluation is None:
            continue
        table, result = run.run.read_table(run.table), run.evaluation.result
        preferences = [point.preference for point in result.points]
        parts = [table[table["preference"] == to_label(w)].iloc[:: result.samples] for w in preferences]
        answered.append(
            page.Answers(
                label=label,
                preferences=preferences,
                prompts=parts[0]["prompt"].tolist(),
                responses=[part["response"].tolist() for part in parts],
                scores=[part[card.objective_names].to_numpy().tolist() for part in parts],
            )
        )
    return answered
