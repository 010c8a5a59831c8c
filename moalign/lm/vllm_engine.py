"""Sampling by vLLM, in this process: the base is loaded once, and every state of an adapter is a version of its own.

Nothing is merged: folded into weights of half precision or four bits an adapter is rounded, and the error adds up from
update to update. Nothing is loaded in place: vLLM then serves stale weights (vllm issues 41482, 42125). A new state
is written into a folder with a new name and passed as a new request; the version before stays until the next one comes,
since answers to it may still be on their way.

vLLM draws by its own random numbers, seeded for each response: the same request gives the same response, but not the
one that :mod:`moalign.lm.sampler` would give, and how responses are batched may change the last digits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.core.errors import RequestError

if TYPE_CHECKING:
    from moalign.lm.adapters import Adapter

RANKS = (1, 8, 16, 32, 64)
"""Ranks that vLLM reserves room for; a rank between two of them takes the larger one. It knows larger ones, too, with
kernels that are not tried here."""


def refusal(rank: int | None = None) -> str | None:
    """Return why vLLM cannot sample: it is not installed, or serves no adapter of this rank; None: it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; pip install 'moalign[vllm]' (README.md), or use engine: hf"
    if rank is not None and rank > RANKS[-1]:
        return f"vLLM serves adapters up to rank {RANKS[-1]}; found policy.lora.r = {rank}; or use engine: hf"
    return None


@dataclass(frozen=True)
class Drawn:
    """One response."""

    ids: list[int]
    """With the end token, where one was drawn."""
    logps: list[float]
    """log pi of each token, in nats, at the temperature it was drawn at."""
    finished: bool
    """Whether it ended at an end token, not by the limit."""


@dataclass
class Versions:
    """The states of adapters that vLLM serves, each in a folder of its own."""

    folder: Path
    base: str
    """What the adapters' config names as their base."""
    made: int = 0
    served: dict[int, str] = field(default_factory=dict)
    """Number of each version that is there -> hash of its weights."""

    def publish(self, adapter: Adapter) -> tuple[int, Path]:
        """Return number and folder of an adapter's version; written, atomically, where it is not there yet."""
        content = _content(adapter)
        for number, known in self.served.items():
            if known == content:
                return number, self._place(number)
        self.made += 1
        _write(self._place(self.made), adapter, self.base)
        self.served[self.made] = content
        return self.made, self._place(self.made)

    def superseded(self, keep: int) -> list[int]:
        """Return the versions that are older than the newest ``keep``, oldest first."""
        return sorted(self.served)[: max(0, len(self.served) - keep)]

    def drop(self, number: int) -> None:
        """Forget a version and remove its folder."""
        del self.served[number]
        shutil.rmtree(self._place(number), ignore_errors=True)

    def _place(self, number: int) -> Path:
        return self.folder / f"adapter-v{number}"


class VllmEngine:
    """A base served by vLLM, with adapters on top."""

    def __init__(
        self,
        model: Path | str,
        folder: Path,
        rank: int,
        max_tokens: int,
        dtype: str = "float32",
        adapters: int = 2,
        gpu_memory: float = 0.4,
    ) -> None:
        """Load the base.

        Args:
            model: its folder.
            folder: where versions of adapters are written; emptied at :meth:`close`.
            rank: the largest of the adapters.
            max_tokens: of prompt and response together.
            adapters: most that one batch mixes.
            gpu_memory: share of a GPU's memory that vLLM takes for weights and cache.

        Raises RequestError where vLLM is not installed or refuses the rank.
        """
        if problem := refusal(rank):
            raise RequestError(problem)
        import torch
        from vllm import LLM

        gpu = torch.cuda.is_available()
        # Log-probabilities of the distribution that is drawn from, the temperature included, not of the raw logits.
        self.llm: Any = LLM(
            model=str(model),
            dtype=dtype,
            enable_lora=True,
            max_lora_rank=next(size for size in RANKS if size >= rank),
            max_loras=adapters,
            max_model_len=max_tokens,
            logprobs_mode="processed_logprobs",
            enforce_eager=not gpu,
            enable_sleep_mode=gpu,
            disable_log_stats=True,
            **({"gpu_memory_utilization": gpu_memory} if gpu else {}),
        )
        self.adapters, self.gpu = adapters, gpu
        self.versions = Versions(folder, str(model))

    def use(self, adapter: Adapter) -> int:
        """Make an adapter's state one that :meth:`sample` may name; returns its version.

        Of one-adapter training this is called once an update: the state before last is unloaded.
        """
        number, _ = self.versions.publish(adapter)
        for old in self.versions.superseded(keep=max(2, self.adapters)):
            self.llm.llm_engine.remove_lora(old)
            self.versions.drop(old)
        return number

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        versions: Sequence[int | None],
        max_new_tokens: int,
        ends: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[Drawn]:
        """Return a response to each tokenised prompt; row ``i`` is drawn with ``seeds[i]`` by ``versions[i]``.

        One call may mix adapters and the base (None). ``ends`` end a response; they are tokens of it.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        how = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                max_tokens=max_new_tokens,
                stop_token_ids=list(ends),
                ignore_eos=True,  # the end token is one of ``ends``, which stay in the response
                seed=seed,
                logprobs=0,  # of the drawn token alone
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [
            None if version is None else LoRARequest(f"adapter-v{version}", version, str(self.versions._place(version)))
            for version in versions
        ]
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [_drawn(output.outputs[0]) for output in self.llm.generate(texts, how, lora_request=requests, use_tqdm=False)]

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Within the block vLLM's weights wait in the CPU's memory and its cache is gone; on a GPU alone.

        Level 1: of level 2 adapters do not come back (vllm issue 39934).
        """
        if not self.gpu:
            yield
            return
        self.llm.sleep(level=1)
        try:
            yield
        finally:
            self.llm.wake_up()

    def close(self) -> None:
        """Remove the adapters' folders, and let go of the base."""
        for number in list(self.versions.served):
            self.versions.drop(number)
        self.llm = None


def _drawn(output: Any) -> Drawn:
    ids = [int(token) for token in output.token_ids]
    logps = [float(place[token].logprob) for token, place in zip(ids, output.logprobs, strict=True)]
    return Drawn(ids, logps, output.finish_reason == "stop")


def _content(adapter: Adapter) -> str:
    """Return a hash of an adapter's weights and settings."""
    import hashlib

    digest = hashlib.sha256(adapter.spec.model_dump_json().encode())
    for name, value in sorted(adapter.weights.items()):
        digest.update(name.encode() + value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(place: Path, adapter: Adapter, base: str) -> None:
    """Write an adapter as peft writes it, atomically."""
    import json

    from peft import LoraConfig
    from safetensors.torch import save_file

    from moalign.runs import atomic

    spec = adapter.spec
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        target_modules=spec.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    with atomic.directory(place) as folder:
        save_file(dict(adapter.weights), folder / "adapter_model.safetensors")
        atomic.write_text(folder / "adapter_config.json", json.dumps(config, indent=2, default=str) + "\n")
