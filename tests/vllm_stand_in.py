"""A module ``vllm`` for tests of what stands around it: it answers nonsense, and remembers what it was asked."""

from __future__ import annotations

import importlib.machinery
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOGP = -6.0
"""What it says of every token's log-probability."""


class StandIn:
    """``vllm.LLM``: tokens 5 to 29 by a request's seed and adapter, at most its limit; some end before it."""

    loaded: list[StandIn]
    """All that were made since the test began."""

    def __init__(self, **settings: Any) -> None:
        if "refused" in settings["model"]:
            raise ValueError("Model architectures ['Odd'] are not supported\nfor now")
        self.settings: dict[str, Any] = settings
        self.calls: list[list[types.SimpleNamespace]] = []
        """Of each call the requests: ``prompt``, ``how``, ``adapter`` (None: the base)."""
        self.removed: list[int] = []
        self.running = True
        core = types.SimpleNamespace(shutdown=lambda: setattr(self, "running", False))
        self.llm_engine = types.SimpleNamespace(remove_lora=self.removed.append, engine_core=core)
        self.loaded.append(self)

    def generate(self, texts: list[Any], how: list[Any], lora_request: list[Any], use_tqdm: bool) -> list[Any]:
        requests = zip(texts, how, lora_request, strict=True)
        self.calls.append(
            [types.SimpleNamespace(prompt=t["prompt_token_ids"], how=h, adapter=a) for t, h, a in requests]
        )
        return [types.SimpleNamespace(outputs=[self._answer(request)]) for request in self.calls[-1]]

    def _answer(self, request: Any) -> Any:
        name = ""
        if request.adapter is not None:
            assert (Path(request.adapter.path) / "adapter_config.json").is_file(), "an adapter that is not there"
            name = request.adapter.name
        rng = random.Random(f"{request.how.seed} {name}")
        length = rng.randint(1, request.how.max_tokens)
        ids = [rng.randint(5, 29) for _ in range(length)]
        ended = length < request.how.max_tokens
        ids += [request.how.stop_token_ids[0]] if ended else []
        return types.SimpleNamespace(
            token_ids=ids,
            logprobs=[{token: types.SimpleNamespace(logprob=LOGP)} for token in ids],
            finish_reason="stop" if ended else "length",
        )


def modules() -> dict[str, types.ModuleType]:
    """Return the modules that moalign imports of vLLM, with a fresh :class:`StandIn`."""
    named: dict[str, Any] = {name: types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.distributed")}
    named["vllm.lora.request"] = request = types.ModuleType("vllm.lora.request")
    made: Any = request
    made.LoRARequest = lambda name, number, path: types.SimpleNamespace(name=name, number=number, path=path)
    record: Callable[..., Any] = lambda **settings: types.SimpleNamespace(**settings)  # noqa: E731
    named["vllm"].LLM, named["vllm"].SamplingParams = type("LLM", (StandIn,), {"loaded": []}), record
    for name, module in named.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # who only looks whether it is there looks at this
    named["vllm.distributed"].cleanup_dist_env_and_memory = lambda: None
    return named
