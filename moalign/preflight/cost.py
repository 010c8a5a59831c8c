"""What a recipe costs at most, before it runs: tokens and scores as the meter counts them, rough hours on its GPU.

The counts come from what the method's settings say of themselves (:class:`~moalign.training.settings.CostHints`) and
from the task's own data; for every method they are compared with the record of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moalign.config.load import ResolvedRequest
from moalign.config.strict import Strict
from moalign.core import preferences
from moalign.core.amounts import Amounts
from moalign.core.preferences import Preference
from moalign.lm.architecture import Architecture
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.preflight.memory import WIDTH, stages
from moalign.tasks.task import Task
from moalign.training import experts
from moalign.training.settings import CostHints, DpoStage, OnlineConfig, SftConfig

GPUS = {
    # name: (dense bfloat16 TFLOP/s, GB/s), from the makers' data sheets
    "A6000": (155.0, 768.0),
    "A100": (312.0, 2039.0),
    "H100": (989.0, 3350.0),
    "H200": (989.0, 4800.0),
    "RTX 4090": (165.0, 1008.0),
    "RTX 3090": (71.0, 936.0),
}
CARDS = {"RTX 3090": 24, "RTX 4090": 24, "A6000": 48, "A100": 80, "H100": 80, "H200": 141}
"""Memory of each, in GiB."""
TRAINING_SHARE = 0.35
"""Share of a GPU's peak that training reaches (assumed)."""
DECODING_SHARE = 0.5
"""Share of a GPU's memory bandwidth that decoding reaches (assumed)."""


@dataclass(frozen=True)
class FirstUse:
    """What the first run of a task does for all runs and no record counts: scale of the scores, length of answers."""

    responses_sampled: int = 0
    tokens_generated: int = 0
    reward_calls: int = 0


@dataclass(frozen=True)
class CostBounds:
    """Upper bounds; every response as long as it may be, every row as long as it may be."""

    policies: int
    """Separate training runs inside the recipe."""
    experts: int
    """Policies trained beside them in runs of their own; their cost is counted whether they are found or trained."""
    responses_sampled: int
    tokens_generated: int
    tokens_trained: int
    reward_calls: int
    gpu: str | None
    hours: float | None
    """None when the GPU is not one of :data:`GPUS` or the base's size is not known."""
    first_use: FirstUse = field(default_factory=FirstUse)
    unknown: list[str] = field(default_factory=list)
    """What is not counted, because it is not known yet; without it the bounds are no bounds."""


@dataclass
class _Work:
    """Sums over a run and the runs of its experts."""

    sampled: int = 0
    """Responses."""
    scored: int = 0
    """Responses, each on every objective."""
    trained: int = 0
    """Tokens."""
    waits: int = 0
    """Batches sampled one after the other: what decoding waits for."""
    experts: int = 0


def estimate(
    resolved: ResolvedRequest,
    capabilities: Capabilities,
    policy: Architecture | None,
    task: Task | None = None,
    given: Sequence[Preference] | None = None,
) -> CostBounds:
    """Return the training cost of a recipe; answering and judging come on top.

    Args:
        policy: sizes of the base; None: they are not known, and neither are the hours.
        task: the recipe's, whose data is counted; None: it cannot be read yet.
        given: the preferences to train, where the request names them; None: the recipe's, or the task's grid.
    """
    config, card = resolved.config, resolved.card
    count, longest = len(card.objectives), card.generation.max_new_tokens
    counted = None if task is None else task.amounts()
    amounts = counted or Amounts(count)
    unknown = [] if counted else ["responses of the task's own that training may learn from, its data not being here"]
    policies, work, aside = _policies(resolved, capabilities, given), _Work(), amounts.for_scale
    own = config.own_scorers if isinstance(config, CostHints) else None
    if capabilities.trains:
        _add(work, resolved, config, policies, amounts)
        if isinstance(config, CostHints):
            aside += config.reads(amounts)
        else:
            unknown.append(f"what {resolved.recipe.method} samples and scores beside its stages, which it does not say")
    gpu, hours = _hours(resolved, policy, work.trained, work.waits * longest)
    return CostBounds(
        policies=policies,
        experts=work.experts,
        responses_sampled=work.sampled,
        tokens_generated=work.sampled * longest,
        tokens_trained=work.trained,
        reward_calls=work.scored * (own or count),
        gpu=gpu,
        hours=hours,
        first_use=FirstUse(aside.sampled, aside.sampled * longest, aside.rows * count),
        unknown=unknown,
    )


def _add(work: _Work, resolved: ResolvedRequest, config: Strict, policies: int, amounts: Amounts) -> None:
    """Add what a run of ``policies`` policies costs by its settings, the runs of its experts included."""
    hints, limits = config if isinstance(config, CostHints) else CostHints(), resolved.card.generation
    between, own = hints.responses_sampled(amounts), hints.learns_from(amounts)
    work.sampled += between + own.sampled
    work.scored += between + own.rows
    work.waits += -(-(between + own.sampled) // limits.batch_size)
    for name, stage in stages(config):
        if name.split(".")[0] not in experts.STAGES:  # those are of other runs
            times = policies * (getattr(config, hints.repeated_by[name]) if name in hints.repeated_by else 1)
            _add_stage(work, stage, times, limits.max_tokens)
    runs = hints.expert_runs()
    if runs is not None:
        method, settings = runs
        work.experts += amounts.objectives
        _add(work, resolved, registry.get(method).Config.model_validate(settings), amounts.objectives, amounts)


def _add_stage(work: _Work, stage: SftConfig | OnlineConfig, times: int, row_tokens: int) -> None:
    if isinstance(stage, OnlineConfig):
        rows = times * stage.steps * stage.rows
        work.sampled += rows
        work.scored += rows
        work.trained += rows * stage.epochs * row_tokens
        work.waits += times * stage.steps * -(-stage.rows // stage.rows_at_once)
    else:
        per_row = stage.rows_per_pair if isinstance(stage, DpoStage) else 1
        work.trained += times * stage.steps * stage.batch * per_row * stage.max_tokens


def _policies(resolved: ResolvedRequest, capabilities: Capabilities, given: Sequence[Preference] | None) -> int:
    """Return how many policies are trained one after the other."""
    if not capabilities.trains:
        return 0
    if capabilities.one_policy or (isinstance(resolved.config, CostHints) and resolved.config.one_policy):
        return 1
    if given is not None:
        return len(given)
    if resolved.recipe.prefs is not None:
        return len(resolved.recipe.prefs)
    return len(preferences.grid_of(len(resolved.card.objectives), resolved.card.grid))


def _hours(
    resolved: ResolvedRequest, policy: Architecture | None, trained: int, passes: int
) -> tuple[str | None, float | None]:
    """Return the GPU, where it is known, and the hours of training and of ``passes`` forward passes of one token."""
    name = next((gpu for gpu in GPUS if gpu in resolved.recipe.needs.gpu), None)
    if name is None or policy is None or not policy.parameters:
        return name, None
    flops, bandwidth = GPUS[name]
    # Frozen base with adapters: forward 2, backward to the activations 2, recomputed forward 2 operations a parameter;
    # the last two in those layers alone that the backward pass reaches.
    reached = min(1.0, (resolved.recipe.policy.lora.layers or policy.layers) / policy.layers)
    training = trained * (2 + 4 * reached) * policy.parameters / (flops * 1e12 * TRAINING_SHARE)
    decoding = passes * policy.parameters * WIDTH[resolved.card.dtype] / (bandwidth * 1e9 * DECODING_SHARE)
    return name, (training + decoding) / 3600
