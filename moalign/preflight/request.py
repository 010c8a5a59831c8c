"""What is wrong with a request whatever its data and model are: ``check`` and ``train`` refuse the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from moalign.config.load import ResolvedRequest
from moalign.core import preferences, processes
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.core.seeds import MOST
from moalign.lm import backends
from moalign.methods.base import Method
from moalign.runs import trackers
from moalign.training.settings import CostHints, OnlineConfig, RefusesTasks, SftConfig


def require_sound(method: Method, resolved: ResolvedRequest, seed: int | None = None) -> None:
    """Raise RequestError for trackers that are not installed, and for what the method cannot have.

    That is, a number of objectives, snapshots, a ``seed`` that is none, or packages that ``policy`` needs.
    """
    problems: list[str] = []
    try:
        trackers.require_installed(resolved.recipe.trackers)
    except RequestError as error:
        problems += error.problems
    card, count = resolved.card, len(resolved.card.objectives)
    if method.capabilities.objectives == "2" and count != 2:
        problems.append(f"method {method.name} works with 2 objectives; task {card.name} has {count}")
    if resolved.recipe.snapshots and not method.capabilities.snapshots:
        problems.append(
            f"snapshots: {method.name} trains no adapter of its own that answers, so there is none to keep; leave "
            "snapshots away, or train a method that has them (moalign show METHOD)"
        )
    if seed is not None and not 0 <= seed <= MOST:
        problems.append(f"seed: found {seed}; allowed: 0 to {MOST}")
    problems += backends.problems(resolved.recipe.policy, card)
    problems += backends.engine_problems(
        resolved.recipe.rollout,
        card,
        resolved.recipe.policy.lora.r,
        count if method.capabilities.interpolates else 1,
        method.capabilities.mixes,
    )
    if resolved.recipe.policy.gradient_checkpointing and _shares_prompts(resolved.recipe.config):
        problems.append(
            "share_prompts: gradient checkpointing keeps no cache, so a prompt cannot be read once for several "
            "responses; switch off one of the two (policy.gradient_checkpointing)"
        )
    started = processes.launched()[1]
    if started > 1 and resolved.recipe.rollout.engine == "vllm":
        problems.append(
            f"rollout.engine: found vllm, and a launcher has started {started} processes; vLLM samples for one alone: "
            "leave the setting away, or start one process"
        )
    if started > 1 and method.capabilities.whole:
        problems.append(
            f"{method.name} cannot be trained by {started} processes: {method.capabilities.whole}; start it without a "
            "launcher, or with one process"
        )
    elif started > 1:
        problems += _unequal(resolved.config, started)
    if problems:
        raise RequestError(*problems)


def _unequal(config: BaseModel, count: int, where: str = "") -> Iterator[str]:
    """Yield what is wrong with the batches of stages that ``count`` processes are to share."""
    if isinstance(config, SftConfig | OnlineConfig) and config.steps and config.batch % count:
        yield (
            f"{where}batch: found {config.batch}, which {count} processes cannot share equally; allowed: multiples of "
            f"{count}, or another number of processes"
        )
    off = config.switched_off if isinstance(config, CostHints) else set()
    for name, value in config:
        if isinstance(value, BaseModel) and name not in off:
            yield from _unequal(value, count, f"{where}{name}.")


def _shares_prompts(settings: Any) -> bool:
    """Whether a stage of these settings, or the method itself, reads shared prompts once."""
    if not isinstance(settings, dict):
        return False
    return settings.get("share_prompts") is True or any(map(_shares_prompts, settings.values()))


def to_train(
    method: Method, resolved: ResolvedRequest, given: Sequence[Preference] | None
) -> tuple[list[Preference] | None, list[Preference]]:
    """Return the vectors to train on, and those that training must not see.

    ``given`` are those that the request names; without them, and nothing held out, the first are None: the task's
    distribution. Raises RequestError when the method could not answer for what is held out, or nothing is left.
    """
    card, names = resolved.card, resolved.card.objective_names
    trained = None if given is None else list(dict.fromkeys(given))
    held = [preferences.validate(row, names, "recipe: holdout") for row in resolved.recipe.holdout or ()]
    if not held:
        return trained, []
    if not (method.capabilities.steerable and method.capabilities.one_policy):
        raise RequestError(
            f"holdout: {method.name} answers only for preferences that it was trained on, so there is nothing to hold "
            "out; leave holdout away, or train a method with one policy for every preference (moalign ls methods)"
        )
    config = resolved.config
    for w in config.expert_vectors(len(names)) if isinstance(config, CostHints) else ():
        if any(preferences.same(w, other) for other in held):
            raise RequestError(
                f"holdout: an expert of {method.name} is trained at {preferences.label(w)}; hold out other preferences"
            )
    every = trained or preferences.grid_of(len(names), card.grid)
    trained = [w for w in every if not any(preferences.same(w, other) for other in held)]
    if not trained:
        raise RequestError("holdout: it holds every preference to train on; leave at least one to be trained")
    return trained, list(dict.fromkeys(held))


def require_suited(resolved: ResolvedRequest, trained: Sequence[Preference] | None) -> None:
    """Raise RequestError where the method's settings do not suit the card's objectives, or what is ``trained``."""
    card = resolved.card
    if isinstance(resolved.config, RefusesTasks):
        vectors = trained or preferences.grid_of(len(card.objectives), card.grid)
        resolved.config.require_suited(card.objective_names, vectors)


def of_recipe(resolved: ResolvedRequest) -> list[Preference] | None:
    """Return the vectors that the recipe names; None: none."""
    rows, names = resolved.recipe.prefs, resolved.card.objective_names
    return None if rows is None else [preferences.validate(row, names, "recipe: prefs") for row in rows]
