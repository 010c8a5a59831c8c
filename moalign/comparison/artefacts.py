"""The files of a comparison: JSON, Markdown, figures and, on request, the page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.comparison.entries import grouped
from moalign.comparison.jobs import Work
from moalign.config.card import TaskCard
from moalign.core.errors import RequestError
from moalign.core.preferences import label
from moalign.report import drawings, markdown, page, style
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
        if self.figure.suffix not in style.FORMATS:
            raise RequestError(f"--figure {self.figure}: allowed: a name ending in {', '.join(style.FORMATS)}")
        if self.html is not None and self.html.suffix not in PAGES:
            raise RequestError(f"--html {self.html}: allowed: a name ending in {', '.join(PAGES)}")
        for option, path in (("--figure", self.figure), ("--markdown", self.markdown), ("--html", self.html)):
            if path is not None and path.is_dir():
                raise RequestError(f"{option} {path}: it is a folder; give the name of a file")
        for path in (self.json, self.figure, self.markdown, self.html):
            if path is not None:
                _check_writable(path.parent)


def _check_writable(folder: Path) -> None:
    """Raise RequestError for a folder that cannot be created or written, before hours are spent on its files."""
    existing = next(ancestor for ancestor in (folder, *folder.absolute().parents) if ancestor.exists())
    if not existing.is_dir():
        raise RequestError(f"{folder}: cannot write here: {existing} is not a folder; choose another place")
    with atomic.refusals(existing), tempfile.TemporaryFile(dir=existing) as file:
        file.write(b"\0" * 65536)


def write(record: dict[str, Any], paths: OutputPaths, works: Sequence[Work], card: TaskCard) -> None:
    """Write figures, page, Markdown and, last, the JSON; ``record`` is completed with their paths."""
    if any(row["points"] for row in record["rows"]):
        for name, draw in drawings.ALL.items():
            path = paths.figure if name == "fronts" else paths.folder / f"{name}.png"
            content = draw(record, path.suffix)
            if content is not None:
                atomic.write_bytes(path, content)
                record["figures"][name] = str(path)
        record["figure"] = record["figures"]["fronts"]
    record["markdown"], record["json"] = str(paths.markdown), str(paths.json)
    record["html"] = None if paths.html is None else str(paths.html)
    if paths.html is not None:
        atomic.write_bytes(paths.html, page.page(record, answers(works, card)))
    atomic.write_text(paths.markdown, markdown.page(record, paths.markdown.parent))
    atomic.write_json(paths.json, record)


def answers(works: Sequence[Work], card: TaskCard) -> list[page.Answers]:
    """Return the answers of each row's first finished seed; of several samples of a prompt, the first."""
    names = card.objective_names
    answered = []
    for row, group in grouped(works).items():
        work = next((work for work in group if work.evaluation is not None), None)
        if work is None or work.run is None or work.table is None or work.evaluation is None:
            continue
        table = work.run.read_table(work.table)
        samples = work.evaluation.told["samples"]
        preferences = [tuple(point["prefs"]) for point in work.evaluation.told["points"]]
        parts = [table[table["preference"] == label(preference)].iloc[::samples] for preference in preferences]
        answered.append(
            page.Answers(
                label=row,
                preferences=preferences,
                prompts=parts[0]["prompt"].tolist(),
                responses=[part["response"].tolist() for part in parts],
                scores=[part[names].to_numpy().tolist() for part in parts],
            )
        )
    return answered
