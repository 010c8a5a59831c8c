"""Measures the peak memory of training on the CPU, phase by phase, beside what ``moalign check`` says of it.

Three models with random weights (0.1, 10 and 60 million parameters) are trained for a step each way: supervised, on
pairs, by PPO, and as experts that a small model mixes. Every measurement is a process of its own: the peak resident
memory while it trains (VmHWM) less what the process held when everything was imported and a model of 16 hidden units
had been trained. Prompts and rows are as long as the limits allow, as the estimate assumes.
Written beside this file: ``memory.md``.

    python results/bench/memory.py [--only SIZE/PHASE]...
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MOALIGN_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

HERE = Path(__file__).resolve().parent
WORDS = 8192
SIZES = {
    # name: (hidden, inner, layers, words), about 0.1, 10 and 60 million parameters
    "0.1M": (64, 160, 2, 512),
    "10M": (320, 864, 6, WORDS),
    "60M": (640, 1728, 11, WORDS),
    "none": (16, 24, 1, 256),
}
FEW = {"steps": 1, "batch": 8, "max_tokens": 40}
ONLINE = {"steps": 1, "batch": 8, "samples": 1, "micro_batch": 16}
PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("sft", FEW),
    "pairs": ("dpo-lw", {**FEW, "per_prompt": 1}),
    "PPO": ("moc", {**ONLINE, "groups": 2}),
    "mixture": ("pcm", {**ONLINE, "samples": 2, "experts": {**FEW, "batch": 2, "per_prompt": 1}}),
}
TASK = {
    "splits": {"train": 0.02, "calibration": 0.05, "eval": 0.93},
    "pool": {"prompts": 16, "per_prompt": 2, "calibration_per_prompt": 1},
    "generation": {"max_prompt_tokens": 20, "max_new_tokens": 20, "batch_size": 16},
    "evaluation": {"prompts": 8, "samples": 1, "bootstrap": 100},
    "grid": 2,
}
LORA = {"r": 16, "alpha": 32, "dropout": 0.0}


def build(folder: Path, size: str) -> Path:
    """Write a Llama with random weights that reads the sandbox's words, and made-up ones up to its vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moalign.tasks.sandbox.base import make_tokenizer

    hidden, inner, layers, words = SIZES[size]
    make_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"word{number}": number for number in range(len(vocabulary), words)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plan_of(size: str, phase: str, place: Path) -> Any:
    """Return the plan of a measured run; its results are in ``place``."""
    from moalign.experiment.arguments import setting_texts
    from moalign.experiment.train import TrainRequest, plan

    method, config = PHASES[phase]
    task = {**TASK, "model": str(place / "model")}
    sets = setting_texts({"config": config, "policy.lora": LORA})
    overrides = [*sets, *(f"task.{key}={json.dumps(value)}" for key, value in task.items())]
    return plan(TrainRequest(method, recipe=None, task="sandbox", overrides=overrides, results=place / "results"))


def status(name: str) -> int:
    """Return a line of this process's /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def settle() -> int:
    """Give back what is free, begin a new peak, and return what is held, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def prepare(size: str, phase: str, place: Path) -> Any:
    """Return the plan of a run whose model, and experts, are there."""
    from moalign.experiment import train

    model = place / "model"
    if not model.is_dir():
        model.mkdir(parents=True)
        build(model, size)
    plan = plan_of(size, phase, place)
    if phase == "mixture":  # its experts are runs of their own, measured as pairs
        train.train(train.expert_plan(plan, *plan.config.expert_runs(), [(1.0, 0.0), (0.0, 1.0)]))
    return plan_of(size, phase, place)


def measure(size: str, phase: str, place: Path) -> dict[str, Any]:
    """Train in this process; returns measured and estimated bytes."""
    from moalign.experiment import train
    from moalign.preflight import memory

    plan = prepare(size, phase, place)
    sizes = memory.sizes_of(str(plan.card.model))
    assert sizes is not None
    estimate = memory.estimate(plan, sizes, plan.method.capabilities)
    assert estimate.on_cpu
    before = settle()
    train.train(plan)
    measured = status("VmHWM") - before
    phases = [part for part in estimate.phases if part.name != "answering" and not part.name.startswith("experts")]
    peak = max(phases, key=lambda part: part.total)
    rest = peak.parts["rest"]
    return {
        "size": size, "phase": phase, "parameters": sizes.parameters, "held": before, "measured": measured,
        "least": peak.total - rest, "most": memory.upper(peak) - rest, "at": peak.name, "parts": peak.parts,
    }  # fmt: skip


def apart(size: str, phase: str, place: Path) -> dict[str, Any]:
    """Measure in a child of this process, which has imported everything."""
    answer = place / f"{size}-{phase}.json"
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 1)
        answer.write_text(json.dumps(measure(size, phase, place / f"{size}-{phase}")))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{size}/{phase} failed")
    measured: dict[str, Any] = json.loads(answer.read_text())
    return measured


def table(rows: list[dict[str, Any]]) -> str:
    """Return the measurements as Markdown."""
    lines = [
        "# Peak memory of training on the CPU: measured, and what `moalign check` says",
        "",
        "MB of resident memory above the interpreter with its libraries, which held "
        f"{min(row['held'] for row in rows) / 1e6:.0f} to {max(row['held'] for row in rows) / 1e6:.0f} MB. Llamas with "
        "random weights, float32, LoRA of rank 16, 8 rows of 40 tokens a step (16 of pairs and of the mixture), one "
        f"thread; {platform.system()} {platform.machine()}, Python {platform.python_version()}, torch "
        f"{metadata.version('torch')}, trl {metadata.version('trl')}. The least is what is in use by the sizes; the "
        "most is half as much again, which glibc's allocator may keep of what was freed, and 100 MB that libraries "
        "fill as they work. Made by `python results/bench/memory.py`.",
        "",
        "| parameters | training | measured | least | most | within | peak at |",
        "| ---: | :--- | ---: | ---: | ---: | :--- | :--- |",
    ]
    for row in rows:
        figures = " | ".join(f"{row[key] / 1e6:.0f}" for key in ("measured", "least", "most"))
        within = "yes" if row["least"] <= row["measured"] <= row["most"] else "no"
        lines.append(f"| {row['parameters'] / 1e6:.1f} M | {row['phase']} | {figures} | {within} | {row['at']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    from moalign.experiment import train

    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", default=[])
    options = parser.parse_args()
    wanted = [(size, phase) for size in ("0.1M", "10M", "60M") for phase in PHASES]
    wanted = [each for each in wanted if not options.only or "/".join(each) in options.only]
    with tempfile.TemporaryDirectory(prefix="moalign-memory-") as folder:
        place = Path(folder)
        for phase in ("supervised", "mixture"):
            train.train(prepare("none", phase, place / f"none-{phase}"))  # imports everything
        rows = []
        for size, phase in wanted:
            rows.append(apart(size, phase, place))
            print(json.dumps(rows[-1]), flush=True)
    if not options.only:
        (HERE / "memory.md").write_text(table(rows))


if __name__ == "__main__":
    main()
