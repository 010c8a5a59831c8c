"""Sampling by vLLM, in this process: the base is loaded once, and every state of an adapter is a version of its own.

Nothing is merged: folded into weights of half precision or four bits an adapter is rounded, and the error adds up from
update to update. Nothing is loaded in place: vLLM then serves stale weights (vllm issues 41482, 42125). A new state
is written into a folder with a new name and passed as a new request; what was served before is unloaded.

vLLM draws by its own random numbers, seeded for each response: the same request gives the same response, but not the
one that :mod:`moalign.lm.sampler` would give, and how responses are batched may change the last digits.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from moalign.config.recipe import RolloutSpec
from moalign.core.errors import RequestError
from moalign.core.seeds import derive
from moalign.lm.backends import RANKS
from moalign.lm.loading import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.lm.generator import Advance, OneModel
    from moalign.lm.language_model import LanguageModel
    from moalign.lm.sampler import Generated, Samples, Sampling

ADAPTERS = 4
"""Adapters that one pass of vLLM mixes at most; those of a larger batch take turns."""


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of its own would hold its memory when this one is killed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are the same ones
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, on a CPU
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM reads when it is imported, where the user has set nothing else."""


_loaded: WeakSet[VllmEngine] = WeakSet()
"""The engine whose base is in memory, of this process: there is room for one."""


class VllmEngine:
    """A base served by vLLM, with adapters on top; loaded when it first samples."""

    def __init__(self, spec: RolloutSpec, base: Callable[[], Path], dtype: str, rank: int, max_tokens: int) -> None:
        """Prepare to sample; nothing is loaded.

        Args:
            spec: a recipe's.
            base: gives the folder of the base.
            dtype: of the base.
            rank: the largest of the adapters, at most the last of :data:`~moalign.lm.backends.RANKS`.
            max_tokens: of prompt and response together.
        """
        self.spec, self._base, self._dtype, self._rank, self._max_tokens = spec, base, dtype, rank, max_tokens
        self._folder = tempfile.TemporaryDirectory(prefix="moalign-adapters-")
        self._made = 0
        self._served: list[int] = []

    @cached_property
    def llm(self) -> Any:
        """vLLM's own object. Raises RequestError for a base that vLLM cannot serve."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for other in list(_loaded):
            other.close()
        import torch
        from vllm import LLM

        logging.getLogger("vllm").setLevel(logging.ERROR)
        base, gpu = self._base(), torch.cuda.is_available()
        _loaded.add(self)
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # it seeds the global generators
                return LLM(
                    model=str(base),
                    dtype=self._dtype,
                    enable_lora=True,
                    max_lora_rank=next(size for size in RANKS if size >= self._rank),
                    max_loras=ADAPTERS,
                    max_model_len=self._max_tokens,
                    # Of the distribution that is drawn from, the temperature included, not of the raw logits.
                    logprobs_mode="processed_logprobs",
                    enforce_eager=not gpu,
                    disable_log_stats=True,
                    **({"gpu_memory_utilization": self.spec.gpu_memory} if gpu else {}),
                )
        except Exception as error:  # whatever a model, or a machine, is not served for
            why = first_line(error) or type(error).__name__
            raise RequestError(f"rollout.engine: vllm does not serve {base} ({why}); take hf") from error

    def serve(self, lm: LanguageModel, names: Iterable[str | None]) -> list[int | None]:
        """Make adapters, as they are on ``lm`` now, the ones that :meth:`sample` may name; those of before are gone.

        Each is written when the next of the ``names`` is taken, so that they may take turns on the model. Returns a
        version for each; None: of the base.
        """
        from moalign.lm import adapters

        before, self._served = self._served, []
        versions: list[int | None] = []
        for name in names:
            if name is not None:
                self._made += 1
                adapters.save(lm, self._place(self._made), name)
                self._served.append(self._made)
            versions.append(None if name is None else self._made)
        for old in before:
            self._unload(old)
        return versions

    def sample(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        versions: Sequence[int | None],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Samples:
        """Return a response to each tokenised prompt; row ``i`` is drawn with ``seeds[i]`` by ``versions[i]``.

        One call may mix adapters and the base. A row ends at any of ``lm.end_ids``. ``logps`` are vLLM's own, of the
        nucleus alone where ``top_p`` is below 1. Raises RequestError for an adapter that vLLM cannot serve.
        """
        llm = self.llm
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        ends = sorted(lm.end_ids)
        how = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                max_tokens=max_new_tokens,
                stop_token_ids=ends,
                ignore_eos=True,  # the end token is one of ``ends``, which stay in the response
                seed=seed,
                logprobs=0,  # of the drawn token alone
                detokenize=False,
            )
            for seed in seeds
        ]
        adapters = [
            None if version is None else LoRARequest(f"adapter-v{version}", version, str(self._place(version)))
            for version in versions
        ]
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            outputs = llm.generate(texts, how, lora_request=adapters, use_tqdm=False)
        except ValueError as error:
            raise RequestError(f"rollout.engine: vllm refuses the adapter ({first_line(error)}); take hf") from error
        return _samples(lm, prompts, [output.outputs[0] for output in outputs])

    def rollout(
        self, lm: LanguageModel, adapter: str, prompts: Sequence[Sequence[int]], numbers: Tensor, temperature: float
    ) -> Samples:
        """Return a response of an adapter, as it is now, to each tokenised prompt, by numbers ``[rows, T]``.

        As the sampler's they are in [0, 1), and T is the limit; the first of a row is its seed.
        """
        (version,) = self.serve(lm, [adapter])
        seeds = (numbers[:, 0].double() * 2**53).long().tolist()
        return self.sample(lm, prompts, seeds, [version] * len(prompts), numbers.shape[1], temperature)

    def close(self) -> None:
        """Let go of the base; should this sample again, it is loaded again."""
        _loaded.discard(self)
        llm = self.__dict__.pop("llm", None)
        if llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()

    def _place(self, version: int) -> Path:
        return Path(self._folder.name) / f"adapter-v{version}"

    def _unload(self, version: int) -> None:
        if "llm" in self.__dict__:
            self.llm.llm_engine.remove_lora(version)
        shutil.rmtree(self._place(version), ignore_errors=True)


def answers(
    engine: VllmEngine,
    generators: Sequence[OneModel],
    requests: Sequence[Sequence[tuple[str, int]]],
    sampling: Sampling,
    progress: Advance | None = None,
) -> list[Generated]:
    """Answer the requests (text, row) of each of several models, in batches that mix their adapters.

    All have the same base. Rows fix each response's randomness, whoever gives it. Log-probabilities of a nucleus, or of
    greedy answers, are not known (NaN).
    """
    from moalign.lm.sampler import keep, unknown

    lm = generators[0].as_model().lm
    versions = engine.serve(lm, (generator.as_model().adapter for generator in generators))
    flat = [(text, row, at) for at, part in enumerate(requests) for text, row in part]
    whole = unknown(lm, len(flat))
    for start in range(0, len(flat), sampling.batch_size * 4):
        part = flat[start : start + sampling.batch_size * 4]
        drawn = engine.sample(
            lm,
            lm.encode([text for text, _, _ in part], sampling.max_prompt_tokens),
            [derive(sampling.seed, row) for _, row, _ in part],
            [versions[at] for _, _, at in part],
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
        )
        if sampling.top_p < 1 or sampling.temperature == 0:
            drawn.logps.fill_(math.nan)
        keep(lm, drawn, whole, range(start, start + len(part)), sampling.stop)
        if progress is not None:
            progress(len(part))
    return _divided(whole, [len(part) for part in requests])


def _divided(whole: Generated, sizes: Sequence[int]) -> list[Generated]:
    """Return the parts of what several models answered; the tokens of each are those of its responses."""
    from moalign.lm.sampler import Generated

    parts, begin = [], 0
    for size in sizes:
        places = range(begin, begin + size)
        traces = None if whole.traces is None else whole.traces.at(places)
        parts.append(Generated([whole.responses[place] for place in places], 0, traces))
        begin += size
    if parts:
        parts[0].tokens = whole.tokens
    return parts


def _samples(lm: LanguageModel, prompts: Sequence[Sequence[int]], outputs: Sequence[Any]) -> Samples:
    """Return vLLM's outputs as tensors, aligned as the sampler's are."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from moalign.lm.sampler import Samples, pad_left

    rows = [[int(token) for token in output.token_ids] for output in outputs]
    known = [
        [float(place[token].logprob) for token, place in zip(row, output.logprobs, strict=True)]
        for row, output in zip(rows, outputs, strict=True)
    ]
    lengths = torch.tensor([len(row) for row in rows])
    response = (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).to(lm.device)

    def tensor(of: Sequence[Sequence[float]], dtype: Any, padding: float) -> Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in of]
        return pad_sequence(tensors, batch_first=True, padding_value=padding).to(lm.device)

    ids, mask = pad_left(prompts, lm.pad, lm.device)
    return Samples(
        input_ids=torch.cat([ids, tensor(rows, torch.long, lm.pad)], dim=1),
        attention_mask=torch.cat([mask, response.to(mask.dtype)], dim=1),
        response_mask=response,
        logps=tensor(known, torch.float32, 0.0),
        finished=torch.tensor([output.finish_reason == "stop" for output in outputs], device=lm.device),
    )
