"""Measures moalign on this machine's GPU in at most 20 minutes; run by ``make gpu-test``, after ``make llm``.

Every part is a process of its own with a time limit, and nothing needs a network: the limit of matrix multiplication;
methods of the task ``assistant`` on the built-in model (135 M parameters), and on one of the size of Llama-2-7B with
random weights, for memory and speed do not depend on what a model has learnt, by the settings that ``moalign check``
names for this card and, on a larger one, for 24 GB; vLLM against transformers, where vLLM is installed; and one
training to its end with its evaluation. Written beside this file, once: ``gpu-NAME.json``, with what could not be
measured and why. Without a CUDA device it ends with one message and exit code 2, and writes nothing.

    python results/bench/gpu.py [--out FOLDER] [--parts small,large,card24,vllm,training] [--shared]

With ``--parts`` only these are measured, and the others stay as the GPU's record has them. ``--shared`` says that
something else computes on the GPU: memory is measured, and no time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MINUTES = 20
GIB = 2**30
SMALL, LARGE = "smollm2-135m-instruct", "random weights in the shape of Llama-2-7B"
METHODS = ("mo-odpo", "moc", "modpo")
PARTS = ("small", "large", "card24", "vllm", "training")
LEAST_CARD = 24
"""GiB of the card that a 7B model is to be trained on, whatever card it is measured on."""
TIMES = ("tokens_generated_per_second", "tokens_trained_per_second", "seconds_per_step", "share_of_matmul")
"""The numbers of a method that mean nothing where the GPU is shared."""
FLOPS = 4
"""Operations for one parameter and token under LoRA: 2 forward, 2 backward to the activations; what is computed again
is not counted."""
HEADROOM = "rest"
"""The part of an estimate that torch does not allocate: context and fragmentation."""


class Failed(Exception):
    """A part that gave no numbers; the message says why."""


class Parts:
    """Runs the parts as processes, none of them beyond the time that is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def json(self, *arguments: str, limit: float = 600.0) -> dict[str, Any]:
        """Return the JSON object that a command prints; raises Failed with its last message when it gives none."""
        seconds = min(limit, self._end - time.monotonic())
        if seconds <= 0:
            raise Failed(f"no time left of {MINUTES} minutes")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A session of its own: what it started ends with it.
        process = subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"not finished within {seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        try:
            content = json.loads(out)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            lines = [line for line in err.splitlines() if line.strip()]
            raise Failed(lines[-1] if lines else f"ended with code {process.returncode} and no result")
        return content

    def moalign(self, *arguments: str, limit: float = 600.0) -> dict[str, Any]:
        """Return what a ``moalign ... --json`` prints."""
        return self.json(sys.executable, "-m", "moalign", *arguments, "--json", limit=limit)

    def inside(self, *arguments: str, limit: float = 300.0) -> dict[str, Any]:
        """Return what this file prints with a hidden option."""
        return self.json(sys.executable, str(Path(__file__).resolve()), *arguments, limit=limit)


# -- the parts ---------------------------------------------------------------------------------------------------------


def rows_of(
    parts: Parts,
    name: str,
    sets: Sequence[str],
    device: dict[str, Any],
    methods: Sequence[str] = METHODS,
    steps: int = 6,
) -> list[dict[str, Any]]:
    """Return a row for each method on one model: memory beside its estimate, tokens a second, share of the limit.

    Args:
        sets: settings of the task and of every method, ``--set`` before each.
    """
    measured = parts.moalign("bench", *methods, "--task", "assistant", *sets, "--steps", str(steps), limit=420)
    needs = ["--set", f"needs.gpu={device['gpu']}", "--set", f"needs.gpu_memory_gib={card_of(device):.1f}"]
    done = [row["method"] for row in measured["rows"] if row["status"] == "done"]
    with ThreadPoolExecutor() as pool:  # after what is timed
        checks = pool.map(
            lambda method: parts.moalign("check", f"assistant/{method}", *sets, *needs, limit=120)["memory"], done
        )
        memory = dict(zip(done, checks, strict=True))
    rows = []
    for bench in measured["rows"]:
        row = {"model": name, "method": bench["method"]}
        if bench["status"] != "done":
            rows.append({**row, "failed": bench["error"]})
        else:
            rows.append({**row, **numbers(bench, memory[bench["method"]], device["matmul_flops"])})
    return rows


def fitted(parts: Parts, folder: Path, device: dict[str, Any], gib: float, methods: Sequence[str]) -> list[Any]:
    """Return the rows of a model by the settings that ``check`` names for a card of ``gib``; equal ones together."""
    model = ("--set", f"task.model={folder}", "--set", "task.dtype=bfloat16")

    def settings_of(method: str) -> tuple[str, ...]:
        told = parts.moalign("check", f"assistant/{method}", *model, "--gpu", f"{gib:g}GB", limit=120)
        (card,) = told["cards"]
        return tuple(f"{name}={str(value).lower()}" for name, value in (card["settings"] or {}).items())

    with ThreadPoolExecutor() as pool:
        alike: dict[tuple[str, ...], list[str]] = {}
        for method, settings in zip(methods, pool.map(settings_of, methods), strict=True):
            alike.setdefault(settings, []).append(method)
    rows: list[Any] = []
    for settings, group in alike.items():
        sets = [*model, *(part for text in settings for part in ("--set", text))]
        found = rows_of(parts, LARGE, sets, device, group, steps=4)
        rows += [{**row, "card_gib": gib, "settings": list(settings)} for row in found]
    return rows


def card_of(device: dict[str, Any]) -> float:
    """Return the GiB of a GPU."""
    return float(device["memory_bytes"]) / GIB


def estimated(memory: dict[str, Any]) -> tuple[float, str]:
    """Return the GiB that torch is to allocate at most, as ``check`` estimates them, and in which phase."""
    phase = max(memory["phases"], key=lambda each: float(each["total_gib"]))
    return phase["total_gib"] - phase["parts_gib"].get(HEADROOM, 0.0), phase["phase"]


def numbers(bench: dict[str, Any], memory: dict[str, Any], matmul: float) -> dict[str, Any]:
    """Return the numbers of one method: ``bench`` and ``memory`` as ``moalign bench`` and ``check`` print them."""
    estimate, _ = estimated(memory)
    peak, trained = bench["peak_gpu_bytes"], bench["tokens_trained_per_second"]
    return {
        "peak_gib": None if peak is None else peak / GIB,
        "estimate_gib": estimate,
        "peak_over_estimate": None if peak is None else peak / GIB / estimate,
        "tokens_generated_per_second": bench["tokens_generated_per_second"],
        "tokens_trained_per_second": trained,
        "seconds_per_step": bench["seconds_per_step"],
        "share_of_matmul": None if trained is None else trained * FLOPS * memory["parameters"] / matmul,
    }


def side_by_side(parts: Parts) -> dict[str, Any]:
    """Return tokens a second of vLLM and of transformers on the same prompts, and how far log-probabilities differ."""
    if importlib.util.find_spec("vllm") is None:
        return {"not_measured": "vLLM is not installed"}
    engines = {name: parts.inside("--engine", name) for name in ("transformers", "vllm")}
    of = [[value for row in numbers["logps"] for value in row] for numbers in engines.values()]
    gaps = [abs(a - b) for a, b in zip(*of, strict=True)]
    speed = {name: numbers["tokens_per_second"] for name, numbers in engines.items()}
    return {
        "tokens_per_second": speed,
        "ratio": speed["vllm"] / speed["transformers"],
        "mean_logp_gap": sum(gaps) / len(gaps),
        "max_logp_gap": max(gaps),
    }


def training(parts: Parts, folder: Path) -> dict[str, Any]:
    """Train MO-ODPO on ``assistant`` by its recipe and evaluate it; return what it took and reached."""
    told = parts.moalign("train", "mo-odpo", "--task", "assistant", "--results", str(folder), limit=480)
    evaluation = told["evaluation"]
    return {
        "method": told["method"],
        "task": told["task"],
        "seconds": told["seconds"],
        "cost": told["cost"],
        "hypervolume": evaluation["hypervolume"],
        "hypervolume_ci": evaluation["hypervolume_ci"],
        "tau": evaluation["indicators"]["tau"],
        "collapsed": evaluation["quality"]["rate"],
    }


def record_of(
    parts: Parts, device: dict[str, Any], folder: Path, asked: Sequence[str] = PARTS, shared: bool = False
) -> dict[str, Any]:
    """Return what was measured; a part that fails says so in its place, and the others go on."""

    @functools.cache
    def large() -> Path:
        parts.inside("--make", str(folder / "large"))
        return folder / "large"

    def on_small() -> list[dict[str, Any]]:
        return rows_of(parts, SMALL, ["--set", "task.dtype=bfloat16"], device)

    def on_24() -> Any:
        if card_of(device) < 1.5 * LEAST_CARD:
            return {"not_measured": f"the part large is of a card of {card_of(device):.0f} GiB"}
        return fitted(parts, large(), device, LEAST_CARD, METHODS[:1])

    measures: dict[str, tuple[str, Callable[[], Any]]] = {
        "small": ("methods on the built-in model", on_small),
        "large": (
            "methods on a model of 7B parameters",
            lambda: fitted(parts, large(), device, card_of(device), METHODS),
        ),
        "card24": ("a model of 7B parameters as on a card of 24 GB", on_24),
        "vllm": ("vLLM against transformers", lambda: side_by_side(parts)),
        "training": ("one training to its end", lambda: training(parts, folder / "results")),
    }
    record: dict[str, Any] = {"device": device, "measured": {}, "seconds": {}}
    for name in asked:
        (title, measure), started = measures[name], time.monotonic()
        print(f"{title} ...", file=sys.stderr, flush=True)
        try:
            record[name] = untimed(measure()) if shared else measure()
        except Failed as error:
            print(f"{title}: {error}", file=sys.stderr, flush=True)
            record[name] = {"failed": str(error)}
        record["measured"][name] = datetime.now(UTC).strftime("%Y-%m-%d")
        record["seconds"][name] = round(time.monotonic() - started, 1)
    return record


def merged(before: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return a GPU's record with the parts of ``before`` that were not measured again; each has its own day."""
    of_parts = {name: {**before[name], **record[name]} for name in ("measured", "seconds")}
    return {**before, **record, **of_parts}


def untimed(measured: Any) -> Any:
    """Return a part without its times: something else computed on the GPU."""
    if isinstance(measured, list):
        return [{**row, **{name: None for name in TIMES if name in row}, "shared": True} for row in measured]
    return measured if "not_measured" in measured else {"not_measured": "the GPU was shared"}


def failures(record: dict[str, Any]) -> list[str]:
    """Return what could not be measured, in lines."""
    lines = []
    for name, value in record.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and "failed" in each:
                lines.append(f"{name}{' ' * ('method' in each)}{each.get('method', '')}: {each['failed']}")
    return lines


# -- inside a process of its own: the only places that import torch ----------------------------------------------------


def inside_device() -> dict[str, Any]:
    """Return the GPU, and how many operations a second it does in one large product in bfloat16."""
    import torch

    if not torch.cuda.is_available():
        return {}
    size, rounds = 8192, 20
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for at in range(rounds + 5):  # the first ones wake it up
        if at == 5:
            torch.cuda.synchronize()
            started = time.perf_counter()
        a @ b
    torch.cuda.synchronize()
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name,
        "memory_bytes": about.total_memory,
        "matmul_flops": 2 * size**3 * rounds / (time.perf_counter() - started),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def inside_make(folder: Path) -> dict[str, Any]:
    """Write a model of about seven billion parameters, random, with the built-in model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from moalign.lm import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder.resolve(SMALL, None, "model"))
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    roomy = torch.cuda.get_device_properties(0).total_memory > 20 * GIB
    with torch.device("cuda" if roomy else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": model.num_parameters()}


def inside_engine(name: str, count: int = 64, length: int = 128) -> dict[str, Any]:
    """Sample ``count`` answers of ``length`` tokens in one call, and score the prompts' own tokens, by one engine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moalign.lm import model_folder

    folder = str(model_folder.resolve(SMALL, None, "model"))
    lines = (HERE.parents[1] / "recipes/assistant/questions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines[:count]]
    ids = AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False)["input_ids"]
    if name == "vllm":
        from vllm import LLM, SamplingParams

        llm = LLM(model=folder, dtype="bfloat16", gpu_memory_utilization=0.5)
        prompts = [{"prompt_token_ids": row} for row in ids]
        scored = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
        logps = [
            [float(step[token].logprob) for token, step in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
            for row, output in zip(ids, scored, strict=True)
        ]
        started = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=length, min_tokens=length, ignore_eos=True))
        return {"tokens_per_second": count * length / (time.perf_counter() - started), "logps": logps}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").eval()
    with torch.inference_mode():
        logps = []
        for row in ids:
            all_logps = model(torch.tensor([row], device="cuda")).logits[0, :-1].float().log_softmax(-1)
            logps.append(all_logps.gather(1, torch.tensor(row[1:], device="cuda")[:, None])[:, 0].tolist())
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device="cuda")
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device="cuda")
        lengths = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "pad_token_id": 0}
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(padded, attention_mask=mask, **lengths)
        torch.cuda.synchronize()
    return {"tokens_per_second": count * length / (time.perf_counter() - started), "logps": logps}


def parts_of(text: str) -> list[str]:
    """Read ``--parts``."""
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"found {name!r}; allowed: {', '.join(PARTS)}, separated by commas")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure moalign on this machine's GPU, in at most 20 minutes.")
    parser.add_argument("--out", type=Path, default=HERE, help="where gpu-NAME.json is written")
    parser.add_argument("--parts", type=parts_of, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--shared", action="store_true", help="the GPU computes something else: no times")
    for hidden in ("--make", "--engine"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--device", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.device or asked.make or asked.engine:
        output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no result
        content = inside_device() if asked.device else inside_make(Path(asked.make)) if asked.make else None
        print(json.dumps(inside_engine(asked.engine) if content is None else content), file=output, flush=True)
        return 0
    from moalign.lm import builtin
    from moalign.runs import atomic

    parts = Parts(MINUTES * 60 - 30)
    try:
        device = parts.inside("--device")
    except Failed as error:
        print(f"error: the GPU cannot be used: {error}", file=sys.stderr)
        return 2
    if not device:
        print("error: no CUDA device here; make gpu-test measures one (torch sees none)", file=sys.stderr)
        return 2
    if builtin.installed(SMALL) is None and builtin.converted(SMALL) is None:
        print(f"error: the built-in model {SMALL} is not installed; make llm brings it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="moalign-gpu-") as folder:
        record = record_of(parts, device, Path(folder), asked.parts, asked.shared)
    name = re.sub(r"[^a-z0-9]+", "-", device["gpu"].lower()).strip("-")
    path = asked.out / f"gpu-{name}.json"
    if path.is_file():  # of the parts that were not asked for
        record = merged(atomic.read_json(path, "remove it"), record)
    atomic.write_json(path, record)
    print(path)
    lines = failures(record)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
