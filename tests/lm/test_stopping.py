"""What follows a stop text is no part of a response: neither for the judge nor for a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moalign.lm import language_model
from moalign.lm.language_model import LanguageModel
from moalign.lm.log_probs import token_outputs
from moalign.lm.sampler import Samples, keep, responses, sample, trim, unknown

PROMPTS = ["how do i make soup today ?", "any tips ?", "can you help me paint a wall ?"]


@pytest.fixture
def drawn(lm: LanguageModel) -> Samples:
    numbers = torch.from_numpy(__import__("numpy").random.default_rng(3).random((3, 20)))
    return sample(lm, lm.encode(PROMPTS), numbers)


def words(lm: LanguageModel, samples: Samples, row: int) -> list[str]:
    width = samples.response_mask.shape[1]
    ids = samples.input_ids[row, -width:][samples.response_mask[row]]
    return lm.tokenizer.decode(ids, skip_special_tokens=True).split()


def test_without_stop_texts_nothing_changes(lm: LanguageModel, drawn: Samples) -> None:
    assert trim(lm, drawn, ()) is drawn


def test_a_row_ends_with_the_token_that_completes_its_stop_text(lm: LanguageModel, drawn: Samples) -> None:
    spoken = [words(lm, drawn, row) for row in range(3)]
    at = 4
    stop = spoken[0][at]
    first = spoken[0].index(stop)
    kept = trim(lm, drawn, [stop])
    assert words(lm, kept, 0) == spoken[0][: first + 1]
    for row in (1, 2):
        expected = spoken[row][: spoken[row].index(stop) + 1] if stop in spoken[row] else spoken[row]
        assert words(lm, kept, row) == expected
    assert kept.finished.all()  # these rows ended by themselves
    cut_off = replace(drawn, finished=torch.tensor([False, False, True]))
    assert trim(lm, cut_off, [stop]).finished.tolist() == [True, stop in spoken[1], True]
    assert stop not in spoken[1]
    assert responses(lm, kept, [stop]) == responses(lm, drawn, [stop])  # the judge sees what it saw before


def test_a_stop_text_of_several_tokens_ends_with_its_last(lm: LanguageModel, drawn: Samples) -> None:
    spoken = words(lm, drawn, 1)
    kept = trim(lm, drawn, [" ".join(spoken[2:5])])
    assert words(lm, kept, 1) == spoken[:5]


def test_masks_and_log_probabilities_agree_with_the_shorter_row(lm: LanguageModel, drawn: Samples) -> None:
    stop = words(lm, drawn, 0)[3]
    kept = trim(lm, drawn, [stop])
    width = kept.response_mask.shape[1]
    assert torch.equal(kept.attention_mask[:, -width:].bool(), kept.response_mask)
    assert (kept.logps[~kept.response_mask] == 0).all()
    assert torch.equal(kept.logps[kept.response_mask], drawn.logps[kept.response_mask])
    assert kept.tokens < drawn.tokens
    again = token_outputs(lm.model, kept.input_ids, kept.attention_mask, kept.response_mask)
    assert torch.allclose(again.logps, kept.logps, atol=1e-5)


def ended(lm: LanguageModel, text: str, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """Return what becomes of a sampled text: its answer, the text of its tokens and whether it is finished.

    For the judge and pools, which must be the same as for a loss.
    """
    row = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(row)
    samples = Samples(
        torch.tensor([[5, *row]]), torch.ones(1, count + 1, dtype=torch.long),
        torch.ones(1, count, dtype=torch.bool), torch.full((1, count), -0.5), torch.tensor([False]),
    )  # fmt: skip
    judged = unknown(lm, 1)
    keep(lm, samples, judged, [0], stop)
    assert judged.traces is not None and judged.tokens == count
    ids, finished = judged.traces.ids[0].tolist(), judged.traces.finished[0]
    learnt = trim(lm, samples, stop)
    assert learnt.input_ids[0, -count:][learnt.response_mask[0]].tolist() == ids
    assert (responses(lm, learnt, stop), learnt.finished.tolist()) == (judged.responses, [finished])
    assert responses(lm, samples, stop) == responses(lm, samples, stop[::-1])
    assert judged.traces.logps[0] == float(learnt.logps.sum()) == -0.5 * len(ids)
    return judged.responses[0], lm.tokenizer.decode(ids), finished


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (("\n\nHuman:",), "\n\nHuman: how do I learn the guitar?", ("", "\n\nHuman:", True)),
        (("###", "\n\n"), "\n\nOnce upon a time", ("", "\n\n", True)),
        (("\n",), " \nOnce upon a time", ("", " \n", True)),
        (("\n\n",), "You are welcome.\n\n", ("You are welcome.", "You are welcome.\n\n", True)),
        (("Human:",), "\nYou are welcome. Human: thank", ("You are welcome.", "\nYou are welcome. Human:", True)),
        (("Human:",), "\nYou are welcome.\n", ("You are welcome.", "\nYou are welcome.\n", False)),
        (("a little girl", "ttl"), "Once a little girl named Lily", ("Once a li", "Once a little", True)),
    ],
)
def test_a_stop_text_is_seen_wherever_it_stands_by_all_who_read_the_answer(
    chat_folder: Callable[[str], Path], stop: tuple[str, ...], text: str, expected: tuple[str, str, bool]
) -> None:
    lm = language_model.load(str(chat_folder("base")), device="cpu")
    assert ended(lm, text, stop) == expected
