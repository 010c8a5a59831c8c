"""A little of ``make break``: nothing may escape. What it prints names the case, to be repeated with ``--only``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_escapes_and_nothing_is_lost(tmp_path: Path) -> None:
    """Kills, wrong requests, damaged files, inputs to the loaders and hostile texts, a few of each."""
    command = [sys.executable, str(Path(__file__).parent), "--short", "--minutes", "5", "--work", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
