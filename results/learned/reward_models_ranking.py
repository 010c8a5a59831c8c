"""Does calibration tell what comes out? Reward models that pick the best of n, or that a policy is trained on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from reward_models_training import backbone_of, differences, measures, parameters, prompts_of

from moalign.core.errors import RequestError

if TYPE_CHECKING:
    from moalign.tasks.sandbox.task import SandboxTask


def seed_of(cell: Mapping[str, Any]) -> int:
    """Return the annotators' seed of a cell: no two of them share labels."""
    from moalign.core.seeds import derive

    return derive(cell["seed"], "ranking", cell["layers"], cell["pairs"], str(cell["flipped"])) % 10**6


def card_settings(cell: Mapping[str, Any]) -> list[str]:
    """Return the ``--set`` texts that make the card's reward model that of a cell, where the backbone is the base."""
    names = {"pairs": cell["pairs"], "flipped": cell["flipped"], "seed": seed_of(cell)}
    return [f"task.sandbox.annotators.{name}={value}" for name, value in names.items()]


def sandbox_task(spec: Mapping[str, Any], overrides: Sequence[str], results: Path) -> SandboxTask:
    """Return the task of the part ``ranking``."""
    from moalign.config.load import load_card
    from moalign.tasks.sandbox.task import SandboxTask

    return SandboxTask(load_card(spec["ranking"]["task"], overrides), results)


class Candidates:
    """What the base answers: the same candidates for all reward models, with their exact rewards."""

    def __init__(self, task: SandboxTask, n: int, answers: int) -> None:
        """Draw ``answers`` times ``n`` responses to every evaluation prompt."""
        from moalign.lm.sampler import generate
        from moalign.pareto.hypervolume import hypervolume
        from moalign.pareto.indicators import inner_product

        self.n, self.grid, self.ref = n, np.array(task.grid), task.card.reference_point
        self.prompts = [prompt for prompt in task.eval_prompts for _ in range(n * answers)]
        rows, texts = range(len(self.prompts)), [task.renderer.plain(prompt) for prompt in self.prompts]
        self.texts = generate(task.language_model, texts, rows, task.sampling(0)).responses
        panel = task.judge_panel.with_normaliser(task.judge_normaliser)
        raw, best = panel.score(self.prompts, self.texts), task.optimum(task.grid, task.eval_prompts)
        assert best is not None
        self.shape = (-1, n, raw.shape[1])
        self.z, self.truth = panel.z(raw), panel.unit(raw)
        self.most = {
            "share": hypervolume(panel.unit(best), self.ref),
            "inner_product": inner_product(self.grid, panel.unit(best)),
        }

    def judged(self, scores: np.ndarray) -> dict[str, float]:
        """Return the truth, as a share of the optimum's, of the best by ``scores`` ``[candidates, objectives]``."""
        from moalign.pareto.hypervolume import hypervolume
        from moalign.pareto.indicators import inner_product

        means = best_of_n(scores.reshape(self.shape), self.truth.reshape(self.shape), self.grid)
        gained = {"share": hypervolume(means, self.ref), "inner_product": inner_product(self.grid, means)}
        return {name: value / self.most[name] for name, value in gained.items()}


def best_of_n(scores: np.ndarray, truth: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the mean truth ``[preferences, m]`` of what is best by ``w . score``; the first two ``[draws, n, m]``."""
    best = (scores @ grid.T).argmax(axis=1)  # [draws, preferences]
    return np.take_along_axis(truth, best[..., None], axis=1).mean(axis=0)


@functools.lru_cache(maxsize=1)
def candidates(task_name: str, n: int, answers: int, results: Path) -> Candidates:
    """Return the candidates, drawn once in this process."""
    return Candidates(sandbox_task({"ranking": {"task": task_name}}, [], results), n, answers)


def of_ranking(cell: Mapping[str, Any], spec: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """Train a reward model as the task sandbox-learned does, measure it, and let it pick the best of n."""
    from moalign.reward_models import runs
    from moalign.rewards.panel import RewardPanel
    from moalign.tasks.sandbox import annotators, learned

    mine = spec["ranking"]
    task = sandbox_task(spec, card_settings(cell), results)
    people, settings = task.annotators, learned.settings_of(task)
    backbone = backbone_of(cell, task.base_source()[0], results)
    request = runs.make(task.card.name, settings, str(backbone), task.pair_sets(), seed=people.seed, results=results)
    run, _ = runs.obtain(request)
    groups = annotators.groups_of(people.groups, task.names, people.sharpness)
    held_out = annotators.label(groups, prompts_of("eval"), mine["held_out"], 10**6 + people.seed, people.flipped)
    fitting = annotators.label(groups, prompts_of("calibration"), 500, 2 * 10**6 + people.seed, people.flipped)
    head = runs.objective(run, head=task.names[0])
    numbers = measures(differences(head, held_out), held_out, differences(head, fitting))
    pool = candidates(mine["task"], mine["n"], mine["answers"], results)
    heads = [runs.objective(run, name, head=name) for name in task.names]
    scores = RewardPanel.from_specs(heads, Path()).score(pool.prompts, pool.texts)
    truth = pool.judged((scores - scores.mean(axis=0)) / scores.std(axis=0))
    return {"parameters": parameters(backbone), **numbers, **truth, "ceiling": pool.judged(pool.z)}


def chosen(record: Mapping[str, Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reward models that policies are trained on: the base's size, evenly over their ranks by ECE."""
    from moalign.tasks.sandbox.base import LAYERS

    own = (cell for cell in record["cells"] if cell["part"] == "ranking" and cell["layers"] == LAYERS)
    models = sorted(own, key=lambda cell: cell["ece"])
    if not models:
        raise RequestError("--policies: the record has no reward models yet; first run the part ranking")
    places = np.linspace(0, len(models) - 1, min(spec["policies"]["count"], len(models))).round().astype(int)
    names = ("backbone", "layers", "loss", "pairs", "flipped", "seed")
    return [{"part": "policies", **{name: models[at][name] for name in names}} for at in places]


def of_policy(cell: Mapping[str, Any], spec: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """Train the method on a cell's reward model (found again, not trained) and return its truth."""
    from moalign.evaluation.evaluate import evaluate
    from moalign.experiment.train import TrainRequest, context_of, plan, train
    from moalign.pareto.indicators import inner_product

    settings = [*card_settings(cell), *spec["policies"].get("set", ())]
    request = TrainRequest(
        spec["policies"]["method"], spec["ranking"]["task"], overrides=settings, results=results, seed=0
    )
    run, _ = train(plan(request))
    method, context = context_of(run, results)
    record = evaluate(method, context).result.content
    best = inner_product(context.task.grid, record["optimum"]["points"])
    return {
        "share": record["optimal_share"],
        "inner_product": record["indicators"]["inner_product"] / best,
        "kl": record["quality"]["kl"],
        "tau": record["indicators"]["tau"],
    }
