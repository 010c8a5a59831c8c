"""What training on a task does to a model outside it: KL to the base, and how likely the base's own answers stay.

    python results/outside.py results/runs/sandbox/dpo-lw/ID results/runs/sandbox/bapo/ID [--prompts FILE.jsonl]

For each policy of finished runs with one policy per preference, on three sets of prompts: the task's evaluation prompts
(task); the same with a preference stated before them, which the sandbox's base follows and no such run trains on
(stated); and others (unseen): those of ``--prompts``, or questions of the sandbox's form about things that its world
does not know. Prints, as means over the run's policies, the KL of a response in nats, ``E_pi[log pi - log pi_base]`` on
a policy's own answers, and the mean log-likelihood of a token of the base's answers under the policy, less the base's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moalign.experiment.train import context_of
from moalign.lm.generator import Generator, ModelGenerator, in_chunks
from moalign.lm.sampler import Sampling
from moalign.runs.run import Run
from moalign.tasks.task import Task
from moalign.training.reference import Row, log_probs

ROWS = ("kl", "likelihood")
UNSEEN = ("a river", "a mirror", "a rope", "roses", "the cat", "a hat", "cake", "a lamp")
VERBS = ("bake", "paint", "fix", "grow", "climb", "cross", "read", "measure")


def unseen() -> list[str]:
    """Return questions of the sandbox's form about topics that it has none of."""
    from moalign.tasks.sandbox.world import TOPICS

    topics = [f"{verb} {thing}" for verb, thing in itertools.product(VERBS, UNSEEN)]
    topics = [topic for topic in topics if not any(known in topic for known in TOPICS)]
    return [
        f"{ask} {topic} {tail}" for topic in topics for ask, tail in (("how do i", "today ?"), ("any tips to", "?"))
    ]


def prompt_sets(task: Task, others: Sequence[str], most: int) -> dict[str, list[str]]:
    """Return rendered prompts by name of the set, at most ``most`` each."""
    own, count = list(task.eval_prompts)[:most], len(task.names)
    corners = [tuple(float(i == k) for i in range(count)) for k in range(count)]
    stated = [task.renderer.preference(prompt, corners[at % count], "percent") for at, prompt in enumerate(own)]
    render = task.renderer.plain
    return {
        "task": list(map(render, own)),
        "stated": stated,
        "unseen": list(map(render, list(others)[:most])),
    }


def answers(task: Task, generator: Generator, texts: Sequence[str], sampling: Sampling) -> tuple[list[Row], np.ndarray]:
    """Return rows of the generator's answers, and their log-probabilities under it."""
    drawn = in_chunks(generator, [(text, at) for at, text in enumerate(texts)], sampling, None)
    assert drawn.traces is not None
    heads = task.language_model.encode(texts, sampling.max_prompt_tokens)
    rows = [([*head, *ids.tolist()], len(ids)) for head, ids in zip(heads, drawn.traces.ids, strict=True)]
    return rows, np.array(drawn.traces.logps)


def measure(
    run: Run, results: Path, others: Sequence[str] | None = None, most: int = 128, seed: int = 7
) -> dict[str, dict[str, float]]:
    """Return :data:`ROWS` by set of prompts, means over the run's policies."""
    method, context = context_of(run, results)
    task, sampling = context.task, context.task.sampling(seed)
    lm = task.language_model
    sets = prompt_sets(task, unseen() if others is None else others, most)
    of_base = {name: answers(task, ModelGenerator(lm), texts, sampling)[0] for name, texts in sets.items()}
    before = {name: log_probs(lm, rows, temperature=sampling.temperature) for name, rows in of_base.items()}
    found: dict[str, dict[str, list[float]]] = {name: {row: [] for row in ROWS} for name in sets}
    for preference in context.preferences:
        model = method.policy(context, preference).generator.as_model()  # type: ignore[attr-defined]
        for name, texts in sets.items():
            rows, logps = answers(task, model, texts, sampling)
            base = log_probs(lm, rows, temperature=sampling.temperature).numpy()
            found[name]["kl"].append(float((logps - base).mean()))
            lm.model.set_adapter(model.adapter)
            after = log_probs(lm, of_base[name], own=True, temperature=sampling.temperature)
            tokens = sum(length for _, length in of_base[name])
            found[name]["likelihood"].append(float((after - before[name]).sum()) / tokens)
    return {name: {row: float(np.mean(values)) for row, values in of.items()} for name, of in found.items()}


def main() -> None:
    """Print a table of the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--prompts", type=Path, help="JSONL with a column prompt: what is asked outside the task")
    parser.add_argument("--most", type=int, default=128, help="prompts of each set (128)")
    args = parser.parse_args()
    others = None
    if args.prompts is not None:
        others = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines() if line]
    print(f"{'run':24} {'prompts':8} {'KL':>8} {'likelihood':>11}")
    for path in args.runs:
        run = Run.load(path)
        for name, values in measure(run, args.results, others, args.most).items():
            label = f"{run.record.method} {run.record.run_id[:8]}"
            print(f"{label:24} {name:8} {values['kl']:8.3f} {values['likelihood']:11.4f}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
