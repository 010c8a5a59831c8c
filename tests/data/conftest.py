"""Shared by the tests of the data layer: writing small files, and the real preference data when it is there."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteJsonl = Callable[..., Path]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    """Return a function that writes records (or raw lines) to a file in the test's folder."""

    def write(records: Sequence[Any], name: str = "data.jsonl") -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def hh_file() -> Path:
    """The harmless-base test split of HH-RLHF (2,312 pairs), which is not part of the checkout."""
    shared = Path(os.environ.get("MOALIGN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    path = shared / "data" / "hh-harmless-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the real data is not there: {path} (set MOALIGN_SHARED to its folder)")
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to connect a failure of the test."""

    def connect(*args: object) -> None:
        raise AssertionError(f"the network was used: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
