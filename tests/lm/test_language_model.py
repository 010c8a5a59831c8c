"""Token log-probabilities against a plain forward pass, and models that cannot be loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moalign.core.errors import RequestError
from moalign.lm import language_model, loading
from moalign.lm.language_model import LanguageModel, reference_mode
from moalign.lm.log_probs import positions, token_outputs

ROWS = [([1, 20, 30, 40], [50, 60, 2]), ([1, 21], [51, 61, 71, 81, 2]), ([1, 22, 32, 42, 52, 62, 72], [2])]


def plain(lm: LanguageModel, prompt: list[int], response: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a response, without padding, mask or cache."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt + response])).logits[0].double() / temperature
    table = torch.log(torch.softmax(logits, dim=-1))
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    logps = torch.stack([table[place, token] for place, token in zip(places, response, strict=True)])
    return logps, torch.stack([-(table[place].exp() * table[place]).sum() for place in places])


def batch(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention, response mask): padding left, right, or prompts left and responses right as the sampler does."""
    longest = max(len(p) + len(r) for p, r in ROWS)
    heads, tails = max(len(p) for p, _ in ROWS), max(len(r) for _, r in ROWS)
    ids, attention, marked = [], [], []
    for prompt, response in ROWS:
        row = prompt + response
        if side == "left":
            before, after = longest - len(row), 0
        elif side == "right":
            before, after = 0, longest - len(row)
        else:
            before, after = heads - len(prompt), tails - len(response)
        ids.append([0] * before + row + [0] * after)
        attention.append([0] * before + [1] * len(row) + [0] * after)
        marked.append([False] * (before + len(prompt)) + [True] * len(response) + [False] * after)
    width = tails if side == "both" else longest - 1
    return torch.tensor(ids), torch.tensor(attention), torch.tensor(marked)[:, -width:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_log_probabilities_do_not_depend_on_padding(lm: LanguageModel, side: str, temperature: float) -> None:
    ids, attention, mask = batch(side)
    out = token_outputs(lm.model, ids, attention, mask, temperature)
    assert out.logps.shape == mask.shape and out.hidden is None
    assert (out.logps[~mask] == 0).all() and (out.entropy[~mask] == 0).all()
    for i, (prompt, response) in enumerate(ROWS):
        logps, entropy = plain(lm, prompt, response, temperature)
        torch.testing.assert_close(out.logps[i][mask[i]].double(), logps, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.entropy[i][mask[i]].double(), entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_what_stands_in_the_padding_does_not_matter(lm: LanguageModel, side: str) -> None:
    ids, attention, mask = batch(side)
    anything = torch.randint(3, 150, ids.shape, generator=torch.Generator().manual_seed(0))
    noisy = torch.where(attention == 1, ids, anything)
    first, second = (token_outputs(lm.model, i, attention, mask).logps for i in (ids, noisy))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_mask_keeps_prompt_and_padding_out_of_the_gradient(make_lm: Callable[..., LanguageModel]) -> None:
    """The gradient of the summed log-probability equals that of the responses alone, each without padding."""
    lm = make_lm()
    head = lm.model.lm_head.weight.requires_grad_(True)
    ids, attention, mask = batch("both")
    token_outputs(lm.model, ids, attention, mask).logps.sum().backward()
    gradient, head.grad = head.grad, None
    for prompt, response in ROWS:
        logits = lm.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.log_softmax(logits, -1)[range(len(response)), response].sum().backward()
    torch.testing.assert_close(gradient, head.grad, atol=1e-4, rtol=1e-4)


def test_hidden_states_are_those_before_each_token(lm: LanguageModel) -> None:
    ids, attention, mask = batch("both")
    out = token_outputs(lm.model, ids, attention, mask, hidden=True)
    assert out.hidden is not None and out.hidden.shape == (*mask.shape, 32)
    with torch.no_grad():
        logits = lm.model.lm_head(out.hidden)
    logps = torch.log_softmax(logits, -1).gather(-1, ids[:, -mask.shape[1] :, None])[..., 0]
    torch.testing.assert_close(logps[mask], out.logps[mask], atol=1e-5, rtol=0)


def test_positions_do_not_count_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_encode_begins_with_the_begin_token_and_cuts_on_the_left(lm: LanguageModel) -> None:
    text = "how do i make soup ?"
    ids = lm.tokenizer.convert_tokens_to_ids(text.split())
    assert lm.encode([text, "soup"]) == [[1, *ids], [1, ids[4]]]
    assert lm.encode([text], max_tokens=4) == [[1, *ids[-3:]]]


def test_decode_leaves_special_tokens_out(lm: LanguageModel) -> None:
    ids = lm.tokenizer.convert_tokens_to_ids(["make", "soup", "?"])
    assert lm.decode([[1, *ids, 2, 0, 0], [2], []]) == ["make soup ?", "", ""]


def test_wrap_freezes_and_settles_padding(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm()
    assert not any(parameter.requires_grad for parameter in lm.model.parameters()) and not lm.model.training
    lm.tokenizer.pad_token = None
    again = language_model.wrap(lm.model, lm.tokenizer, "x", "y", device="cpu")
    assert again.pad == again.eos == 2
    lm.tokenizer.eos_token = None
    with pytest.raises(RequestError, match="no end token"):
        language_model.wrap(lm.model, lm.tokenizer, "x", "y", device="cpu")


def test_threads_follow_the_environment_then_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("MOALIGN_THREADS", raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert language_model.set_threads(100_000) == 1 == torch.get_num_threads()
        assert language_model.set_threads(10**9) == (os.cpu_count() or 1)
        with monkeypatch.context() as limited:  # a container's share of a large machine
            limited.setattr(language_model, "usable_cpus", lambda: 3)
            assert language_model.set_threads(10**9) == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert language_model.set_threads(100_000) == 2 == torch.get_num_threads()
        monkeypatch.setenv("MOALIGN_THREADS", "1")
        assert language_model.set_threads(10**9) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "0")
        for wrong in ("many", "0"):
            monkeypatch.setenv("MOALIGN_THREADS", wrong)
            with pytest.raises(RequestError, match=f"MOALIGN_THREADS={wrong}: allowed: 1 or more"):
                language_model.set_threads(100_000)
        monkeypatch.delenv("MOALIGN_THREADS")
        assert language_model.set_threads(100_000) == 1
    finally:
        torch.set_num_threads(before)


def test_reference_mode_of_a_bare_model_changes_nothing(lm: LanguageModel) -> None:
    ids, attention, mask = batch("left")
    before = token_outputs(lm.model, ids, attention, mask).logps
    with reference_mode(lm):
        assert torch.equal(token_outputs(lm.model, ids, attention, mask).logps, before)


# -- loading -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(lm: LanguageModel, tmp_path: Path) -> Path:
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(source: Path | str) -> str:
    with pytest.raises(RequestError) as caught:
        language_model.load(str(source), device="cpu")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_saved_model_loads_exactly_and_moving_it_keeps_its_fingerprint(lm: LanguageModel, folder: Path) -> None:
    loaded = language_model.load(str(folder), device="cpu")
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in lm.model.state_dict().items())
    assert loaded.encode(["make soup ?"]) == lm.encode(["make soup ?"])
    moved = folder.rename(folder.parent / "moved")
    assert language_model.load(str(moved), device="cpu").fingerprint == loaded.fingerprint
    half = language_model.load(str(moved), dtype="bfloat16", device="cpu")
    assert {value.dtype for value in half.model.state_dict().values()} == {torch.bfloat16}


def test_a_gpu_that_is_full_is_no_wrong_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "from_folder", full)
    with pytest.raises(torch.OutOfMemoryError):
        language_model.load(str(folder))


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert str(folder) in refused(folder) and "model.safetensors is missing" in refused(folder)


@pytest.mark.parametrize("kept", [3, 200, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refused(folder) and "copy it again" in refused(folder)


def test_only_pickled_weights_are_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    # A pickle that would leave a file behind if anything read it.
    (folder / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'%s'\ntR." % str(tmp_path / "ran").encode())
    message = refused(folder)
    assert "pickled weights (pytorch_model.bin)" in message and "save_pretrained" in message
    assert not (tmp_path / "ran").exists()


def test_hub_id_offline_says_how_to_point_at_a_folder() -> None:
    message = refused("nobody-at-all/no-such-model")
    assert "nobody-at-all/no-such-model" in message and "local model folder" in message


def test_missing_folder_missing_and_broken_tokenizer(folder: Path, tmp_path: Path) -> None:
    assert "there is no model folder" in refused(tmp_path / "nowhere")
    tokenizer = folder / "tokenizer.json"
    kept = tokenizer.read_bytes()
    tokenizer.unlink()
    assert "no tokenizer files" in refused(folder)
    tokenizer.write_bytes(kept[: len(kept) // 2])
    assert "tokenizer" in refused(folder)


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "kept.json")
    (folder / "config.json").write_text('{"model_type": "no-such-kind"}')
    assert str(folder) in refused(folder)
