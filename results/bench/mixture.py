"""What a mixture of three experts costs beside its experts alone, and what PCM's control model adds to it.

32 prompts at once, three random LoRA adapters of the recipe's rank on one base, every answer of the same number of
tokens (ends are switched off). In one process and in turns: the experts one after another, both static mixtures, and
mixtures with a control model; then each in a process of its own for its peak memory. On the sandbox's base and, where
it is installed (``make llm``), on the real language model. Written beside this file: ``mixture.json`` and
``mixture.md``.

    python results/bench/mixture.py [--repeats N] [--tokens N] [--rows N] [--only sandbox-3|assistant-3] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TASKS = {"sandbox-3": "the sandbox's base", "assistant-3": "the real language model"}
TOKENS = {"sandbox-3": 24, "assistant-3": 16}
"""Tokens of every answer."""
REPEATS = {"sandbox-3": 9, "assistant-3": 2}
"""Rounds of all works."""
ROWS, EXPERTS = 32, 3
MEMORY_ROWS = 8
"""Rows of the works whose memory is measured."""
SPREAD = 0.02
"""Standard deviation of the entries of the adapters' B, which an untrained adapter has at 0."""
WORKS = {
    "single": "one expert",
    "singles": "the experts, one after another",
    "probability": "mixed in probability space, constant weights",
    "logit": "mixed in logit space, constant weights (MOD)",
    "small": "mixed in probability space, control model `form: small` (PCM)",
    "adapter": "mixed in probability space, control model `form: adapter`",
}
GOALS = {"mixture": 1.2, "control": 0.15}
"""Promised: a static mixture over the experts one after another; the small control model's share on a real model."""
PAPER = {"probability": 10.48, "logit": 13.25}
"""Seconds a request at 32 at once in arXiv 2407.04181; its rival mixes in logit space."""


class Bench:
    """A task's base with three random experts; ``work(kind)`` answers all prompts once."""

    def __init__(self, task: str, tokens: int, rows: int, results: Path) -> None:
        """Load the base of ``task``; adapters come with the first work that needs them."""
        import torch

        from moalign.experiment.train import TrainRequest, plan
        from moalign.lm.sampler import uniforms

        made = plan(TrainRequest("pcm", task=task, results=results))
        self.config, self.lora, renderer = made.config, made.recipe.policy.lora, made.task.renderer
        lm = made.task.language_model
        self.lm = replace(lm, end_ids=frozenset({-1}))
        prompts = [made.task.prompts["train"][row % len(made.task.prompts["train"])] for row in range(rows)]
        torch.manual_seed(0)
        self.weights = torch.distributions.Dirichlet(torch.ones(EXPERTS)).sample((rows,)).to(lm.device)
        limit = made.card.generation.max_prompt_tokens
        self.bare = lm.encode([renderer.plain(prompt) for prompt in prompts], limit)
        wanted = zip(prompts, self.weights.tolist(), strict=True)
        self.with_preference = lm.encode([renderer.preference(prompt, w) for prompt, w in wanted], limit)
        self.numbers = uniforms(0, range(rows), tokens)
        self.names: list[str] = []
        self._kept: dict[str, Any] = {}

    def attach(self, count: int) -> None:
        """Put so many experts on the base."""
        import torch

        from moalign.lm import adapters

        for index in range(len(self.names), count):
            name = f"expert_{index}"
            adapters.attach(self.lm, self.lora, index, name)
            for key, value in self.lm.model.named_parameters():
                if f".{name}." in key and "lora_B" in key:
                    torch.nn.init.normal_(value, std=SPREAD)
            self.names.append(name)
        self.lm.model.eval().requires_grad_(False)

    def work(self, kind: str, rows: int | None = None) -> None:
        """Answer the first ``rows`` prompts; what serves again (stacked adapters, the control model) is made once."""
        from moalign.lm.adapters import merged
        from moalign.lm.mixture import Constant, Mixture
        from moalign.lm.sampler import NextToken, sample
        from moalign.policies.controlled import source

        bare, numbers, weights = self.bare[:rows], self.numbers[:rows], self.weights[:rows]
        self.attach(1 if kind == "single" else EXPERTS)
        if kind in ("single", "singles"):
            for name in self.names[: 1 if kind == "single" else EXPERTS]:
                self.lm.model.set_adapter(name)
                with merged(self.lm):
                    sample(self.lm, bare, numbers)
        elif kind in ("probability", "logit"):
            mixture = Mixture(NextToken(self.together), EXPERTS, Constant(weights), kind)  # type: ignore[arg-type]
            sample(self.lm, bare, numbers, source=mixture)
        else:
            control = self.control(kind)
            control.activate()
            mixture = source(control, self.together, "probability", bare, weights)
            sample(self.lm, self.with_preference[:rows], numbers, source=mixture)

    @property
    def together(self) -> Any:
        from moalign.lm.side_by_side import SideBySide

        if "together" not in self._kept:
            self._kept["together"] = SideBySide(self.lm, self.names)
        return self._kept["together"]

    def control(self, form: str) -> Any:
        """Return the control model of a form, made at first use; the small one has the recipe's size."""
        from moalign.policies.control import Control
        from moalign.policies.control_spec import ControlSpec

        if form not in self._kept:
            spec = self.config.control if form == "small" else ControlSpec(form="adapter", lora=self.lora)
            self._kept[form] = Control(spec, self.lm, EXPERTS, seed=0).eval().requires_grad_(False)
        return self._kept[form]

    def by_hand(self) -> dict[str, int]:
        """Return bytes of one expert's adapter and cache, of the layers it changes, and of one step's logits."""
        from moalign.lm.adapters import MERGE_BELOW, lora_layers

        self.attach(1)
        config, width = self.lm.model.config, self.lm.model.dtype.itemsize
        adapter = [value for key, value in self.lm.model.named_parameters() if f".{self.names[0]}." in key]
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        length = max(map(len, self.bare)) + self.numbers.shape[1]
        in_adapter = sum(value.numel() * value.itemsize for value in adapter)
        small = self.lm.model.num_parameters() <= MERGE_BELOW
        folded = sum(layer.get_base_layer().weight.numel() * width for layer in lora_layers(self.lm))
        return {
            "adapter": in_adapter,
            "side by side": folded if small else in_adapter,
            "cache": len(self.bare) * length * config.num_hidden_layers * 2 * config.num_key_value_heads * head * width,
            "logits": len(self.bare) * config.vocab_size * 4,
        }


def seconds(task: str, tokens: int, rows: int, repeats: int) -> dict[str, Any]:
    """Return medians of each work's seconds, and of the ratios within a round, which the load touches alike."""
    with tempfile.TemporaryDirectory() as results:
        bench = Bench(task, tokens, rows, Path(results))
        kinds = [kind for kind in WORKS if kind != "single"]
        for kind in kinds:  # stacks the adapters, makes the control models
            bench.work(kind, 2)
        wall: dict[str, list[float]] = {kind: [] for kind in kinds}
        cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(repeats):
            for kind in kinds:
                began, started = time.process_time(), time.perf_counter()
                bench.work(kind)
                wall[kind].append(time.perf_counter() - started)
                cpu[kind].append(time.process_time() - began)

    def ratio(above: str, below: str, times: dict[str, list[float]] = wall) -> float:
        pairs = zip(times[above], times[below], strict=True)
        return round(statistics.median(numerator / denominator for numerator, denominator in pairs), 3)

    return {
        "rows": rows,
        "tokens": tokens,
        "prompt_tokens": {"experts": max(map(len, bench.bare)), "control": max(map(len, bench.with_preference))},
        "parameters": _parameters(bench),
        "lora_rank": bench.lora.r,
        "repeats": repeats,
        "seconds": {kind: round(statistics.median(each), 3) for kind, each in wall.items()},
        "ratio": {kind: ratio(kind, "singles") for kind in kinds if kind != "singles"},
        "ratio_of_cpu": {kind: ratio(kind, "singles", cpu) for kind in kinds if kind != "singles"},
        "control_share": {form: round(ratio(form, "probability") - 1, 3) for form in ("small", "adapter")},
        "control_share_of_cpu": {form: round(ratio(form, "probability", cpu) - 1, 3) for form in ("small", "adapter")},
    }


def _parameters(bench: Bench) -> dict[str, int]:
    base = sum(value.numel() for key, value in bench.lm.model.named_parameters() if "lora_" not in key)
    small, adapter = (sum(v.numel() for v in bench.control(form).trainable()) for form in ("small", "adapter"))
    return {"base": base, "small": small, "adapter": adapter}


# -- memory --------------------------------------------------------------------------------------------------------


def memory(task: str, tokens: int) -> dict[str, Any] | None:
    """Return by how many bytes each work's peak grows over the loaded base, each in a fresh process; None off Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    grown, by_hand = {}, {}
    for kind in ("single", "probability", "logit", "small"):
        command = [sys.executable, str(Path(__file__).resolve()), "--memory", task, kind, "--tokens", str(tokens)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(done.stdout)
        grown[kind], by_hand = measured["grown"], measured["by_hand"]
    each = by_hand["adapter"] + by_hand["cache"]
    expected = (EXPERTS - 1) * each + EXPERTS * by_hand["side by side"]
    return {"grown": grown, "by_hand": by_hand, "adapters_and_caches": expected}


def inside_memory(task: str, kind: str, tokens: int) -> dict[str, Any]:
    """Return the growth of this process's peak while it answers."""
    with tempfile.TemporaryDirectory() as results:
        bench = Bench(task, tokens, MEMORY_ROWS, Path(results))
        by_hand = bench.by_hand()  # attaches an expert: peft wraps the base, which is no part of the answer's memory
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        bench.work(kind)
        return {"grown": _status("VmHWM") - before, "by_hand": by_hand}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# -- the page ------------------------------------------------------------------------------------------------------


def page(record: dict[str, Any]) -> str:
    """Return the numbers as Markdown."""
    here = record["machine"]
    lines = [
        "# What a mixture costs",
        "",
        "Made by `python results/bench/mixture.py`. Three random LoRA adapters on one base, answers of equal length",
        "(ends switched off), sampled at temperature 1; the works take turns in one process, so that ratios hold on a",
        "busy machine where seconds do not.",
        f"Machine: {here['cpu']}, {here['cores']} cores, Python {here['python']}, torch {here['packages']['torch']}, "
        f"measured {here['measured']}, load before {here['load_before'][0]}.",
    ]
    for task, numbers in record["tasks"].items():
        lines += ["", f"## {TASKS[task][0].upper()}{TASKS[task][1:]} (task `{task}`)", ""]
        lines += _section(task, numbers) if "seconds" in numbers else [f"Left out: {numbers['left_out']}."]
    return "\n".join([*lines, "", *_beside_the_paper(record["tasks"])]) + "\n"


def _section(task: str, numbers: dict[str, Any]) -> list[str]:
    size, read = numbers["parameters"], numbers["prompt_tokens"]
    lines = [
        f"{size['base']:,} parameters, LoRA rank {numbers['lora_rank']}; prompts of up to {read['experts']} tokens "
        f"(the control model's: {read['control']}), answers of {numbers['tokens']}; medians of {numbers['repeats']}.",
        f"Control models: small {size['small']:,} parameters, adapter {size['adapter']:,}.",
        "",
        f"| answered by | seconds for {numbers['rows']} rows | over the experts in turn | in CPU time | promised |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, value in numbers["seconds"].items():
        ratios = [f"{numbers[by].get(kind, 1):.2f}" for by in ("ratio", "ratio_of_cpu")]
        goal = f"<= {GOALS['mixture']:g}" if kind in ("probability", "logit") else ""
        lines.append(f"| {WORKS[kind]} | {value:.2f} | {' | '.join(ratios)} | {goal} |")
    share, cpu = numbers["control_share"], numbers["control_share_of_cpu"]
    promised = f"; promised <= {GOALS['control']:.0%} for the small one" if task == "assistant-3" else ""
    lines += [
        "",
        f"To the static mixture the control model adds {share['small']:+.1%} (small; {cpu['small']:+.1%} in CPU time), "
        f"{share['adapter']:+.1%} (adapter, a fourth pass of the base; {cpu['adapter']:+.1%}){promised}.",
    ]
    return lines + ([] if numbers["memory"] is None else _memory(numbers["memory"]))


def _memory(numbers: dict[str, Any]) -> list[str]:
    hand, grown = numbers["by_hand"], numbers["grown"]
    beyond = {kind: value - grown["single"] for kind, value in grown.items() if kind != "single"}

    def mib(value: float) -> str:
        return f"{value / 2**20:.1f}"

    measured = ", ".join(f"{kind} {mib(value)}" for kind, value in beyond.items())
    return [
        "",
        f"Peak memory beyond that of one expert, MiB ({MEMORY_ROWS} rows, each in a process of its own): {measured}.",
        f"By hand, adapters and caches: {mib(numbers['adapters_and_caches'])}, of which two more adapters "
        f"({mib(hand['adapter'])} each), two more caches ({mib(hand['cache'])} each) and three stacked copies "
        f"({mib(hand['side by side'])} each).",
        f"The rest passes with each read: activations, and logits of {mib(hand['logits'])} an expert in a few arrays.",
    ]


def _beside_the_paper(tasks: dict[str, Any]) -> list[str]:
    ours = []
    for name, numbers in tasks.items():
        if "seconds" in numbers:
            pcm, static = numbers["seconds"]["small"], numbers["seconds"]["logit"]
            how = f"{numbers['rows']} rows at once, answers of {numbers['tokens']} tokens"
            ours.append(f"{name} {pcm:.2f} s against {static:.2f} s (ratio {pcm / static:.2f}; {how})")
    return [
        "## Beside the paper",
        "",
        f"arXiv 2407.04181 reports {PAPER['probability']} s a request for PCM against {PAPER['logit']} s for the rival "
        f"that mixes in logit space, at 32 requests at once (ratio {PAPER['probability'] / PAPER['logit']:.2f}).",
        f"Ours, PCM with the small control model against the static mixture in logit space: {'; '.join(ours)}.",
        "Seconds cannot be compared: the paper's experts are whole models of billions of parameters on GPUs, with",
        "longer answers, and its rival is another method's code; ours are adapters of one small base on a CPU, and",
        "both mixtures share all code but the sum, which the control model's own work makes the slower one here.",
    ]


def measure(task: str, tokens: int | None, rows: int, repeats: int | None) -> dict[str, Any]:
    """Return one task's numbers, or why there are none."""
    from moalign.lm import builtin

    model = "smollm2-135m-instruct"
    if task == "assistant-3" and builtin.converted(model) is None and builtin.installed(model) is None:
        return {"left_out": f"the model is not installed: {builtin.MODELS[model].command}"}
    count = tokens or TOKENS[task]
    return {**seconds(task, count, rows, repeats or REPEATS[task]), "memory": memory(task, count)}


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, help="rounds of all works; else the task's number")
    parser.add_argument("--rows", type=int, default=ROWS, help="prompts at once")
    parser.add_argument("--tokens", type=int, help="tokens of every answer; else the task's number")
    parser.add_argument("--only", choices=list(TASKS), help="one task")
    parser.add_argument("--out", type=Path, default=HERE, help="where mixture.json and mixture.md are written")
    parser.add_argument("--memory", nargs=2, metavar=("TASK", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.memory:
        print(json.dumps(inside_memory(*options.memory, options.tokens)))
        return
    from bench import machine  # beside this file; its own packages are those of the project

    record: dict[str, Any] = {"machine": machine(), "tasks": {}}
    for task in [options.only] if options.only else TASKS:
        started = time.perf_counter()
        record["tasks"][task] = measure(task, options.tokens, options.rows, options.repeats)
        print(f"{task}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mixture.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.out / "mixture.md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
