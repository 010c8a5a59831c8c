"""The cost of an update: MOC's over PPO's, MODPO's over DPO's; called by ``bench.py`` (hidden options alone)."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

OBJECTIVES = (2, 5)
"""For how many objectives MOC's update is measured against that of PPO with one reward."""


def inside_updates(repeats: int) -> dict[str, Any]:
    """Time rollouts and updates of MORLHF (one head) and of MOC, on one model in this process.

    MOC's rewards are drawn at random, as many per response as there are objectives: the cost of an update does
    not depend on their values.
    """
    import numpy as np

    from moalign.experiment.train import TrainRequest, plan
    from moalign.lm import adapters
    from moalign.methods import moc, morlhf
    from moalign.runs.meter import Meter
    from moalign.training.online import PpoTrainer
    from moalign.training.preference_draws import grouped

    with tempfile.TemporaryDirectory() as folder:
        planned = plan(TrainRequest("moc", results=Path(folder)))
        job = planned.job(planned.open(), Meter())
        lm = job.task.language_model
        rounds = repeats + 1  # the first warms the allocator
        never = {"steps": rounds + 1, "log_every": rounds + 1, "checkpoint_every": rounds + 1}
        config = job.config.model_copy(update=never)
        adapters.attach(lm, job.policy_spec.lora, job.seed)
        draw = grouped(job.preferences, config.groups)
        heads = {"morlhf": [morlhf.HEAD], **{f"moc-{size}": [f"r{k}" for k in range(size)] for size in OBJECTIVES}}
        trainers = {name: PpoTrainer(job, lm, config, draw, names, name, config.style) for name, names in heads.items()}
        rollouts = {name: trainer.rollouts() for name, trainer in trainers.items()}

        def update(trainer: PpoTrainer, rollout: Any) -> None:
            alone = len(trainer.heads) == 1
            experience = trainer.experience(rollout.utility[:, None] if alone else rollout.z)
            for epoch in range(config.epochs):
                if alone:
                    trainer.update(experience, experience.advantages[..., 0])
                    continue
                now = experience.old_logps if epoch == 0 else trainer.policy_logps()
                ratios = (now - experience.old_logps).exp()
                trainer.update(experience, *moc.combined(rollout, experience, ratios, config, trainer.heads))

        times: dict[str, dict[str, list[float]]] = {name: {"update": [], "step": []} for name in heads}
        for step in range(rounds):
            for name, trainer in trainers.items():
                size = len(trainer.heads)
                started = time.perf_counter()
                rollout = next(rollouts[name])
                if size > 1:
                    rng = np.random.default_rng([step, size])
                    vectors = rng.dirichlet(np.ones(size), size=config.groups)
                    rollout.preferences = grouped(vectors.tolist(), config.groups)(rng, len(rollout.prompts))
                    rollout.z = rng.normal(size=(len(rollout.responses), size))
                sampled = time.perf_counter()
                update(trainer, rollout)
                times[name]["update"].append(time.perf_counter() - sampled)
                times[name]["step"].append(time.perf_counter() - started)
        return {"batch": config.batch, "repeats": repeats, **ratios_of(times)}


def ratios_of(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return medians of all but the first round, and MOC's over those of MORLHF."""
    record: dict[str, Any] = {
        name: {kind: round(statistics.median(each[1:]), 4) for kind, each in durations.items()}
        for name, durations in times.items()
    }
    for size in OBJECTIVES:
        own = record[f"moc-{size}"]
        own["ratio"] = round(own["update"] / record["morlhf"]["update"], 3)
        own["ratio_of_steps"] = round(own["step"] / record["morlhf"]["step"], 3)
    return record


def inside_dpo(repeats: int) -> dict[str, Any]:
    """Time steps of trl's unchanged DPO loss, of plain DPO here and of MODPO, in turn on the same batches.

    The batch is that of MODPO's sandbox recipe; a step is timed between two calls of the progress callback.
    """
    from moalign.experiment.train import TrainRequest, plan
    from moalign.lm import adapters
    from moalign.methods.modpo import margin_of
    from moalign.runs.meter import Meter
    from moalign.training import offline_dpo

    own = offline_dpo.PairTrainer

    class Unchanged(own):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.precompute_ref_logps = True
            batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = inputs["ref_logps"].unbind(1)
            return offline_dpo.DPOTrainer.compute_loss(self, model, batch)

    with tempfile.TemporaryDirectory() as folder:
        planned = plan(TrainRequest("modpo", results=Path(folder)))
        job = planned.job(planned.open(), Meter())
        lm, steps = job.task.language_model, 12
        config = job.config.model_copy(update={"steps": steps, "log_every": steps + 1})
        pairs = offline_dpo.objective_pairs(job, lm, config, [0], scores=True)[0]
        assert pairs.gaps is not None
        margins = {"trl": None, "dpo": None, "modpo": margin_of((0.6, 0.4), 0, pairs.gaps)}
        times: dict[str, list[float]] = {name: [] for name in margins}
        stamps: list[float] = []
        job.progress = lambda *progress: stamps.append(time.perf_counter())
        for repeat in range(repeats + 1):  # the first warms the allocator
            for name, margin in margins.items():
                adapters.attach(lm, job.policy_spec.lora, job.seed)
                stamps.clear()
                offline_dpo.PairTrainer = Unchanged if name == "trl" else own
                offline_dpo.train_dpo(job, lm, pairs, config, f"bench-{name}-{repeat}", margin)
                if repeat:
                    times[name] += [after - before for before, after in itertools.pairwise(stamps)]
        seconds = {name: round(statistics.median(durations), 5) for name, durations in times.items()}
        return {
            "batch": config.batch,
            "steps": len(times["modpo"]),
            "seconds": seconds,
            "ratio": round(seconds["modpo"] / seconds["dpo"], 3),
            "ratio_to_trl": round(seconds["modpo"] / seconds["trl"], 3),
        }
