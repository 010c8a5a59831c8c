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
os.environ.setdefault("MOALIGN_JOBS", "1")  # in this process, where a test may have put its hands on something
os.environ.setdefault("MPLBACKEND", "agg")

import functools
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel

CHECKOUT = Path(__file__).resolve().parents[1]


@functools.cache
def _beside(name: str) -> ModuleType:
    """Return a module of this folder, which is on no import path (``--import-mode=importlib``)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # pydantic looks for the names in it
    spec.loader.exec_module(module)
    return module


_chats = _beside("chat_families")
chat_folder, chat_families = _chats.chat_folder, _chats.chat_families
_hostile = _beside("hostile_texts")
_judge = _beside("judge_server")
_vllm = _beside("vllm_stand_in")


@pytest.fixture(scope="session")
def other_processor() -> dict[str, str]:
    """Environment of PyTorch's and MKL's code for processors without wide registers: its sums have another order."""
    return {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


@pytest.fixture(scope="session")
def hostile() -> Any:
    """Texts that attack what shows them, and what of them acts: see ``hostile_texts.py``."""
    return _hostile


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An endpoint for objectives of kind judge, which says "Score: 7" to all: see ``judge_server.py``."""
    pytest.importorskip("openai", reason="the library openai (extra judge) is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = _judge.JudgeServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def judge_replies() -> Any:
    """What such an endpoint can reply: ``Reply`` and ``verdict`` of ``judge_server.py``."""
    return _judge


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """vLLM stands in for itself (``vllm_stand_in.py``); returns the list of all that are loaded from then on."""
    from moalign.lm import backends

    made = _vllm.modules()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    find_spec = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if name == "vllm" else find_spec(name))
    loaded: list[Any] = made["vllm"].LLM.loaded
    return loaded


@pytest.fixture(scope="session", autouse=True)
def _no_waiting() -> Iterator[None]:
    """What costs milliseconds thousands of times: waiting for the disk, asking git for the state of this checkout."""
    from moalign.core import paths
    from moalign.runs import environment

    git_state, state = environment.git_state, environment.git_state(paths.CHECKOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(
            environment, "git_state", lambda checkout: state if checkout == paths.CHECKOUT else git_state(checkout)
        )
        yield


_modules = 0
"""How many modules there were when the last were frozen."""


@pytest.fixture(autouse=True)
def _modules_are_no_garbage() -> None:
    """Every trainer collects garbage when it is done: half a second once torch and trl are imported, unless frozen."""
    global _modules
    if len(sys.modules) > _modules + 50:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


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
def smollm2() -> Path:
    """The folder of the real instruct model that comes with the project; converted once, then kept in the cache."""
    from moalign.lm import builtin

    name = "smollm2-135m-instruct"
    if builtin.converted(name) is None and builtin.installed(name) is None:
        pytest.skip(f"the built-in model is not installed: {builtin.MODELS[name].command}")
    return builtin.ensure(name, "test")


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


@pytest.fixture(scope="session")
def small_task(random_base: Path) -> tuple[str, ...]:
    """Overrides (``--set`` texts) that make the sandbox a task of seconds, on :func:`random_base`."""
    return (
        f"task.model={random_base}",
        "task.grid=3",
        "task.evaluation.prompts=8",
        "task.evaluation.samples=1",
        "task.evaluation.bootstrap=100",
        "task.splits={train: 0.1, calibration: 0.1, eval: 0.8}",  # every training prompt has 16 logged responses
        "task.pool.prompts=24",
        "task.pool.per_prompt=2",
        "task.pool.calibration_per_prompt=2",
        "task.generation.max_new_tokens=12",
    )


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods ``picky`` and ``picky-soup`` of ``picky_methods.py``, known while the test runs."""
    from moalign.methods import registry

    methods = _beside("picky_methods")
    names, get = registry.names, registry.get
    made: dict[str, Any] = {"picky": methods.Picky, "picky-soup": methods.PickySoup}
    monkeypatch.setattr(registry, "names", lambda: sorted([*names(), *made]))
    monkeypatch.setattr(registry, "get", lambda name: made[name]() if name in made else get(name))


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., LanguageModel]:
    """Return a maker of tiny random Llamas with the sandbox's tokenizer: the same ``seed``, the same weights.

    They are steep enough that their next-token distributions differ.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moalign.lm.language_model import wrap
    from moalign.tasks.sandbox import base

    def make(seed: int = 0, end: float = 3.0) -> LanguageModel:
        tokenizer = base.make_tokenizer()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight[2] *= end  # the end token is then likely in some places, as in a trained model
        return wrap(model, tokenizer, "tiny", f"{seed:016d}", device="cpu")

    return make


@pytest.fixture(scope="module")
def lm(make_lm: Callable[..., LanguageModel]) -> LanguageModel:
    """One bare model per test file; nothing may change it."""
    return make_lm()
