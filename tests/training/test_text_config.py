"""Models whose config keeps the sizes of the language model in a part of its own, as Gemma 3 does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from moalign.config.recipe import LoraSpec
from moalign.lm import language_model, marked
from moalign.lm.language_model import LanguageModel
from moalign.lm.log_probs import positions
from moalign.policies.control import Control
from moalign.policies.control_spec import ControlSpec
from moalign.tasks.sandbox import base
from moalign.training.actor import AdapterActor
from moalign.training.job import Job

WORDS, WIDTH = 189, 16
"""The sandbox's 185 words and four marks of pictures."""


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Gemma 3 with eyes, which it needs for no text."""
    tokenizer, folder = base.make_tokenizer(), tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(0)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = Gemma3TextConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=16, initializer_range=0.3, **ends,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    marks = {"boi_token_index": WORDS - 4, "eoi_token_index": WORDS - 3, "image_token_index": WORDS - 2}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **marks, **ends)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def lm(gemma3: Path) -> LanguageModel:
    found = language_model.load(str(gemma3), device="cpu")
    assert not hasattr(found.model.config, "hidden_size")
    return found


def test_an_actor_knows_the_width_of_the_states_that_it_samples(make_job: Callable[..., Job], gemma3: Path) -> None:
    job = make_job("mo-odpo", f"task.model={gemma3}")
    actor = AdapterActor(job, job.task.language_model, job.config, "percent")
    numbers = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    states = actor.sample(["any tips ?"], job.preferences[:1], numbers, 2, hidden=True).hidden
    assert states is not None and states.shape[-1] == actor.width == WIDTH


@pytest.mark.parametrize("at_once", [marked.AT_ONCE, 0])
def test_marked_tokens_have_the_log_probabilities_of_a_plain_pass(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(marked, "AT_ONCE", at_once)
    ids = torch.tensor([[1, 20, 30, 40, 50], [1, 60, 70, 80, 2]])
    assert marked.trl_is_lean(lm.model, ids) == (at_once >= 10 * WORDS)
    if at_once:
        return
    chosen = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
    with torch.no_grad():
        found = marked.log_probs(lm.model, ids, torch.ones_like(ids), chosen)
        plain = torch.log_softmax(lm.model(input_ids=ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, plain.masked_fill(~chosen[:, 1:], 0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["adapter", "folder"])
def test_a_control_model_reads_states_of_its_own_width(lm: LanguageModel, gemma3: Path, form: str) -> None:
    own = {"lora": LoraSpec(r=2, targets="all-linear")} if form == "adapter" else {"model": str(gemma3)}
    control = Control(ControlSpec(form=form, **own), lm, 3, seed=0)
    ids = torch.tensor([[1, 20, 30, 40], [1, 60, 70, 80]])
    one = torch.ones_like(ids)
    states = control.hidden(ids, one, positions(one))
    assert states.shape == (2, 4, WIDTH) and control.head.weight.shape == (3, WIDTH)
    with torch.no_grad():  # a fresh adapter changes nothing, and the folder's model is the experts' base
        torch.testing.assert_close(lm.model.lm_head(states), lm.model(input_ids=ids).logits, atol=1e-4, rtol=0)
