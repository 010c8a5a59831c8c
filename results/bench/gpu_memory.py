"""Peak memory on a GPU, of runs that are kept and of ``make gpu-test``, beside what ``moalign check`` says.

The kept runs of a published comparison say what they took while they trained, and on which GPU; a method's row is the
most of its seeds. What answering takes was not measured, and is not in the estimate here. Written beside this file,
after every ``make gpu-test``: ``gpu_memory.md``.

    python results/bench/gpu_memory.py
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu  # beside this file

from moalign.preflight import check
from moalign.runs import atomic

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "published" / "assistant" / "runs"


class Row(NamedTuple):
    """One method on one model."""

    model: str
    method: str
    gpu: str
    runs: int
    measured: float
    """GiB that torch allocated at most."""
    estimate: float
    """GiB, without what torch does not allocate."""
    phase: str
    """Of the estimate's peak."""


def main() -> None:
    """Write the table."""
    rows = [*kept_rows(records(KEPT)), *test_rows(HERE)]
    atomic.write_text(HERE / "gpu_memory.md", page(rows))


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of kept runs that used a GPU."""
    for path in sorted(folder.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            name = next(name for name in archive.getnames() if name.endswith("/run.json"))
            file = archive.extractfile(name)
            assert file is not None
            record: dict[str, Any] = json.load(io.TextIOWrapper(file, encoding="utf-8"))
        if record["environment"]["gpus"]:
            yield record


def kept_rows(found: Iterator[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each method of kept runs."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in found:
        by_method.setdefault(record["method"], []).append(record)
    rows = []
    for method, runs in by_method.items():
        names = ", ".join(sorted({name for run in runs for name in run["environment"]["gpus"]}))
        measured = max(run["cost"]["peak_memory_bytes"] for run in runs) / gpu.GIB
        report = check.check(f"{runs[0]['task']}/{method}", ["needs.gpu=any", "needs.gpu_memory_gib=80"])
        phases = [phase for phase in report.memory["phases"] if phase["phase"] != "answering"]
        rows.append(Row(gpu.SMALL, method, names, len(runs), measured, *gpu.estimated({"phases": phases})))
    return sorted(rows, key=lambda row: -row.measured)


def test_rows(folder: Path) -> list[Row]:
    """Return the rows of ``make gpu-test``'s records."""
    rows = []
    for path in sorted(folder.glob("gpu-*.json")):
        record = atomic.read_json(path, "make gpu-test writes it")
        for part in ("small", "large", "card24"):
            for each in record[part] if isinstance(record.get(part), list) else []:
                if each.get("peak_gib") is None:
                    continue
                settings = [text.removeprefix("config.") for text in each.get("settings", ())]
                asked = f" for {each['card_gib']:.0f} GB" if "card_gib" in each else ""
                name = f"{each['method']}{asked}{' (' + ', '.join(settings) + ')' if settings else ''}"
                where = record["device"]["gpu"]
                rows.append(Row(each["model"], name, where, 1, each["peak_gib"], each["estimate_gib"], ""))
    return rows


def page(rows: Sequence[Row]) -> str:
    """Return the measurements as Markdown."""
    lines = [
        "# Peak memory on a GPU: measured, and what `moalign check` says",
        "",
        "GiB that torch allocated at most, the most of a method's runs; the estimate without its part for the CUDA "
        "context and fragmentation (2 GiB), which torch does not allocate. An estimate is of rows as long as the task "
        "allows (128 tokens of prompt, 64 of answer here), and most rows are shorter. SmolLM2: the runs of "
        "[assistant](../published/assistant/compare.md), in float32, as their recipes are, while they trained: what "
        "answering takes was not measured, and is left out of the estimate. Random weights: `make gpu-test`, in "
        "bfloat16. Made by `python results/bench/gpu_memory.py`.",
        "",
        "| model | method | GPU | runs | measured | estimate | peak of the estimate |",
        "| :--- | :--- | :--- | ---: | ---: | ---: | :--- |",
    ]
    for row in rows:
        numbers = f"{row.measured:.2f} | {row.estimate:.2f}"
        lines.append(f"| {row.model} | {row.method} | {row.gpu} | {row.runs} | {numbers} | {row.phase} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
