"""What records hold as JSON: plain values, strict numbers, any text."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from moalign.runs import atomic


def test_plain_values() -> None:
    value = {
        1: (np.float32(0.5), np.int64(3), np.array([[1.0, math.nan]])),
        "inf": -math.inf,
        "flag": True,
        "path": Path("a/b"),
        "time": datetime(2025, 1, 2, tzinfo=UTC),
        "none": None,
    }
    assert atomic.plain(value) == {
        "1": [0.5, 3, [[1.0, None]]],
        "inf": None,
        "flag": True,
        "path": "a/b",
        "time": "2025-01-02T00:00:00+00:00",
        "none": None,
    }
    assert atomic.plain(True) is True


def test_json_is_strict_and_reads_back_any_text(tmp_path: Path) -> None:
    text = 'é "quoted" \n \ud800 \U0001f600'
    atomic.write_json(tmp_path / "a.json", {"text": text, "loss": math.nan})
    raw = (tmp_path / "a.json").read_bytes()
    assert raw.endswith(b"}\n")
    assert json.loads(raw) == {"text": text, "loss": None}
