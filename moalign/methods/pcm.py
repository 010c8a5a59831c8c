"""PCM: one frozen expert per objective, mixed at every token by a small model that reads prompt and preference.

Source: "Orchestrating LLMs with Different Personalizations", arXiv 2407.04181.

    pi(v | x, y_<t, w) = sum_i a_i(x, y_<t, w) pi_i(v | x, y_<t),   a on the simplex

or, with ``space: logit``, MOD's ``log pi(v) = sum_i a_i log pi_i(v) + const``. The experts are black boxes on the bare
prompt; nothing of them is read but next-token probabilities. The preference control model
(:mod:`moalign.policies.control`) reads the prompt with the preference written beside it and the tokens so far, and
gives the weights; experts that the preference does not name (weight 0) are masked. It is trained online:

* reward of a response: ``sum_i w_i sigma(z_i(y) - z_i(y_ref))``, y_ref the base's answer to the same prompt, made once
  (the paper's mean over the named dimensions, with weights);
* ``trainer: rebel`` (the paper's): two responses of the current mixture to each prompt, and the regression of
  :mod:`moalign.losses.rebel` with ``ln pi(y) = sum_t ln sum_i a_i,t q_i,t``. The experts' probabilities q of the
  sampled tokens are computed once a rollout (in logit space those of all tokens, each time), and gradients touch the
  control model only;
* ``trainer: ppo``: clipped PPO on the same reward, one value head on the control model's state; its KL cost is to the
  mixture whose weights are the preference.

Choices of ours: training starts at the static mixture whose weights are the preference (``control.start``), so that
``steps: 0`` is MOD in either space, and ``control.start: uniform`` with it the paper's uniform baseline; the experts
are runs of their own, shared with ``mod`` and ``dpo-soups`` or, where ``rl_experts`` has their settings, with
``rewarded-soups``, and their cost is counted as this method's; preferences are drawn from a Dirichlet, so that a
preference may weigh what it names, where the paper's names it or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moalign.core.amounts import Amounts
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.policies.control_spec import ControlSpec
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, DpoConfig, NamesModels, PpoConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moalign.policies.policy import Policy
    from moalign.training.actor import Actor
    from moalign.training.online import Rollout

PHASE = "control"
"""Name of the training in record, metrics and checkpoints."""
BASE = "base_scores"
"""Name of the stage, and of its file, with the rewards of the base's own answers."""


class Config(PpoConfig, CostHints, NamesModels):
    """Settings of PCM. Those of PPO serve ``trainer: ppo`` alone, those of the engine both trainers."""

    trainer: Literal["rebel", "ppo"] = "rebel"
    space: Literal["probability", "logit"] = "probability"
    """Where the experts are mixed: the paper's choice, or MOD's, ``log pi = sum_i a_i log pi_i + const``."""
    eta: float = Field(default=1.0, gt=0)
    """REBEL's step: nats of log-ratio for a difference of rewards of 1."""
    alpha: float = Field(default=1.0, gt=0)
    """Dirichlet concentration of the preferences that are trained on."""
    control: ControlSpec = ControlSpec()
    experts: DpoConfig = DpoConfig()
    """How each expert is trained: the settings of ``modpo``, of which every corner of the simplex is one run."""
    rl_experts: PpoConfig | None = None
    """The settings of ``morlhf``, which then trains the experts in place of ``modpo``."""
    samples: int = Field(default=2, ge=2)
    epochs: int = Field(default=4, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    temperature: float = Field(default=1.0, ge=1, le=1)
    """What the experts find of the sampled tokens does not tell a mixture at another temperature."""
    reference: Literal["base"] = "base"
    ref_sync_steps: None = None
    share_prompts: Literal[False] = False
    """The experts are frozen and read beside the prompts of their own; it is ``experts.share_prompts`` that pays."""
    group_by_length: Literal[False] = False
    """What the experts find of a token is kept by the place that it was sampled at."""

    @model_validator(mode="after")
    def _pairs(self) -> Config:
        if self.trainer == "rebel" and self.samples % 2:
            raise ValueError(f"trainer: rebel compares pairs, so samples must be even; found {self.samples}")
        if self.trainer == "rebel" and self.kl_budget is not None:
            raise ValueError(f"kl_budget steers a KL term, and trainer: rebel has none; found {self.kl_budget:g}")
        return self

    def responses_sampled(self, task: Amounts) -> int:
        """The base answers each prompt of the rollouts once."""
        drawn = self.steps * self.batch
        return drawn if task.prompts is None else min(drawn, task.prompts)

    def expert_runs(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~moalign.training.settings.CostHints`."""
        from moalign.training.experts import rl_settings

        if self.rl_experts is None:
            return "modpo", self.experts.model_dump(mode="json")
        return "morlhf", rl_settings(self.rl_experts)

    @property
    def switched_off(self) -> set[str]:
        """See :class:`~moalign.training.settings.CostHints`."""
        return {"experts"} if self.rl_experts is not None else set()

    @property
    def models(self) -> dict[str, str]:
        """See :class:`~moalign.training.settings.NamesModels`."""
        return {} if self.control.model is None else {"control.model": self.control.model}

    @classmethod
    def borrows(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """The experts are those of ``mod`` on the task, unless they come from ``morlhf``."""
        return {} if given.get("rl_experts") else {"experts": "mod"}


class Pcm:
    """One expert per objective, mixed at every token by a small trained model."""

    name: ClassVar[str] = "pcm"
    summary: ClassVar[str] = "experts mixed at every token by a model that reads the preference (PCM, arXiv 2407.04181)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="mixed",
        needs_pairs=True,
        needs_online_rewards=True,
        mixes=True,
        snapshots=False,
        whole="what its experts find of the sampled tokens is known only where these were sampled",
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "steps": 2,
        "batch": 4,
        "control": {"width": 16, "layers": 1},
        "experts": {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1},
    }

    def train(self, job: Job) -> None:
        """Obtain the experts, answer with the base once, train the control model; resumes in the stage in flight."""
        from moalign.policies import control
        from moalign.policies.controlled import mixture_in_training
        from moalign.training.experts import bring_experts

        config: Config = job.config
        for model in config.models.values():  # now, and not when the experts have been trained
            control.read(model, job.task.codec)
        if config.control.form == "adapter":
            job.task.examine(config.control.lora, "control.lora")
        bring_experts(job, *config.expert_runs())
        with mixture_in_training(job) as actor:
            learn(job, actor, base_scores(job))

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the mixture, whose control model is asked with the preference."""
        from moalign.policies.controlled import orchestrated

        return orchestrated(context, preference)


def base_scores(job: Job) -> dict[str, NDArray[np.float64]]:
    """Return the normalised rewards of the base's answer, ``[objectives]``, by prompt that training will draw."""
    import torch

    from moalign.lm.generator import ModelGenerator
    from moalign.policies.policy import Policy, respond_all
    from moalign.training.rollout import drawn_prompts

    config: Config = job.config
    steps = range(config.steps)
    prompts = list(dict.fromkeys(prompt for step in steps for prompt in drawn_prompts(job, config, PHASE, step)[1]))
    if prompts and not job.stage_done(BASE):
        base = Policy(ModelGenerator(job.task.language_model), job.task.renderer.plain)
        answers = respond_all([base], prompts, job.task.sampling(job.seed, temperature=1.0))
        job.meter.add_tokens_generated(answers.tokens)
        z = job.panel.z(job.panel.score(prompts, answers.responses[0]), config.reward_cap)
        job.run.save_tensors(BASE, {"z": torch.from_numpy(z)})
        job.finish_stage(BASE)
    return dict(zip(prompts, job.run.load_tensors(BASE)["z"].numpy(), strict=True)) if prompts else {}


def learn(job: Job, actor: Actor, of_base: Mapping[str, NDArray[np.float64]]) -> None:
    """Train the actor's control model by REBEL or PPO."""
    import numpy as np
    import torch

    from moalign.losses.rebel import rebel_loss
    from moalign.training.online import OnlineTrainer, PpoTrainer
    from moalign.training.preference_draws import independent

    config, lm = job.config, job.task.language_model
    draw = independent(job.given_preferences, len(job.task.names), config.alpha)
    if config.trainer == "ppo":
        ppo = PpoTrainer(job, lm, config, draw, ["utility"], PHASE, "percent", actor)
        for rollout in ppo.rollouts():
            experience = ppo.experience(gains(rollout, of_base)[:, None])
            for _ in range(config.epochs):
                ppo.update(experience, experience.advantages[..., 0])
        return
    trainer = OnlineTrainer(job, lm, config, draw, PHASE, actor=actor)
    for rollout in trainer.rollouts():
        reward = gains(rollout, of_base)
        pairs = {"rewards": torch.as_tensor(reward.reshape(-1, 2), dtype=torch.float32)}
        for _ in range(config.epochs):
            for part in trainer.parts(np.arange(len(reward)), group=2, tensors=pairs):
                rewards = part.tensors["rewards"].reshape(-1).to(part.logps.device)
                loss = rebel_loss(part.logps, part.old_logps, rewards, config.eta).mean()
                trainer.backward(loss, {"weights_entropy": float(part.entropy.sum() / part.response_mask.sum())})
            trainer.step({"reward": float(reward.mean())})


def gains(rollout: Rollout, of_base: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return ``sum_i w_i sigma(z_i(y) - z_i(y_ref))`` of every response, ``[rows]``, each in 0 to 1."""
    import numpy as np

    preferences = np.repeat(rollout.preferences, rollout.per_prompt, axis=0)
    base = np.repeat(np.stack([of_base[prompt] for prompt in rollout.prompts]), rollout.per_prompt, axis=0)
    gained: NDArray[np.float64] = (preferences / (1.0 + np.exp(base - rollout.z))).sum(axis=1)
    return gained
