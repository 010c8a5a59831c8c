"""What is written is read again, whatever it holds; fingerprints of sources."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moalign.config.card import SourceSpec
from moalign.core.errors import RequestError
from moalign.data.readers import Field, fingerprint, read

WriteJsonl = Callable[..., Path]
FIELDS = [Field("prompt", blank=False), Field("response"), Field("done", truth=True, required=False)]
RECORDS = [{"prompt": f"p{index}", "response": f"r{index}"} for index in range(3)]


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read(SourceSpec(path=str(path)), FIELDS)]


# Fingerprints


def test_a_fingerprint_follows_the_bytes_and_not_the_name(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    write_jsonl(RECORDS, "a.jsonl")
    write_jsonl(RECORDS, "b.jsonl")
    write_jsonl(RECORDS[:-1], "c.jsonl")
    one, two, three = (fingerprint(SourceSpec(path=f"{name}.jsonl"), tmp_path) for name in "abc")
    assert one == two != three
    assert len(one) == 16


def test_a_fingerprint_of_a_folder_and_of_a_hub_id(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("a")
    (tmp_path / "three" / "train.jsonl").rename(tmp_path / "three" / "test.jsonl")
    one, two, three = (fingerprint(SourceSpec(path=name), tmp_path) for name in ("one", "two", "three"))
    assert one == two != three
    hub = {
        fingerprint(SourceSpec(path=path, revision=revision), tmp_path)
        for path in ("o/a", "o/b")
        for revision in ("1", "2")
    }
    assert len(hub) == 4


# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
RECORD = st.fixed_dictionaries(
    {
        "prompt": TEXT.filter(lambda text: bool(text.strip())),
        "response": TEXT,
        "done": st.none() | st.booleans(),
    }
)


def write_any(path: Path, records: list[dict[str, Any]], pretty: bool) -> None:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=pretty) + "\n" for record in records)
        path.write_text(text, encoding="utf-8", newline="")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as handle:
            names = ["prompt", "response", "done"]
            plain = csv.DictWriter(handle, names)
            writer = csv.DictWriter(handle, names, quoting=csv.QUOTE_ALL) if pretty else plain
            writer.writeheader()
            writer.writerows(records)
    else:
        schema = pa.schema({"prompt": pa.string(), "response": pa.string(), "done": pa.bool_()})
        pq.write_table(pa.Table.from_pylist(records, schema), path, row_group_size=2)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORD, min_size=1, max_size=6), pretty=st.booleans())
def test_what_is_written_is_read_again(
    tmp_path: Path, suffix: str, records: list[dict[str, Any]], pretty: bool
) -> None:
    path = tmp_path / f"round{suffix}"
    write_any(path, records, pretty)
    assert values(path) == records


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), suffix=st.sampled_from([".jsonl", ".csv", ".jsonl.gz", ".parquet"]))
def test_any_bytes_are_records_or_a_request_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="noise"):
        values(path)
