"""A little of ``make break``: nothing may escape. What it prints names the case, to be repeated with ``--only``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("code", "err", "found"),
    [
        (0, "", ""),
        (130, "interrupted\n", ""),
        (2, "error: --grid 1: too small\nerror: --seed x: no number\n", ""),
        (1, "Traceback (most recent call last):\n  ...\nKeyError: 3\n", "a traceback: KeyError: 3"),
        (1, "error: KeyError: 3; the same command with --debug shows where\n", "a fault that nobody meant to raise"),
        (2, "", "exit code 2 without a message"),
        (2, "error: a\nb\n", "a message of more than one line: 'b'"),
        (3, "error: a\n", "exit code 3"),
        (-11, "", "ended by signal 11"),
        (2, "error: unknown \x1b[31m\n", "the character U+001B raw on stderr"),
    ],
)
def test_what_counts_as_an_escape(monkeypatch: pytest.MonkeyPatch, code: int, err: str, found: str) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    from tally import fault
    from warm import Ended

    problem = fault(Ended((), code, "", err, 1.0))
    assert problem.startswith(found) and bool(problem) == bool(found)


@pytest.mark.slow
def test_nothing_escapes_and_nothing_is_lost(tmp_path: Path) -> None:
    """Kills, wrong requests, damaged files, inputs to the loaders and hostile texts, a few of each."""
    command = [sys.executable, str(HERE), "--short", "--minutes", "5", "--work", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
