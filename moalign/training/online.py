"""The online trainer: it samples and scores, the method learns.

    trainer = OnlineTrainer(job, lm, config, draw)
    for rollout in trainer.rollouts():                  # prompts, preferences, responses, scores
        for part in trainer.parts(rows, ...):           # micro-batches with the policy's log-probabilities
            trainer.backward(*loss_of(part))
        trainer.step()                                  # or trainer.skip(): nothing to learn from

It owns sampling and scoring (:mod:`moalign.training.rollout`), value heads, optimizer, log, checkpoints, resume. What
it trains, and what that is compared with, is an actor (:mod:`moalign.training.actor`): by default the active adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm.finite import FiniteCheck, Modules
from moalign.lm.language_model import LanguageModel
from moalign.losses import ppo
from moalign.training import checkpoints
from moalign.training.actor import Actor, AdapterActor, Style
from moalign.training.constant_rewards import ConstantRewards
from moalign.training.kl_budget import KlStrength, beyond
from moalign.training.means import Means, Some
from moalign.training.preference_draws import Draw
from moalign.training.rollout import Rollout, ValueHeads, policy_logps, rollout_metrics, sample_rollout
from moalign.training.settings import OnlineConfig, PpoConfig
from moalign.training.support import Support

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moalign.training.job import Job


@dataclass
class Part:
    """One micro-batch of a rollout, with the policy's forward pass over it."""

    logps: Tensor
    """Log-probabilities under the policy, with gradient, ``[rows, T]``; 0 outside the mask."""
    entropy: Tensor
    """Of the policy at each token, in nats, no gradient, ``[rows, T]``."""
    response_mask: Tensor
    """``[rows, T]``."""
    old_logps: Tensor
    """Under the policy that sampled, ``[rows, T]``; of a pass over whole rows, or the same as those to 1e-4."""
    ref_logps: Tensor
    """``[rows, T]``."""
    tensors: dict[str, Tensor]
    """What was given to :meth:`OnlineTrainer.parts`, of these groups."""
    values: Tensor | None = None
    """Value heads' outputs, with gradient, ``[rows, T, heads]``, when the trainer has them."""


class OnlineTrainer:
    """Rollouts of one policy, and the means to learn from them."""

    def __init__(
        self,
        job: Job,
        lm: LanguageModel,
        config: OnlineConfig,
        draw: Draw,
        phase: str = "online",
        style: Style = "percent",
        value_heads: int = 0,
        value_lr: float | None = None,
        actor: Actor | None = None,
    ) -> None:
        """Prepare to train ``actor`` (None: the active adapter of ``lm``); ``phase`` names record and checkpoints.

        ``draw`` and ``style`` say which preferences prompts are conditioned on, and how they are written.
        So many ``value_heads`` are trained along, at ``value_lr`` (None: the policy's), and kept with the run.
        """
        self.job, self.lm, self.config, self.draw, self.phase = job, lm, config, draw, phase
        self.actor = AdapterActor(job, lm, config, style) if actor is None else actor
        self.value_heads = ValueHeads(self.actor.width, value_heads).to(lm.device) if value_heads else None
        self.accelerator = Accelerator(cpu=lm.device.type == "cpu")
        self.parameters = list(self.actor.parameters)
        groups = [{"params": list(self.parameters), "peak": config.lr}]
        if self.value_heads is not None:
            self.parameters += self.value_heads.parameters()
            groups += [{"params": list(self.value_heads.parameters()), "peak": value_lr or config.lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.counts = {"updates_skipped": 0}  # go to the run's notes at the end
        self.state: dict[str, float] = {}
        """What else a method needs to continue after an interruption; kept in checkpoints."""
        self.check = FiniteCheck(job.run.record.method, phase, config.lr, config.clip)
        self.constant = ConstantRewards(job.panel.names)
        self.support = Support(job, lm, config)
        self._rollout: Rollout | None = None
        self._metrics: dict[str, float] | None = None
        self._means = Means()
        self._share = 0.0

    def rollouts(self) -> Iterator[Rollout]:
        """Yield a rollout for every step that is left, going on from the phase's checkpoint.

        The reference's adapter is dropped at the end, also when the loop is left early. Raises RuntimeError when the
        method neither stepped nor skipped, a bug; and, as :meth:`backward` and :meth:`step` do, WorkError when training
        diverges (:mod:`moalign.lm.finite`).
        """
        config, run, names = self.config, self.job.run, self.job.panel.names
        try:
            for done in range(self._resume() + 1, config.steps + 1):
                torch.manual_seed(derive(self.job.seed, self.phase, done - 1))
                self._rollout = rollout = self.sample(done - 1)
                self.check.step = done
                self.check.number("log-probability of the responses", float(rollout.samples.logps.sum()))
                if beyond(rollout, self.job, lm=self.lm, config=config, phase=self.phase):
                    break
                self.constant.add(done, rollout.z)
                self._metrics = None
                yield rollout
                if self._metrics is None:
                    raise RuntimeError(f"{self.phase}: step {done} ended without trainer.step() or trainer.skip()")
                if done % config.log_every == 0 or done == config.steps:
                    measured = {**self._metrics, **rollout_metrics(rollout, names), **self.job.meter.cost()}
                    run.log(done, self.phase, **measured)
                if config.ref_sync_steps and done % config.ref_sync_steps == 0:
                    self.actor.sync_reference()
                self.job.advance(self.lm, self.phase, done, config.steps)
                if done % config.checkpoint_every == 0 and done < config.steps:
                    kept = {"counts": self.counts, "method": self.state, "constant": self.constant.state}
                    checkpoints.save_checkpoint(self.job, self._modules(), self.optimizer, self.phase, done, **kept)
            self._modules()  # while a reference is still there
        finally:
            self.actor.close()
        self._rollout = None
        self.job.notes.update(self.counts)
        self.job.warn(self.constant.warnings(self.phase))
        if self.value_heads is not None:
            run.save_tensors(f"value_heads-{self.phase}", self.value_heads.state_dict())

    def sample(self, step: int) -> Rollout:
        """Return the rollout of a step, from 0."""
        given = self.job, self.lm, self.actor, self.config, self.draw, self.phase, step, self.value_heads
        rollout = sample_rollout(*given)
        self.support.apply(rollout)
        return rollout

    def parts(self, rows: NDArray[np.intp], group: int = 1, *, tensors: Mapping[str, Tensor]) -> Iterator[Part]:
        """Yield micro-batches of some rows of the rollout, for one update; each weighs as many groups as it holds.

        Consecutive ``group`` rows belong together (2 for pairs); ``tensors`` ``[groups, ...]`` go along with them.
        """
        assert self._rollout is not None, "parts belong to the rollout in hand"
        rollout, samples, groups, config = self._rollout, self._rollout.samples, len(rows) // group, self.config
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = parameters["peak"] * factor(config.schedule, rollout.step, config.steps, config.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        self._means.clear()
        size, grouped = max(1, config.micro_batch // group), rows[: groups * group].reshape(groups, group)
        order = rollout.order(grouped, config.group_by_length)
        self.job.meter.add_tokens_trained(int(samples.attention_mask[torch.as_tensor(grouped.reshape(-1))].sum()))
        self.actor.learning(True)
        for first in range(0, len(order), size):
            part = order[first : first + size]
            chosen = torch.as_tensor(grouped[part].reshape(-1)).cpu()
            mask, heads = samples.response_mask[chosen], self.value_heads
            outputs = self.actor.outputs(samples, chosen, hidden=heads is not None)
            self._share = len(part) / groups
            yield Part(
                logps=outputs.logps,
                entropy=outputs.entropy,
                response_mask=mask,
                old_logps=samples.logps[chosen],
                ref_logps=rollout.ref_logps(chosen),
                tensors={name: value[part] for name, value in tensors.items()},
                values=None if heads is None else heads(outputs.hidden),
            )
        self.actor.learning(False)

    def backward(self, loss: Tensor, metrics: Mapping[str, float | Some] | None = None) -> None:
        """Add the gradient of a part's mean loss over its groups (a scalar); metrics are averaged over parts."""
        self.accelerator.backward(loss * self._share)
        number = self.check.number("loss", float(loss.detach()))
        self._means.add({"loss": number, **(metrics or {})}, self._share)

    def step(self, metrics: Mapping[str, float] | None = None) -> None:
        """Clip the gradient and make one update; the metrics of a rollout's last update are logged.

        Raises RuntimeError when :meth:`backward` was not called since the last step.
        """
        means = self._means.taken(self.parameters)
        if not means:
            raise RuntimeError(f"{self.phase}: trainer.step() without trainer.parts() and trainer.backward() before it")
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.clip))
        self.check.number("gradient norm", norm)
        self.optimizer.step()
        self.check.norm(self.parameters)
        self._metrics = {**(metrics or {}), **means, "grad_norm": norm}

    def skip(self, metrics: Mapping[str, float] | None = None) -> None:
        """Count a rollout that has nothing to learn from (all ties), and go on."""
        self.counts["updates_skipped"] += 1
        self._metrics = {**(metrics or {}), "skipped": 1.0}

    def policy_logps(self) -> Tensor:
        """Return the rollout's log-probabilities under the policy as it is now ``[rows, T]``, without gradient."""
        assert self._rollout is not None
        return policy_logps(self.actor, self._rollout.samples, self.config)

    def _modules(self) -> Modules:
        """Return all that is trained; raises WorkError for weights that are not finite."""
        modules = dict(self.actor.modules())
        if self.value_heads is not None:
            modules["values"] = self.value_heads.state_dict()
        return self.check.weights(modules)

    def _resume(self) -> int:
        """Restore all from the phase's checkpoint; returns the number of steps already done."""
        checkpoint = checkpoints.resume(self.job, self.optimizer, self.phase)
        if checkpoint is None:
            return 0
        modules = checkpoints.modules(checkpoint)
        self.actor.load(modules)
        if self.value_heads is not None:
            self.value_heads.load_state_dict(modules["values"])
        self.counts.update(checkpoint.state["counts"])
        self.state.update(checkpoint.state["method"])
        self.constant.load(checkpoint.state.get("constant", {}))  # older checkpoints have none
        return checkpoint.step


class PpoTrainer(OnlineTrainer):
    """An online trainer with value heads, for clipped PPO (:mod:`moalign.losses.ppo`)."""

    config: PpoConfig

    def __init__(
        self,
        job: Job,
        lm: LanguageModel,
        config: PpoConfig,
        draw: Draw,
        heads: Sequence[str],
        phase: str = "online",
        style: Style = "fraction",
        actor: Actor | None = None,
    ) -> None:
        """Prepare the trainer; ``heads`` name the value heads in the metrics."""
        super().__init__(job, lm, config, draw, phase, style, len(heads), config.value_lr, actor)
        self.heads = list(heads)
        self.strength = KlStrength(config, "kl_coef", config.kl_coef, self.state, job.notes)

    def experience(self, rewards: NDArray[np.float64], kl_apart: bool = False) -> ppo.Experience:
        """Return advantages and returns of the rollout in hand, then adapt the KL coefficient to what it shows.

        The heads are trained on ``rewards`` ``[rows, rewards]``; with ``kl_apart`` the KL cost is no part of them but a
        stream of its own with the last head.
        """
        assert self._rollout is not None and self._rollout.values is not None
        samples, ref_logps, config = self._rollout.samples, self._rollout.ref_logps(), self.config
        experience = ppo.experience(
            torch.as_tensor(rewards, dtype=torch.float32, device=samples.logps.device),
            self._rollout.values,
            samples.logps,
            ref_logps,
            samples.response_mask,
            self.strength.now,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            whiten=config.whiten,
            kl_apart=kl_apart,
        )
        experience.importance = self._rollout.importance
        self.strength.adapt(self._rollout)
        return experience

    def update(
        self, experience: ppo.Experience, advantages: Tensor, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Make one update with the one advantage of each token, ``[rows, T]``."""
        config = self.config
        for part in self.parts(np.arange(len(advantages)), tensors=experience.tensors(advantages)):
            assert part.values is not None
            tokens = (part.logps, part.entropy, part.values, part.old_logps, part.response_mask)
            loss = ppo.loss(*tokens, part.tensors, self.heads, clip_range=config.clip_range, vf_coef=config.vf_coef)
            self.backward(*loss)
        self.step({**(metrics or {}), "kl_coef": self.strength.now})
