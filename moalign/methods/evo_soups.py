"""Evo soups: the experts' interpolation weights found by a search for the front, in place of the preference itself.

Source: none yet, the method is ours; the interpolation of weights is that of rewarded soups, arXiv 2306.04488, the
search is NSGA-II (:mod:`moalign.pareto.evolution`).

Rewarded soups answer w with ``dW = sum_i w_i dW_i``, though nothing says that w are the weights whose answers have the
best w . r. Here the layers are parted into ``groups`` of neighbours, and each group g has weights ``x_gi`` of its own
for every expert i, each from ``low`` to ``high``, of any sum:

1. search: NSGA-II over x, larger is better in each objective's mean normalised reward. A point is worth what the
   merged model's answers to ``prompts`` of the calibration split have on average (``samples`` answers each, all points
   from the same random numbers). The first generation is rewarded soups' own models on an even grid, the experts among
   them, and uniform draws.
2. front: the points that no other evaluated point dominates are kept with the run, x and their mean rewards n, in the
   normalised units that answers are judged in.
3. a preference w is answered by the point of the front with the least ``max_i w_i (u_i - n_i)``, u the front's best
   in each objective (``pick: tchebycheff``, augmented as in :mod:`moalign.pareto.scalarisation`): every point of a
   front can be picked, whatever its shape. ``pick: linear`` takes the largest ``w . n``, which is best for who means by
   weights the worth of a reward's unit, but on a straight front jumps from one end to the other.

The evaluations' tokens and scores are counted in the run's cost, as the experts' are. A run's front is nearly that of
the calibration prompts: the more points, the more the best of them owes to chance, which ``prompts`` and ``samples``
reduce.

Resume: after each generation all evaluations so far are kept; the search is made again from them, generation by
generation, and asks for the same points (it has a random generator of its own).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from moalign.core.amounts import Amounts
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.methods.bone_soups import AnyExperts
from moalign.training.job import Job, RunContext

if TYPE_CHECKING:
    from moalign.policies.policy import Policy

SEARCH = "search"
"""Name of the stage in record, metrics and checkpoints."""
FRONT = "front"
"""Name of the file with the front: ``weights`` ``[points, groups, experts]`` and ``n`` ``[points, objectives]``."""


class Config(AnyExperts):
    """Settings of evo soups."""

    groups: int = Field(default=2, ge=1)
    """Groups of neighbouring layers with weights of their own; at most as many as layers have adapters."""
    low: float = Field(default=0.0, le=0)
    """Least weight of an expert; below 0 a model may move away from what an expert has learned."""
    high: float = Field(default=1.0, ge=1)
    """Largest weight of an expert."""
    population: int = Field(default=16, ge=4)
    """Points of a generation, and of the parents of the next."""
    generations: int = Field(default=10, ge=1)
    """With the first, which is given."""
    prompts: int = Field(default=64, ge=1)
    """Prompts of the calibration split that a point is evaluated on; all of them where they are fewer."""
    samples: int = Field(default=1, ge=1)
    """Answers to each."""
    pick: Literal["tchebycheff", "linear"] = "tchebycheff"
    """Which point of the front a preference gets."""

    def responses_sampled(self, task: Amounts) -> int:
        """See :class:`~moalign.training.settings.CostHints`."""
        return self.population * self.generations * self.prompts * self.samples


class EvoSoups:
    """One model per preference, made of one expert per objective; the weights are found by NSGA-II."""

    name: ClassVar[str] = "evo-soups"
    summary: ClassVar[str] = "experts' interpolation weights found by NSGA-II, by groups of layers (ours)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="merged", needs_online_rewards=True, snapshots=False, interpolates=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "experts": {"steps": 2, "batch": 4, "warmup": 0},
        "groups": 1,
        "population": 4,
        "generations": 2,
        "prompts": 4,
    }

    def train(self, job: Job) -> None:
        """Obtain the experts, trained or found, and search; resumes at the generation in flight."""
        from moalign.lm.adapters import adapted_layers
        from moalign.training.experts import bring_experts

        layers = adapted_layers(job.task.language_model, job.policy_spec.lora)
        if job.config.groups > layers:
            raise RequestError(f"groups: found {job.config.groups}; allowed: 1 to {layers}, the layers with adapters")
        bring_experts(job, *job.config.expert_runs())
        if not job.stage_done(SEARCH):
            search(job)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the model of the front that the preference picks."""
        from moalign.policies.mixed import interpolated

        if FRONT not in context.cache:
            context.cache[FRONT] = {name: part.numpy() for name, part in context.run.load_tensors(FRONT).items()}
        front = context.cache[FRONT]
        return interpolated(context, *front["weights"][picked(front["n"], preference, context.config.pick)].tolist())


def picked(means: Matrix, preference: Preference, how: Literal["tchebycheff", "linear"]) -> int:
    """Return the row of ``means`` ``[points, objectives]`` that a preference gets; of equal ones the first."""
    from moalign.pareto.scalarisation import UTOPIA, scores

    short = means - means.max(axis=0) + UTOPIA  # of the utopia point, which is then the front's own
    return int(np.argmax(scores(short, np.asarray(preference), how)))


def search(job: Job) -> None:
    """Evaluate all generations and keep the front with the run; goes on from the generations evaluated before."""
    import torch

    from moalign.core.seeds import derive
    from moalign.pareto.evolution import Search, lattice_and_random
    from moalign.pareto.front import nondominated
    from moalign.pareto.hypervolume import hypervolume
    from moalign.policies.mixed import put_away

    config, experts, ref = job.config, len(job.task.names), job.task.card.reference_point
    seed = derive(job.seed, SEARCH, "start")
    start = lattice_and_random(config.population, experts, config.groups, config.low, config.high, seed)
    evolution = Search(start, config.low, config.high, experts, derive(job.seed, SEARCH, "evolution") % 2**32)
    points, means = np.empty((0, start.shape[1])), np.empty((0, experts))
    before = job.run.load_checkpoint(SEARCH)
    job.run.truncate_metrics(SEARCH, 0 if before is None else before.step)
    if before is not None:
        points, means = (before.tensors[name].numpy() for name in ("points", "n"))
        evolution.replay(points, means)
        job.meter.load(before.state["meter"])
    for generation in range(0 if before is None else before.step, config.generations):
        asked = evolution.ask()
        found = evaluated(job, asked)
        evolution.tell(found)
        points, means = np.concatenate([points, asked]), np.concatenate([means, found])
        step, best = generation + 1, means[nondominated(means)]
        job.progress(SEARCH, step, config.generations)
        job.run.log(step, SEARCH, hypervolume=hypervolume(best, ref), front=len(best))
        kept = {"points": torch.from_numpy(points), "n": torch.from_numpy(means)}
        job.run.save_checkpoint(SEARCH, step, kept, {"meter": job.meter.state()})
    put_away(job)
    front = nondominated(means)
    weights = points[front].reshape(-1, config.groups, experts)
    job.notes[SEARCH] = {"evaluated": len(means), "front": len(weights), "hypervolume": hypervolume(means[front], ref)}
    job.run.save_tensors(FRONT, {"weights": torch.from_numpy(weights), "n": torch.from_numpy(means[front])})
    job.finish_stage(SEARCH)


def evaluated(job: Job, points: Matrix) -> Matrix:
    """Return the mean rewards ``[points, objectives]``, in normalised units, of the models with these weights."""
    from moalign.core.seeds import derive
    from moalign.policies.measured import calibration_prompts, mean_rewards
    from moalign.policies.mixed import interpolated

    config, seed = job.config, derive(job.seed, SEARCH, "answers")
    prompts = calibration_prompts(job, config.prompts, config.samples)
    models = points.reshape(len(points), config.groups, -1).tolist()
    return np.stack([mean_rewards(job, interpolated(job, *weights), prompts, seed) for weights in models])
