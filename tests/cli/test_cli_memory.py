"""Memory settings as typed: what a machine lacks, and cards, in one message each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moalign.lm import backends


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without optional packages."""
    monkeypatch.setattr(backends, "find_spec", lambda name: None)


@pytest.mark.parametrize("verb", [("check", "sandbox/mo-odpo"), ("train", "mo-odpo")])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy.load_in_4bit=true", "policy.load_in_4bit: found true, but the package bitsandbytes is not installed"),
        ("task.load_in_4bit=true", "policy.load_in_4bit: found true, but the package bitsandbytes is not installed"),
        ("policy.attention=flash_attention_2", "'flash_attention_2', but the package flash-attn is not installed"),
        ("policy.attention=owner/kernel", "'owner/kernel', but the package kernels is not installed"),
        ("policy.attention=spda", "found 'spda'; allowed: eager, sdpa, flash_attention_2, or a kernel of the hub"),
        ("policy.dtype=float64", "--set policy.dtype: found 'float64'"),
        ("sample_batch=0", "--set sample_batch: config.sample_batch: found 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    moalign: Any, verb: tuple[str, ...], setting: str, message: str, tmp_path: Any
) -> None:
    ended = moalign(*verb, "--set", setting)
    assert ended.code == 2 and ended.err.count(message) == 1 and "Traceback" not in ended.err
    assert ended.err.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_card_that_no_setting_fits_ends_with_2_and_names_the_smallest(
    moalign: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    ended = moalign("check", "hh-rlhf/mo-odpo", "--gpu", "6GB")
    assert ended.code == 2
    assert "error: --gpu 6GB: no settings fit" in ended.err and "the smallest card that would do has 16 GB" in ended.err
    ended = moalign("check", "hh-rlhf/mo-odpo", "--gpu", "A100")
    assert ended.code == 2 and "--gpu: found 'A100'; allowed: the memory of a card, such as 24GB" in ended.err
    ended = moalign("check", "sandbox/sft", "--gpu", "24GB")
    assert ended.code == 2 and "--gpu: the task sandbox needs none" in ended.err


def test_settings_that_fit_are_printed_as_they_are_typed(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    ended = moalign("check", "hh-rlhf/mo-odpo", "--gpu", "24GB")
    assert ended.code == 0
    shown = " ".join(ended.out.split())
    assert "--set policy.gradient_checkpointing=true --set rewards.offload=true --set config.sample_batch=" in shown
    assert "not measured on a GPU yet" in shown and "h on RTX 4090" in shown
    ended = moalign("check", "hh-rlhf/mo-odpo", "--gpu", "24GB", "--json")
    (card,) = json.loads(ended.out)["cards"]
    assert card["fits"] is True and card["settings"]["rewards.offload"] is True
    assert set(card) == {
        "card_gib", "fits", "settings", "peak_gib", "peak_phase", "smallest_gib", "hours", "measured",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "share"),
    [("mo-odpo", "share_prompts=true"), ("modpo", "share_prompts=true"), ("cpo", "cdpo.share_prompts=true")],
)
def test_checkpointing_and_shared_prompts_are_refused_together(
    moalign: Any, method: str, share: str, tmp_path: Any
) -> None:
    """Before anything is loaded, whichever stage shares its prompts."""
    ended = moalign("train", method, "--set", share, "--set", "policy.gradient_checkpointing=true")
    assert ended.code == 2 and ended.err.count("share_prompts: gradient checkpointing keeps no cache") == 1
    assert not list(tmp_path.iterdir())
