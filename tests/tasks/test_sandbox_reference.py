"""The base's probability of every well-formed response: against plain forward passes; what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moalign.lm.language_model import LanguageModel
from moalign.tasks.sandbox import reference, world

PROMPT = "how do i make soup today ?"


def plainly(lm: LanguageModel, prompt: list[int], choice: tuple[int, ...], temperature: float) -> float:
    """One response, one row, no tree."""
    ids = [*lm.tokenizer(world.response_text(choice), add_special_tokens=False).input_ids, lm.eos]
    logits = lm.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())


def test_they_are_those_of_plain_passes(lm: LanguageModel) -> None:
    prompt = lm.encode([PROMPT])[0]
    found = reference.log_probs(lm, prompt, 0.7)
    assert found.shape == (15625,) and np.exp(found.astype(np.float64)).sum() < 1
    chosen = [0, 15624, *np.random.default_rng(0).integers(15625, size=20).tolist()]
    expected = [plainly(lm, prompt, tuple(world.all_choices()[row]), 0.7) for row in chosen]
    np.testing.assert_allclose(found[chosen], expected, atol=2e-3)  # sums of 24 single-precision numbers down to -30


def test_they_are_kept_beside_the_base_and_read_back(
    make_lm: Callable[..., LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, calls = replace(make_lm(), source=str(tmp_path / "base")), []

    def computed(lm: LanguageModel, prompt: list[int], temperature: float) -> np.ndarray:
        calls.append((tuple(prompt), temperature))
        return np.full(15625, -len(calls), dtype=np.float32)

    monkeypatch.setattr(reference, "log_probs", computed)
    first = reference.kept_log_probs(lm, [PROMPT, "tell me"], 96, 1.0)
    assert [table[0] for table in first] == [-1, -2]
    again = reference.kept_log_probs(lm, ["tell me", PROMPT], 96, 1.0)
    assert [table[0] for table in again] == [-2, -1] and len(calls) == 2
    reference.kept_log_probs(lm, [PROMPT], 96, 0.5)
    reference.kept_log_probs(replace(lm, fingerprint="another"), [PROMPT], 96, 1.0)
    assert len(calls) == 4
    for path in (tmp_path / "base-answers").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])  # damaged: made again
    reference.kept_log_probs(lm, [PROMPT], 96, 1.0)
    assert len(calls) == 5
    (tmp_path / "other-answers").write_text("nothing can be kept here")
    (table,) = reference.kept_log_probs(replace(lm, source=str(tmp_path / "other")), [PROMPT], 96, 1.0)
    assert table[0] == -6, "an evaluation does not need the cache"
