"""The run record: what is written is read back; damage is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.core.errors import RequestError
from moalign.runs import record as records
from moalign.runs.record import RunRecord


def make(**changes: Any) -> RunRecord:
    given: dict[str, Any] = {
        "run_id": "0123456789ab",
        "method": "moc",
        "task": "sandbox",
        "card_hash": "c0ffee",
        "seed": 1,
        "created": records.now(),
    }
    return RunRecord(**{**given, **changes})


def test_round_trip(tmp_path: Path) -> None:
    record = make(
        preferences=[(0.3, 0.7), (1.0, 0.0)],
        recipe={"config": {"lr": 1e-4}},
        notes={"dropped": 3},
        phases={"sft": {"steps": 5}},
        seconds=1.5,
    )
    record.write(tmp_path)
    assert records.read(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_numpy_and_nan_in_notes_are_written_as_strict_json(tmp_path: Path) -> None:
    make(notes={"share": np.float64(0.25), "loss": math.nan}).write(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert told["notes"] == {"share": 0.25, "loss": None}


def test_assignment_is_checked() -> None:
    record = make()
    with pytest.raises(ValueError, match="finished"):
        record.status = "finished"  # type: ignore[assignment]
    assert record.status == "running"


def test_costs_are_not_shared_between_records() -> None:
    first, second = make(), make()
    first.cost.reward_calls = 9
    assert second.cost.reward_calls == 0


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"not a run: it holds no run.json"):
        records.read(tmp_path)


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{\n"run_id": "a",\n"method" "moc"}')
    with pytest.raises(RequestError, match=r"run\.json:3: not JSON"):
        records.read(tmp_path)


def test_binary_content(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match=r"run\.json: cannot be read: .*; move the run's folder away"):
        records.read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '{"format": 2}'])
def test_json_that_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RequestError, match="not a run record of this moalign"):
        records.read(tmp_path)


def test_every_wrong_key_is_named(tmp_path: Path) -> None:
    told = make().model_dump(mode="json")
    told.update(seed="one", surprise=1)
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(RequestError) as caught:
        records.read(tmp_path)
    assert "seed: " in str(caught.value)
    assert "surprise: " in str(caught.value)
    assert "if a newer moalign wrote it, update moalign; else move the run's folder away" in str(caught.value)
