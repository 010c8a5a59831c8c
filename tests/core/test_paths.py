"""Where things are that belong to no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.core.paths import cache_root


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("MOALIGN_CACHE", raising=False)
    assert cache_root() == tmp_path / "x" / "moalign"
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "y"))
    assert cache_root() == tmp_path / "y"
