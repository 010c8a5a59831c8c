"""The speed of training and sampling beside trl and transformers: the same prompts, lengths and batch, in one process.

Measured in turns, so that all meet the same load of the machine; medians of ratios. Every answer has as many tokens as
it may (online), or a number drawn for it (sampling), whoever makes it; scores are random numbers on both sides.

- online: a step of MO-ODPO, sampling included, and one of trl's OnlineDPOTrainer, with LoRA on the same base, at the
  task's own prompts; online_long: at prompts of ``--prompt`` tokens, or as many as the card allows, several joined;
- pairs: a step of MODPO, and one of trl's DPOTrainer, the reference's log-probabilities precomputed on both sides;
- sampling: the sampler as rollouts and evaluations use it (the adapter is folded in where the model is tiny), and
  ``generate`` of transformers on the same model and adapter, at a spread of lengths;
- updates: MOC's update over PPO's with one reward (``steps.py``), on the sandbox.

Ours is measured plain and with ``share_prompts`` and ``group_by_length``; how far their losses are apart is said, too.
Written beside this file: ``speed.json`` and ``speed.md``.

    python results/bench/speed.py [--task assistant] [--repeats N] [--batch N] [--tokens N] [--prompt N] [--response N]
        [--only PART]... [--out FOLDER]

The smallest run: ``--task sandbox --repeats 1 --batch 2 --tokens 4 --prompt 12 --response 6 --out FOLDER``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

HERE = Path(__file__).resolve().parent
GOALS = {"online": 2.0, "online_long": 2.0, "pairs": 1.7, "sampling": 1.5}
"""Promised: how many times as fast as the library. The update of MOC over PPO's: at most 1.1."""
WHAT = {
    "online": "a step of MO-ODPO over one of trl's OnlineDPOTrainer",
    "online_long": "the same at longer prompts",
    "pairs": "a step of MODPO over one of trl's DPOTrainer",
    "sampling": "answers over `generate`",
}
SHARED = {"share_prompts": True, "group_by_length": True}
Step = Callable[[], float]
"""Makes one step and returns its loss, or the number of tokens."""


def job_of(method: str, options: argparse.Namespace, results: Path, **config: Any) -> Any:
    """Return a job of a method with the task's recipe, adapters attached."""
    from moalign.experiment.train import TrainRequest, plan
    from moalign.lm import adapters
    from moalign.runs.meter import Meter

    made = plan(TrainRequest(method, task=options.task, results=results))
    job = made.job(made.open(), Meter())
    never = {"steps": 10**6, "log_every": 10**6, "checkpoint_every": 10**6, "warmup": 0, "schedule": "constant"}
    job.config = job.config.model_copy(update={**never, **config})
    adapters.attach(job.task.language_model, job.policy_spec.lora, job.seed)
    return job


def in_turns(steps: dict[str, Step], repeats: int) -> dict[str, Any]:
    """Return seconds by name, and what each step returned; the first round warms the allocator."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    values: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            values[name].append(step())
            seconds[name].append(time.perf_counter() - started)
    kept = {name: each[1:] for name, each in seconds.items()}
    each_round = {
        name: [b / a for a, b in zip(kept[name], kept["library"], strict=True)] for name in steps if name != "library"
    }
    ratios = {name: round(statistics.median(values), 3) for name, values in each_round.items()}
    rounds = {name: [round(value, 2) for value in values] for name, values in each_round.items()}
    middle = {name: round(statistics.median(each), 4) for name, each in kept.items()}
    return {"seconds": middle, "times_as_fast": ratios, "rounds": rounds, "values": values}


def descend(parameters: list[Any], optimizer: Any) -> None:
    """Clip and make one update."""
    import torch

    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# -- online ------------------------------------------------------------------------------------------------------------


def online(options: argparse.Namespace, place: Path, prompt: int | None = None) -> dict[str, Any]:
    """Time whole steps: two answers to each prompt, scores, reference, loss, update; prompts of that many tokens."""
    import torch

    from moalign.core.seeds import derive
    from moalign.lm.language_model import set_threads

    steps: dict[str, Step] = {}
    for name, more in {"plain": {}, "shared": SHARED}.items():
        size = {"batch": options.batch, "samples": 2, "micro_batch": 2 * options.batch, "epochs": 1}
        job = job_of("mo-odpo", options, place, **size, temperature=0.7, lr=0.0, **more)
        bound_answers(job, options.tokens)
        if prompt is not None:
            lengthen_prompts(job, prompt, 4 * options.batch)
        move(job)
        steps[name] = ours_online(job)
        prompts = job.task.prompts["train"]
    mean = statistics.mean(len(row) for row in job.task.language_model.encode(prompts_read(job, prompts), 4096))
    set_threads(job.task.language_model.model.num_parameters())
    step, base = trl_online(job_of("mo-odpo", options, place), prompts, options, place)
    steps["library"] = step
    torch.manual_seed(derive(0, "speed"))
    measured = in_turns(steps, options.repeats)
    values = measured.pop("values")
    apart = max(abs(a - b) for a, b in zip(values["plain"], values["shared"], strict=True))
    sizes = {"prompts": options.batch, "prompt": round(mean), "tokens": options.tokens}
    return {**measured, "losses_apart": apart, **sizes, "base": base}


def online_long(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Time the same steps at prompts of ``--prompt`` tokens."""
    return online(options, place, options.prompt)


def prompts_read(job: Any, prompts: list[str]) -> list[str]:
    """Return prompts with their preference, half for the first objective, as both sides read them."""
    others = len(job.task.names) - 1
    weights = [0.5, *[0.5 / others] * others]
    return [str(job.task.renderer.preference(prompt, weights)) for prompt in prompts]


def lengthen_prompts(job: Any, tokens: int, count: int) -> None:
    """Give the job ``count`` prompts to train on, each of as many of the task's as make ``tokens`` tokens or more.

    Both sides read them cut to the card's limit, if that is less.
    """
    lm, known = job.task.language_model, job.task.prompts["train"]
    made = []
    for at in range(count):
        joined = str(known[at % len(known)])
        for more in range(1, tokens):
            if len(lm.encode(prompts_read(job, [joined]), 4096)[0]) >= tokens:
                break
            joined += " " + known[(at + more * count) % len(known)]
        made.append(joined)
    job.task.prompts = {**job.task.prompts, "train": made}


def move(job: Any) -> None:
    """Add the same noise to the adapter each time: where policy and reference agree, every loss is log 2."""
    import torch

    from moalign.lm import adapters

    noise, lm = torch.Generator().manual_seed(0), job.task.language_model
    weights = adapters.tensors(lm).items()
    adapters.set_tensors(lm, {name: w + 0.01 * torch.randn(w.shape, generator=noise) for name, w in weights})


def bound_answers(job: Any, tokens: int) -> None:
    """Make every answer ``tokens`` long."""
    job.task.card = job.task.card.model_copy(
        update={"generation": job.task.card.generation.model_copy(update={"max_new_tokens": tokens, "stop": ()})}
    )
    job.task.language_model.end_ids = frozenset({-1})


def ours_online(job: Any) -> Step:
    """Return steps of MO-ODPO's own loop."""
    import numpy as np

    from moalign.methods import mo_odpo
    from moalign.training.online import OnlineTrainer
    from moalign.training.preference_draws import independent

    config, names, rng = job.config, job.task.names, np.random.default_rng(0)
    trainer = OnlineTrainer(job, job.task.language_model, config, independent(None, len(names), 1.0))
    rollouts = trainer.rollouts()
    job.panel.score = lambda prompts, answers: rng.normal(size=(len(answers), len(names)))

    def step() -> float:
        rollout = next(rollouts)
        rollout.responses = [str(row) for row in range(len(rollout.responses))]  # short ones may be alike: no pair
        pairs = mo_odpo.paired(rollout, config, config.beta)
        loss = 0.0
        for part in trainer.parts(pairs.rows, group=2, tensors=pairs.tensors):
            value, metrics = mo_odpo.loss(part, config, names, config.beta)
            trainer.backward(value, metrics)
            loss += float(value.detach()) * len(part.logps) / len(pairs.rows)
        trainer.step()
        return loss

    return step


def trl_online(job: Any, prompts: list[str], options: argparse.Namespace, place: Path) -> tuple[Step, str]:
    """Return steps of trl's trainer on the same prompts, and the base's name."""
    import numpy as np
    import torch
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from moalign.lm.adapters import lora_config
    from moalign.lm.trainers import checkpointing_option, quiet_libraries

    lm = job.task.language_model
    lm.model = lm.model.unload()
    config = OnlineDPOConfig(
        output_dir=str(place / "trl-out"), per_device_train_batch_size=options.batch, max_new_tokens=options.tokens,
        temperature=0.7, learning_rate=job.config.lr, beta=[job.config.beta], max_steps=1, report_to="none",
        use_cpu=lm.device.type == "cpu", bf16=False, disable_tqdm=True, disable_dropout=True, max_length=4096,
        generation_kwargs={"min_new_tokens": options.tokens}, **{checkpointing_option(): False},
    )  # fmt: skip
    rng, given = np.random.default_rng(0), np.random.default_rng(1)
    texts = prompts_read(job, prompts)
    with quiet_libraries():
        trainer = OnlineDPOTrainer(
            model=copy.deepcopy(lm.model),
            reward_funcs=lambda prompts, completions, **_: rng.normal(size=len(completions)).tolist(),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=lm.tokenizer,
            peft_config=lora_config(lm.model, job.policy_spec.lora, "CAUSAL_LM", "policy.lora"),
        )
    parameters = [value for value in trainer.model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.config.lr)

    def step() -> float:
        chosen = given.choice(len(texts), size=options.batch, replace=len(texts) < options.batch)
        loss = float(trainer.training_step(trainer.model, {"prompt": [texts[at] for at in chosen]}))
        descend(parameters, optimizer)
        return loss

    return step, str(job.task.card.model or "sandbox")


# -- fixed pairs -------------------------------------------------------------------------------------------------------


def pairs(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Time steps on pairs of made-up tokens: the same prompt and two responses, of the lengths wanted."""
    import numpy as np
    import torch

    from moalign.lm.trainers import quiet_libraries
    from moalign.training import offline_dpo
    from moalign.training.callbacks import trainable, trainer_settings
    from moalign.training.reference import pad_around, pad_rows

    job = job_of("modpo", options, place)
    lm, count = job.task.language_model, options.batch
    rng, words = np.random.default_rng(0), int(lm.model.config.vocab_size)
    heads, tails = (rng.integers(5, words, size=(n, size)).tolist() for n, size in
                    ((count, options.prompt), (2 * count, options.response)))  # fmt: skip
    rows = [(heads[at % count] + tail, options.response) for at, tail in enumerate(tails)]
    reference = np.zeros((count, 2), dtype=np.float32)
    data = offline_dpo.PairRows(rows[:count], rows[count:], reference, np.ones(count), np.arange(count))
    margin = offline_dpo.Margin(rng.normal(size=(count, 1)), [0.4], 0.6)
    parameters = [value for value in lm.model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)  # the same losses at every step

    def steps_of(share: bool, unchanged: bool) -> Step:
        stage = job.config.model_copy(update={"share_prompts": share, "batch": count, "accumulate": 1})
        padded = pad_around if share else pad_rows
        batches = offline_dpo.Batches(data, margin, np.arange(count), np.ones(count), lm.pad, padded)
        settings = trainer_settings(job, lm, stage, 1, "speed")
        trainer = offline_dpo.PairTrainer(stage, batches, 0, settings, model=lm.model, processing_class=lm.tokenizer)
        trainer.precompute_ref_logps = unchanged
        batch = batches([{"place": at} for at in range(count)])
        if unchanged:
            kept = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
            chosen, rejected = batch["ref_logps"].unbind(1)
            batch = {**kept, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        compute = offline_dpo.DPOTrainer.compute_loss if unchanged else offline_dpo.PairTrainer.compute_loss

        def step() -> float:
            loss = compute(trainer, lm.model, batch)
            loss.backward()
            descend(parameters, optimizer)
            return float(loss.detach())

        return step

    with quiet_libraries(), trainable(lm):
        steps = {"plain": steps_of(False, False), "shared": steps_of(True, False), "library": steps_of(False, True)}
        measured = in_turns(steps, options.repeats)
    values = measured.pop("values")
    apart = max(abs(a - b) for a, b in zip(values["plain"], values["shared"], strict=True))
    lengths = {"prompt": options.prompt, "response": options.response}
    return {**measured, "losses_apart": apart, "pairs": count, **lengths, "base": str(job.task.card.model or "sandbox")}


# -- sampling ----------------------------------------------------------------------------------------------------------


def sampling(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Time answers to the task's prompts that end after 1/8 to all of the tokens, the same on both sides."""
    import numpy as np
    import torch

    from moalign.lm import sampler
    from moalign.lm.adapters import merged

    job = job_of("mo-odpo", options, place)
    lm = job.task.language_model
    lm.model.eval()
    count, longest = 4 * options.batch, 2 * options.tokens
    known = job.task.prompts["train"]
    weights = [1.0, *[0.0] * (len(job.task.names) - 1)]
    texts = [job.task.renderer.preference(known[at % len(known)], weights) for at in range(count)]
    prompts = lm.encode(texts, job.task.card.generation.max_prompt_tokens)
    lengths = torch.as_tensor(np.random.default_rng(0).integers(max(1, longest // 8), longest + 1, size=count))
    ids, mask = sampler.pad_left(prompts, lm.pad, lm.device)
    numbers = sampler.uniforms(0, range(count), longest)
    ends = sorted(lm.end_ids)
    ending, processor = endings(lengths, torch.tensor([len(prompt) for prompt in prompts]), ids.shape[1], ends)

    def library() -> float:
        with torch.no_grad():
            out = lm.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=longest, eos_token_id=ends, pad_token_id=lm.pad, logits_processor=[processor],
            )  # fmt: skip
        assert out.shape[1] - ids.shape[1] == int(lengths.max())
        return float(lengths.sum())

    def ours() -> float:
        with merged(lm):
            return float(sampler.sample(lm, prompts, numbers).tokens)

    steps: dict[str, Step] = {"plain": ours, "library": library}
    NextToken, sampler.NextToken = sampler.NextToken, ending  # type: ignore[misc]
    try:
        measured = in_turns(steps, options.repeats)
    finally:
        sampler.NextToken = NextToken  # type: ignore[misc]
    told = measured.pop("values")
    assert told["plain"] == told["library"], "not the same numbers of tokens"
    return {**measured, "rows": count, "tokens": int(lengths.sum()), "base": str(job.task.card.model or "sandbox")}


def endings(lengths: Any, starts: Any, width: int, ends: list[int]) -> tuple[Any, Any]:
    """Return the sampler's model, and a logits processor, that end each row after its number of tokens.

    ``starts`` are the tokens of each prompt, ``width`` those of the longest.
    """
    import torch
    from transformers import LogitsProcessor

    from moalign.lm import sampler

    def forced(logits: Any, over: Any) -> Any:
        logits = logits.clone()
        logits[:, ends] = -torch.inf
        logits[over, ends[0]] = 1e4
        return logits

    class Ending(sampler.NextToken):
        rows = torch.arange(len(lengths))

        def read(self, ids: Any, mask: Any, place: Any) -> Any:
            logits = super().read(ids, mask, place)
            if len(ids) != len(self.rows):
                return logits  # what all prompts begin with
            return forced(logits, mask.sum(-1) - starts[self.rows] + 1 >= lengths[self.rows])

        def keep(self, rows: Any) -> None:
            super().keep(rows)
            self.rows = self.rows[rows]

    class Processor(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return forced(scores, input_ids.shape[1] - width + 1 >= lengths)

    return Ending, Processor()


def updates(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Return what ``steps.py`` measures."""
    import steps  # beside this file

    return steps.inside_updates(options.repeats)


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "online": online,
    "online_long": online_long,
    "pairs": pairs,
    "sampling": sampling,
    "updates": updates,
}


def ratio(row: dict[str, Any], name: str) -> str:
    """Return how many times as fast as the library, with the least and the most of the rounds where they are kept."""
    if name not in row["times_as_fast"]:
        return ""
    rounds = row.get("rounds", {}).get(name)
    spread = f" ({min(rounds):.2f} to {max(rounds):.2f})" if rounds else ""
    return f"{row['times_as_fast'][name]:.2f}{spread}"


def table(record: dict[str, Any]) -> str:
    """Return the measurements as Markdown."""
    here, run = record["machine"], record["options"]
    lines = [
        "# Speed beside trl and transformers",
        "",
        f"Made by `python results/bench/speed.py` (task {run['task']}, in turns; medians of the ratios of each round).",
        f"Machine: {here['cpu']}, {here['cores']} cores, torch {here['packages']['torch']}, trl "
        f"{here['packages']['trl']}, measured {here['measured']}, load before {here['load_before'][0]}.",
        "",
        "| what | base | size | rounds | library, s | plain, s | shared, s | plain | shared | goal | losses apart |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, what in WHAT.items():
        if name not in record:
            continue
        row = record[name]
        seconds = [
            f"{row['seconds'][key]:.2f}" if key in row["seconds"] else "" for key in ("library", "plain", "shared")
        ]
        cells = " | ".join([str(row["repeats"]), *seconds, ratio(row, "plain"), ratio(row, "shared")])
        size = ", ".join(f"{key} {row[key]}" for key in ("prompts", "pairs", "rows", "prompt", "response", "tokens")
                         if key in row)  # fmt: skip
        apart = f"{row['losses_apart']:.1e}" if "losses_apart" in row else ""
        lines.append(f"| {what} | {row['base']} | {size} | {cells} | >= {GOALS[name]:g} | {apart} |")
    if "updates" in record:
        ratios = (f"{record['updates'][f'moc-{count}']['ratio']:.2f} with {count} objectives" for count in (2, 5))
        lines += ["", f"MOC's update over PPO's with one reward: {', '.join(ratios)} (promised <= 1.1)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="assistant")
    parser.add_argument("--only", action="append", choices=[*PARTS], help="repeatable")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="prompts, or pairs, of a step")
    parser.add_argument("--tokens", type=int, default=25, help="of each answer that is sampled online")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the prompt of a fixed pair")
    parser.add_argument("--response", type=int, default=100, help="tokens of its responses")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    import bench  # beside this file

    warnings.simplefilter("ignore", FutureWarning)
    shown = {name: value for name, value in vars(options).items() if name not in {"out", "only", "repeats"}}
    place = options.out / "speed.json"
    before = json.loads(place.read_text()) if options.only and place.is_file() else {}
    kept = before if before.get("options") == shown else {}  # parts of the same sizes stay; --only measures some anew
    record: dict[str, Any] = {**kept, "machine": bench.machine(), "options": shown}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory(prefix="moalign-speed-") as folder:
            record[name] = {"repeats": options.repeats, **PARTS[name](options, Path(folder))}
        print(json.dumps({name: record[name]}), flush=True)
        place.write_text(json.dumps(record, indent=2) + "\n")
        (options.out / "speed.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
