"""What bounds any mixture of frozen experts on the sandbox: their best weights, token by token, by enumeration.

    python results/published/sandbox/mixture_bound.py results/runs/sandbox/mod/RUN    # 4 minutes, one core

A mixture in probability space draws every token from one of its experts, whatever weighs them, so that for one
preference the best weights are found backwards over all 15,625 well-formed responses, ``y_<t`` a beginning of one:
``V(y_<t) = max_i sum_v pi_i(v | y_<t) V(y_<t v)``. With ``V(y) = w.z(y)`` at the end that is the highest utility of any
weights, and what mixtures can reach lies within ``w.z <= V_w`` for all w: a bound on the hypervolume of any number of
preferences. With ``V(y) = sum_i w_i sigma(z_i(y) - z_i(y_ref))`` it is what PCM would learn without any error.

Exact, too: equal weights and weights equal to the preference, in probability space (PCM untrained) and in logit space
(MOD). A token that leaves the well-formed responses ends the enumeration; it is worth the mean of the malformed answers
that the mixture with weights equal to the preference gives when it is sampled. That mixture's and MOD's sampled
hypervolumes, printed beside the enumerated ones, say how good this is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moalign.experiment.train import context_of
from moalign.lm.generator import ModelGenerator
from moalign.lm.mixture import Constant, Mixture, Space
from moalign.lm.sampler import NextToken, generate
from moalign.lm.side_by_side import SideBySide
from moalign.pareto.hypervolume import hypervolume
from moalign.policies.mixed import experts_on_model
from moalign.runs.run import Run
from moalign.tasks.sandbox import optimum, scorer, world
from moalign.training.job import RunContext

Array = NDArray[np.float64]
PROMPTS = 8
STEPS = 100
"""Preferences (k / STEPS, 1 - k / STEPS) for the bound; every tenth is the grid's."""
ANSWERS = 16
"""To each prompt: of the base, which stand for y_ref, and of the static mixtures."""
SPACES: dict[Space, str] = {"probability": " (PCM untrained)", "logit": " (MOD)"}


class Tree:
    """All well-formed responses: level t has their distinct beginnings of t tokens."""

    def __init__(self, responses: NDArray[np.int64]) -> None:
        """Build it of token ids ``[responses, length]``, filled up with the end token."""
        self.responses, length = responses, responses.shape[1]
        level = np.zeros(len(responses), dtype=np.int64)
        self.first = [np.array([0])]
        """For each level, one response through each node."""
        self.parents: list[NDArray[np.int64]] = []
        for t in range(1, length + 1):
            _, first, below = np.unique(responses[:, :t], axis=0, return_index=True, return_inverse=True)
            self.parents.append(level[first])
            self.first.append(first)
            level = below.ravel()
        self.leaves = level

    def value(self, chances: Array, leaf: Array, outside: Array, by: Array | None = None) -> Array:
        """Return the mean of ``leaf`` at the root, ``[directions, objectives]``, each node with its best source.

        Args:
            chances: of every response's tokens from each source, ``[responses, length, sources]``.
            leaf: ``[responses, directions or 1, columns]``.
            outside: worth of leaving the tree, ``[directions or 1, columns]``.
            by: what the best source is chosen by, ``[directions, columns]``; None: there is one source.
        """
        count = leaf.shape[1] if by is None else len(by)
        values = np.zeros((len(self.first[-1]), count, leaf.shape[2]))
        values[self.leaves] = leaf
        for t in reversed(range(len(self.parents))):
            chance, parents = chances[self.first[t + 1], t], self.parents[t]
            sources = []
            for source in range(chances.shape[2]):
                inside = np.zeros(len(self.first[t]))
                np.add.at(inside, parents, chance[:, source])
                mean = np.zeros((len(inside), count, leaf.shape[2]))
                np.add.at(mean, parents, chance[:, source, None, None] * values)
                sources.append(mean + (1 - inside)[:, None, None] * outside)
            if by is None:
                values = sources[0]
            else:
                stacked = np.stack(sources)
                best = (stacked * by).sum(-1).argmax(0)
                values = np.take_along_axis(stacked, best[None, :, :, None], axis=0)[0]
        return values[0]


def main(folder: Path) -> None:
    """Print hypervolumes in the table's units, for a finished run of mod on `sandbox`."""
    torch.set_grad_enabled(False)
    _, context = context_of(Run.load(folder), folder.parents[3])
    task = context.task
    grid, steps = np.array(task.grid), np.linspace(0.0, 1.0, STEPS + 1)
    directions = np.stack([steps, 1 - steps], axis=1)
    prompts = task.eval_prompts[:: len(task.eval_prompts) // PROMPTS]
    base = answers(context, prompts, None, "probability")
    sampled, outside = {}, {}
    for space in SPACES:
        z = [z_of(context, prompts, answers(context, prompts, preference, space)) for preference in grid]
        sampled[space] = np.stack([each.reshape(-1, len(task.names)).mean(0) for each, _ in z])
        # A preference at which no answer happened to be malformed takes the mean of all that were.
        malformed = np.concatenate([each[wrong] for each, wrong in z])
        outside[space] = np.stack([(each[wrong] if wrong.any() else malformed).mean(0) for each, wrong in z])
        print(f"{space}: malformed, by preference", [round(float(wrong.mean()), 3) for _, wrong in z])
    ids, tree = responses_of(context)
    points: dict[str, list[Array]] = {}
    for index, prompt in enumerate(prompts):
        rows = slice(index * ANSWERS, (index + 1) * ANSWERS)
        for name, value in of_prompt(context, prompt, base[rows], ids, tree, outside, directions).items():
            points.setdefault(name, []).append(value)
        print(f"{index + 1}/{len(prompts)} prompts", file=sys.stderr)
    means = {name: np.mean(values, axis=0) for name, values in points.items()}

    def unit(z: Array) -> Array:
        scale = task.normaliser
        return context.panel.unit(z * np.array(scale.sd) + np.array(scale.mean))

    def show(name: str, z: Array) -> None:
        weights = grid if len(z) == len(grid) else directions
        inner = float((weights * unit(z)).sum(1).mean())
        print(f"{name:66s} {hypervolume(unit(z), np.zeros(2)):.3f}  inner product {inner:.3f}")

    best = means["utility"]
    show("best weights for w.z, probability space, the grid's preferences", best[:: STEPS // 10])
    show(f"best weights for w.z, {STEPS + 1} preferences", best)
    show("best weights for PCM's reward, the grid's preferences", means["pcm"])
    show("equal weights, probability space", np.repeat(means["uniform"], len(grid), axis=0))
    for space, name in SPACES.items():
        show(f"weights equal to the preference, {space} space{name}", means[space])
        show("  the same, sampled", sampled[space])
    for name in ("pcm", "logit"):
        print(name, unit(means[name]).round(3).tolist())
    top = bound(directions, (directions * best).sum(1), unit)
    print(f"{'no weights in probability space, at any number of preferences, above':66s} {top:.3f}")


def answers(context: RunContext, prompts: Sequence[str], preference: Array | None, space: Space) -> list[str]:
    """Return :data:`ANSWERS` answers to each prompt, of the static mixture at ``preference`` or (None) of the base."""
    task, lm = context.task, context.task.language_model
    texts = [task.renderer.plain(prompt) for prompt in prompts for _ in range(ANSWERS)]
    if preference is None:
        return ModelGenerator(lm).generate(texts, range(len(texts)), task.sampling(0, temperature=1.0)).responses
    experts, n = side_by_side(context), len(task.names)
    weights = torch.tensor(preference, dtype=torch.float32)

    def of_batch(rows: Sequence[int]) -> Mixture:
        return Mixture(NextToken(experts), n, Constant(weights.expand(len(rows), n)), space)

    return generate(lm, texts, range(len(texts)), task.sampling(0, temperature=1.0), of_batch).responses


def z_of(context: RunContext, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Array, NDArray[np.bool_]]:
    """Return the normalised rewards ``[responses, objectives]`` and which responses are malformed."""
    by_prompt = [prompt for prompt in prompts for _ in range(ANSWERS)]
    parsed = [scorer.parse(response) for response in responses]
    wrong = np.array([strays > 0 or -1 in filled for filled, strays in parsed])
    return context.panel.z(context.panel.score(by_prompt, responses)), wrong


def side_by_side(context: RunContext) -> SideBySide:
    """Return the run's experts, stacked once."""
    if "stacked" not in context.cache:
        context.cache["stacked"] = SideBySide(context.task.language_model, experts_on_model(context))
    stacked: SideBySide = context.cache["stacked"]
    return stacked


def bound(directions: Array, support: Array, unit: Callable[[Array], Array]) -> float:
    """Return the area of ``{u >= 0 : w.z(u) <= V_w for all w}``, V being ``support``, by the trapezoid rule."""
    zero, one = unit(np.zeros((1, 2)))[0], unit(np.ones((1, 2)))[0]
    at = np.linspace(0, 1.5, 15001)
    z = (at - zero[0]) / (one - zero)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        height = (support[:, None] - directions[:, :1] * z) / directions[:, 1:]
    flat = directions[:, 1] == 0
    height[flat] = np.where(z > support[flat, None], -np.inf, np.inf)
    return float(np.trapezoid(np.clip(zero[1] + (one - zero)[1] * height.min(0), 0, None), at))


def responses_of(context: RunContext) -> tuple[torch.Tensor, Tree]:
    """Return all well-formed responses, ``[15625, length]`` token ids filled up with the end token, and their tree."""
    lm = context.task.language_model
    texts = [world.response_text(tuple(choice)) for choice in world.all_choices().tolist()]
    ended = [[*lm.tokenizer(text, add_special_tokens=False).input_ids, lm.eos] for text in texts]
    length = max(map(len, ended))
    ids = torch.tensor([row + [lm.eos] * (length - len(row)) for row in ended])
    return ids, Tree(ids.numpy())


def of_prompt(
    context: RunContext,
    prompt: str,
    base: Sequence[str],
    ids: torch.Tensor,
    tree: Tree,
    outside: dict[str, Array],
    directions: Array,
) -> dict[str, Array]:
    """Return the mean z that each way of weighing reaches, ``[preferences, objectives]``, by name."""
    task, lm = context.task, context.task.language_model
    n, length = len(task.names), ids.shape[1]
    experts = side_by_side(context)
    read = torch.tensor(lm.encode([task.renderer.plain(prompt)], task.card.generation.max_prompt_tokens)[0])
    grid = np.array(task.grid)
    chosen = np.ones((n, *ids.shape))
    by_logit = np.ones((len(grid), *ids.shape))
    ended = torch.cumsum(ids == lm.eos, dim=1) - (ids == lm.eos).long() > 0  # what fills up
    needed = np.unique(np.concatenate(tree.first))
    for rows in np.array_split(needed, max(1, len(needed) // 1024)):
        part = ids[rows]
        tokens = torch.cat([read.expand(len(part), -1), part], dim=1).repeat(n, 1)
        logits = experts(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        logs = logits[:, len(read) - 1 : -1].float().log_softmax(-1).view(n, len(part), length, -1)
        own = logs.gather(-1, part[None, ..., None].expand(n, -1, -1, 1))[..., 0]
        chosen[:, rows] = own.exp().masked_fill(ended[rows], 1.0).numpy()
        for k, weights in enumerate(grid):
            w = torch.tensor(weights, dtype=torch.float32).view(n, 1, 1)
            norm = (w.unsqueeze(-1) * logs).sum(0).logsumexp(-1)
            by_logit[k, rows] = ((w * own).sum(0) - norm).exp().masked_fill(ended[rows], 1.0).numpy()
    columns = [world.OBJECTIVES.index(name) for name in task.names]
    z = context.panel.z(optimum.all_rewards(world.context_of(prompt))[:, columns])
    z_ref = context.panel.z(np.array([scorer.rewards(prompt, response) for response in base])[:, columns])

    def gain(values: Array) -> Array:
        return (1 / (1 + np.exp(z_ref - values[..., None, :]))).mean(-2)

    alone, left = np.moveaxis(chosen, 0, -1), outside["probability"]
    along = np.stack([np.interp(directions[:, 0], grid[:, 0], column) for column in left.T], axis=1)
    both = np.concatenate([z, gain(z)], axis=1)[:, None]
    by_gain = np.concatenate([np.zeros_like(grid), grid], axis=1)
    found = {
        "utility": tree.value(alone, z[:, None], along, directions),
        "pcm": tree.value(alone, both, np.concatenate([left, gain(left)], axis=1), by_gain)[:, :n],
        "uniform": tree.value(alone.mean(-1, keepdims=True), z[:, None], left[len(left) // 2 : len(left) // 2 + 1]),
    }
    for space, chances in {"probability": [alone @ w for w in grid], "logit": by_logit}.items():
        at = [tree.value(c[..., None], z[:, None], w[None]) for c, w in zip(chances, outside[space], strict=True)]
        found[space] = np.concatenate(at)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
