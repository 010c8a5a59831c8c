"""Where things are that belong to no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.core.errors import RequestError
from moalign.core.paths import cache_root, shown


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("MOALIGN_CACHE", raising=False)
    assert cache_root() == tmp_path / "x" / "moalign"
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "y"))
    assert cache_root() == tmp_path / "y"


def test_without_a_home_the_cache_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "MOALIGN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(RequestError, match="name a folder with MOALIGN_CACHE=DIR"):
        cache_root()


def test_a_path_is_shown_short_where_it_lies_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "inner" / "r.yaml") == "inner/r.yaml"
    monkeypatch.chdir(tmp_path / "inner")
    assert shown("../r.yaml") == str(tmp_path / "r.yaml")
