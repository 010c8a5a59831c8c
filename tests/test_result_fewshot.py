"""results/fewshot.py: its readers and its regret by hand, and its page of its record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "results"
sys.path.insert(0, str(FOLDER))
import fewshot as script  # noqa: E402

sys.path.remove(str(FOLDER))

GRID = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])


def test_a_regret_by_hand() -> None:
    """n = (0, .8), (.5, .6), (.9, .1): asked for (1, 0) and read (.6, .4), that is the middle: .9 - .5."""
    answers = np.array([[0.0, 0.8], [0.5, 0.6], [0.9, 0.1]])
    read = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]])
    assert script.regrets([2, 1, 1], read, GRID, answers) == pytest.approx([0.4, 0.0, 0.55 - 0.4])


def test_what_labels_say_of_a_preference() -> None:
    """A gap of (2, -1): the more weight on the first the likelier the label; of (0, 0) or no pair: all alike."""
    gaps = np.array([[[2.0, -1.0]], [[-1.0, 2.0]], [[0.0, 0.0]]])
    assert script.logistic(gaps, GRID, 1.0).tolist() == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    assert script.logistic(gaps[:, :0], GRID, 1.0).tolist() == [[0.5, 0.5]] * 3
    chances = 1 / (1 + np.exp([1.0, -0.5, -2.0]))  # margins -1, .5 and 2
    assert script.exact(gaps, GRID, 1.0)[0] == pytest.approx(chances @ GRID / chances.sum())
    assert script.exact(gaps[:, :0], GRID, 1.0)[0] == pytest.approx([0.5, 0.5])


@pytest.mark.skipif(not (FOLDER / "fewshot.json").is_file(), reason="it was not measured yet")
def test_the_page_is_made_of_its_record() -> None:
    told = json.loads((FOLDER / "fewshot.json").read_text(encoding="utf-8"))
    assert (FOLDER / "fewshot.md").read_text(encoding="utf-8") == script.page(told)
    assert all(set(run["regret"]) == set(script.READERS) for run in told)
