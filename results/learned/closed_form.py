"""What a KL-regularised policy would have, without any error of training: its truth, by enumeration of all answers.

    python results/learned/closed_form.py            # 10 minutes, one core; writes closed_form.json and closed_form.md

For a preference w the policy that maximises ``E[s_w] - beta KL(pi || pi_base)`` is ``pi_base exp(s_w / beta) / Z``.
On the sandbox base and rewards of all 15,625 well-formed answers are known, so that the mean true reward of that policy
is a sum, whatever s_w is made of: the exact rewards, those of a reward model, or the mean of several; linear or any
other scalarisation. What is left out: malformed answers (.15 % of the base's), which a reward model may like better
than any well-formed one. So these numbers say what the reward model's errors cost among answers such as those that it
was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moalign.config.load import load_card
from moalign.pareto.hypervolume import hypervolume
from moalign.pareto.indicators import inner_product
from moalign.pareto.scalarisation import Scalarisation, scores
from moalign.rewards.normaliser import Normaliser
from moalign.tasks.frontier import Frontier
from moalign.tasks.load import make_task
from moalign.tasks.sandbox import optimum, reference, world
from moalign.tasks.task import Task

HERE = Path(__file__).resolve().parent
PROMPTS = 16
SEEDS = (0, 1, 2, 3)
"""Of the reward models, all trained on the same pairs."""
BETAS = (0.015, 0.025, 0.05, 0.1, 0.2)
SCALARISATIONS: tuple[Scalarisation, ...] = ("linear", "tchebycheff", "smooth", "exponential")

Array = NDArray[np.float64]


def learned(seed: int, results: Path) -> Task:
    """Return the task whose rewards are those of the reward model of a seed."""
    sets = [] if seed == 0 else [f"task.sandbox.reward_model.seed={seed}"]
    return make_task(load_card("sandbox-learned", sets), results, lambda what, done, total: None)


def believed_of(task: Task, prompts: list[str], kept: Path) -> Array:
    """Return the reward model's normalised rewards of all answers ``[prompts, 15625, objectives]``; scored once."""
    if not kept.is_file():
        texts = [world.response_text(tuple(choice)) for choice in world.all_choices().tolist()]
        raw = []
        for number, prompt in enumerate(prompts, start=1):
            raw.append(task.panel.score([prompt] * len(texts), texts))
            print(f"{kept.stem}: {number}/{len(prompts)} prompts", file=sys.stderr, flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(kept, z=task.normaliser.z(np.stack(raw)).astype(np.float32))
    return np.asarray(np.load(kept)["z"], dtype=np.float64)


def rows(
    z: dict[str, Array], log_base: Array, truth: Array, judge: Normaliser, grid: Array, ref: list[float]
) -> Iterator[dict[str, object]]:
    """Yield hypervolume, inner product and KL of the truth for every reward, scalarisation and beta."""
    shares = np.full(len(truth), 1 / len(truth))
    for name, reward in z.items():
        for how in SCALARISATIONS:
            for beta in BETAS:
                found = [Frontier(log_base, truth, scores(reward, w, how), shares).at(beta) for w in grid]
                means = judge.unit(np.array([mean for _, mean in found]))
                yield {
                    "rewards": name,
                    "scalarisation": how,
                    "beta": beta,
                    "kl": float(np.mean([kl for kl, _ in found])),
                    "hypervolume": hypervolume(means, ref),
                    "inner_product": inner_product(grid, means),
                }


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="where reward models are kept")
    results = parser.parse_args().results
    task = learned(0, results)
    prompts = task.eval_prompts[:: len(task.eval_prompts) // PROMPTS][:PROMPTS]
    card, judge, grid = task.card, task.judge_normaliser, np.array(task.grid)
    texts = [task.renderer.plain(prompt) for prompt in prompts]
    tables = reference.kept_log_probs(
        task.language_model, texts, card.generation.max_prompt_tokens, card.generation.temperature
    )
    columns = [world.OBJECTIVES.index(name) for name in task.names]
    truth = np.stack([optimum.all_rewards(world.context_of(prompt))[:, columns] for prompt in prompts])
    cache = results / "tasks" / "closed_form"
    models = [believed_of(learned(seed, results), prompts, cache / f"seed-{seed}.npz") for seed in SEEDS]
    z = {"exact": judge.z(truth), **{f"learned, seed {seed}": model for seed, model in zip(SEEDS, models, strict=True)}}
    mean, spread = np.mean(models, axis=0), np.std(models, axis=0)
    z |= {"mean of four": mean, "mean - 1 sd": mean - spread, "mean - 2 sd": mean - 2 * spread}
    log_base = np.stack(tables).astype(np.float64)
    most = np.array([truth[np.arange(len(truth)), (z["exact"] @ w).argmax(axis=1)].mean(axis=0) for w in grid])
    best = judge.unit(most)
    content = {
        "command": "python results/learned/closed_form.py",
        "prompts": PROMPTS,
        "optimum": {
            "hypervolume": hypervolume(best, card.reference_point),
            "inner_product": inner_product(grid, best),
        },
        "rows": list(rows(z, log_base, truth, judge, grid, card.reference_point)),
    }
    (HERE / "closed_form.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (HERE / "closed_form.md").write_text(page(content), encoding="utf-8")


def page(content: dict[str, object]) -> str:
    """Return the tables: the truth of every closed form."""
    most, every = content["optimum"], content["rows"]
    assert isinstance(most, dict) and isinstance(every, list)
    lines = [
        "# The truth of the closed form, by rewards, scalarisation and beta",
        "",
        f"Made by `{content['command']}`: the policies `base exp(s / beta) / Z` on {content['prompts']} evaluation",
        "prompts, by enumeration of the 15,625 well-formed answers. Each cell: true hypervolume / true mean w.n, and",
        "the KL to base in nats. The best answers for w.z have "
        f"{most['hypervolume']:.3f} / {most['inner_product']:.3f}. Exponential utility can have more hypervolume",
        "than those: a linear score leaves the middle of the front out. The four reward models differ in their seed",
        "alone and were trained on the same pairs.",
    ]
    for name in dict.fromkeys(row["rewards"] for row in every):
        lines += ["", f"## {name}", "", "| scalarisation | " + " | ".join(f"beta {beta:g}" for beta in BETAS) + " |"]
        lines.append("|---|" + "---:|" * len(BETAS))
        for how in SCALARISATIONS:
            own = [row for row in every if (row["rewards"], row["scalarisation"]) == (name, how)]
            cells = [f"{row['hypervolume']:.3f} / {row['inner_product']:.3f}, {row['kl']:.1f}" for row in own]
            lines.append(f"| {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
