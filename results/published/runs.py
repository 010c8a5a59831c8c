"""Keep what a published comparison was made from, so that a run of your own can be compared with it.

    python results/published/runs.py keep NAME COMPARE.json     # after moalign compare: the record, and its runs
    python results/published/runs.py restore NAME... [--results DIR]   # for moalign compare RUN...

Of each run is kept what a comparison reads: its record, what it logged, its evaluation and every answer with its
scores, as ``NAME/runs/METHOD-RUN_ID.tar.xz`` (about 60 kB). Weights are not: a restored run can be compared, and its
answers read (``--html``), but it answers nothing new: what wants its weights names the command that trains it again,
once the restored folder is deleted. A run that is in the results folder already is left as it is. Paths below
the folder that the results folder lay in lead to this checkout again; runs that the record no longer names go. With the
runs goes the scale that their scores were put on (``NAME/runs/scale``): one that another machine fits differs by
rounding.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd

from moalign.core.errors import MoalignError, RequestError
from moalign.runs import atomic

HERE = Path(__file__).resolve().parent
CHECKOUT = "{checkout}"
"""Stands in a packed run for the folder that the results folder lay in, where a card's data is."""
SCALE = ("normaliser.json", "truth.json", "short.json")
KEPT = ("run.json", "metrics.jsonl", "eval*.json", "responses*.parquet")


def main(arguments: list[str] | None = None) -> int:
    """Keep or restore; returns the exit code."""
    parser = argparse.ArgumentParser(description="Keep or restore the runs of published comparisons.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    keeping = verbs.add_parser("keep", help="the record of a comparison and the light part of its runs")
    keeping.add_argument("name", help="folder beside this file")
    keeping.add_argument("record", type=Path, help="the compare.json that moalign compare has written")
    restoring = verbs.add_parser("restore", help="put the runs of a comparison into a results folder")
    restoring.add_argument("names", nargs="+", metavar="name")
    restoring.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        if options.verb == "keep":
            print(f"{len(keep(options.record, HERE / options.name))} runs kept")
        else:
            for name in options.names:
                print(f"{name}: {len(restore(HERE / name, options.results))} runs restored")
    except MoalignError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def keep(record: Path, folder: Path) -> list[Path]:
    """Copy a comparison's record into ``folder`` and pack its runs there; returns the packed files.

    Raises RequestError when the record is none, or a run of it is not there; then nothing is written.
    """
    content = atomic.read_json(record, "write it with moalign compare")
    if not isinstance(content, dict) or not content.keys() >= {"rows", "task", "card_hash"}:
        raise RequestError(f"{record}: no record of a comparison; write it with moalign compare")
    runs = [Path(run["run"]) for row in content["rows"] for run in row["runs"] if run["status"] == "done"]
    if not runs:
        raise RequestError(f"{record}: none of its runs is finished")
    missing = [str(run) for run in runs if not (run / "run.json").is_file()]
    if missing:
        raise RequestError(f"{record}: it names runs that are not there: {', '.join(missing)}")
    root = runs[0].resolve().parents[4]  # <root>/<results>/runs/<task>/<method>/<run id>
    packed = {f"{run.parent.name}-{run.name}.tar.xz": pack(run, root) for run in runs}
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for name, data in packed.items():
        if not (folder / "runs" / name).is_file() or (folder / "runs" / name).read_bytes() != data:
            atomic.write_bytes(folder / "runs" / name, data)
    for old in (folder / "runs").glob("*.tar.xz"):
        if old.name not in packed:
            old.unlink()
    scales = runs[0].resolve().parents[3] / "tasks" / f"{content['task']}-{content['card_hash']}"
    for name in SCALE:
        if (scales / name).is_file():
            (folder / "runs" / "scale").mkdir(exist_ok=True)
            atomic.write_bytes(folder / "runs" / "scale" / name, (scales / name).read_bytes())
    text = json.dumps(content, indent=2, ensure_ascii=False).replace(f"{root}/", "")
    atomic.write_text(folder / "compare.json", text + "\n")
    return [folder / "runs" / name for name in packed]


def pack(run: Path, root: Path) -> bytes:
    """Return a run's light files as one archive: the same bytes for the same content."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=9) as archive:
        for path in sorted(path for pattern in KEPT for path in run.glob(pattern)):
            if path.suffix == ".parquet":
                table = io.BytesIO()
                pd.read_parquet(path).to_parquet(table, index=False, compression="zstd", compression_level=19)
                content = table.getvalue()
            else:
                content = path.read_text(encoding="utf-8").replace(f"{root}/", f"{CHECKOUT}/").encode("utf-8")
            member = tarfile.TarInfo(path.resolve().relative_to(run.resolve().parents[2]).as_posix())
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def restore(folder: Path, results: Path) -> list[Path]:
    """Unpack the runs of a published comparison that ``results`` lacks; returns their folders.

    Raises RequestError when nothing was kept of the comparison.
    """
    kept = sorted((folder / "runs").glob("*.tar.xz"))
    if not kept:
        known = sorted(path.parents[1].name for path in HERE.glob("*/runs/*.tar.xz"))
        raise RequestError(f"{folder.name}: no runs were kept of it; there are {', '.join(dict.fromkeys(known))}")
    restored = []
    for path in kept:
        with tarfile.open(path) as archive:
            members: list[Any] = archive.getmembers()
            run = results / "runs" / Path(members[0].name).parent
            if not run.exists():
                with atomic.directory(run) as place:
                    for member in members:
                        source = archive.extractfile(member)
                        assert source is not None, f"{path}: {member.name} is no file"
                        content = source.read()
                        if not member.name.endswith(".parquet"):
                            content = content.replace(CHECKOUT.encode(), str(HERE.parents[1]).encode())
                        (place / Path(member.name).name).write_bytes(content)
                restored.append(run)
    kept_scale = sorted((folder / "runs" / "scale").glob("*.json"))
    if kept_scale:
        record = atomic.read_json(folder / "compare.json", "keep the comparison again")
        scale = results / "tasks" / f"{record['task']}-{record['card_hash']}"
        scale.mkdir(parents=True, exist_ok=True)
        for path in kept_scale:
            if not (scale / path.name).exists():
                atomic.write_bytes(scale / path.name, path.read_bytes())
            elif (scale / path.name).read_bytes() != path.read_bytes():
                print(
                    f"note: {scale / path.name} is not that of the runs restored, which cannot be compared on it; give "
                    "another folder with --results",
                    file=sys.stderr,
                )
    return restored


if __name__ == "__main__":
    sys.exit(main())
