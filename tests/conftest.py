"""Shared by all tests: an environment that needs no network, one thread, and the data that stands beside a checkout.

The sandbox's base model is trained once (under a file lock, so parallel workers share it) and stays in moalign's own
cache (``$MOALIGN_CACHE``, else the user's cache folder) from one session to the next: it is found by content, so a
change of the sandbox trains a new one.
"""

from __future__ import annotations

import os

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MOALIGN_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout that the tests stand in."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data that may stand beside the checkout: ``$MOALIGN_SHARED``, else ``../shared``.

    Tests that use it are skipped, with this reason, where it is absent.
    """
    folder = Path(os.environ.get("MOALIGN_SHARED") or CHECKOUT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"real models and data are not there: {folder} (set MOALIGN_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """The folder of the real 260,000-parameter story model."""
    folder = shared / "models" / "stories260k"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the story model is not there: {folder}")
    return folder


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with random weights and the sandbox's vocabulary.

    For tests of machinery, where it does not matter what the base knows: it is there at once, and its responses are
    long, varied and nonsense.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moalign.tasks.sandbox.base import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.25,  # the usual 0.02 makes every next token about equally likely
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("random-base")
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_task(random_base: Path) -> tuple[str, ...]:
    """Overrides (``--set`` texts) that make the sandbox a task of seconds, on :func:`random_base`."""
    return (
        f"task.model={random_base}",
        "task.grid=3",
        "task.evaluation.prompts=8",
        "task.evaluation.bootstrap=100",
        "task.pool.prompts=24",
        "task.pool.per_prompt=2",
        "task.pool.calibration_per_prompt=2",
        "task.generation.max_new_tokens=12",
    )
