"""What a comparison leaves behind: JSON, Markdown, figures and, when asked for, the page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.comparison.contenders import grouped
from moalign.comparison.jobs import Work
from moalign.config.card import TaskCard
from moalign.core.errors import RequestError
from moalign.core.preferences import label
from moalign.report import drawings, markdown, page, style
from moalign.runs import atomic

PAGES = (".html", ".htm")


@dataclass(frozen=True)
class Places:
    """Where the files go."""

    json: Path
    figure: Path
    markdown: Path
    html: Path | None = None

    @property
    def folder(self) -> Path:
        """The comparison's own folder, which holds everything that was given no other place."""
        return self.json.parent

    def check(self) -> None:
        """Raise RequestError for a name of the wrong kind or a place that cannot be written."""
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
    """Refuse a folder that cannot be written, or made, before hours are spent on what would go there."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise RequestError(f"{folder}: cannot write here: {there} is not a folder; choose another place")
    with atomic.refusals(there), tempfile.TemporaryFile(dir=there) as file:
        file.write(b"\0" * 65536)


def write(told: dict[str, Any], places: Places, works: Sequence[Work], card: TaskCard) -> None:
    """Write figures, page, Markdown and, last, the JSON that names them (``told`` is completed with their places)."""
    if any(row["points"] for row in told["rows"]):
        for name, draw in drawings.ALL.items():
            place = places.figure if name == "fronts" else places.folder / f"{name}.png"
            content = draw(told, place.suffix)
            if content is not None:
                atomic.write_bytes(place, content)
                told["figures"][name] = str(place)
        told["figure"] = told["figures"]["fronts"]
    told["markdown"], told["json"] = str(places.markdown), str(places.json)
    told["html"] = None if places.html is None else str(places.html)
    if places.html is not None:
        atomic.write_bytes(places.html, page.page(told, answers(works, card)))
    atomic.write_text(places.markdown, markdown.page(told, places.markdown.parent))
    atomic.write_json(places.json, told)


def answers(works: Sequence[Work], card: TaskCard) -> list[page.Answers]:
    """Return what each row's first finished seed answered; of several samples of a prompt the first."""
    names = card.objective_names
    found = []
    for row, group in grouped(works).items():
        one = next((work for work in group if work.evaluation is not None), None)
        if one is None or one.run is None or one.table is None or one.evaluation is None:
            continue
        table = one.run.read_table(one.table)
        samples = one.evaluation.told["samples"]
        wanted = [tuple(point["prefs"]) for point in one.evaluation.told["points"]]
        parts = [table[table["preference"] == label(preference)].iloc[::samples] for preference in wanted]
        found.append(
            page.Answers(
                label=row,
                preferences=wanted,
                prompts=parts[0]["prompt"].tolist(),
                responses=[part["response"].tolist() for part in parts],
                scores=[part[names].to_numpy().tolist() for part in parts],
            )
        )
    return found
