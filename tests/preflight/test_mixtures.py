"""What ``check`` says of methods that mix experts: their caches, their experts' training, the base's answers."""

from __future__ import annotations

import pytest

from moalign.config import find, load
from moalign.methods import registry
from moalign.preflight import cost, memory
from moalign.preflight.memory import Estimate


def estimates(method: str, *overrides: str) -> tuple[Estimate, cost.CostBounds]:
    path, found = find.find_recipe_file("hh-rlhf", method), registry.get(method)
    resolved = load.load_recipe(path, method, "hh-rlhf", overrides, found.Config)
    policy = memory.sizes_of(str(resolved.card.model))
    assert policy is not None
    able = found.capabilities
    return memory.estimate(resolved, policy, able), cost.estimate(resolved, able, policy)


def part(estimate: Estimate, phase: str, name: str) -> float:
    (of_phase,) = [each for each in estimate.phases if each.name == phase]
    return of_phase.parts[name]


@pytest.mark.parametrize("method", ["mod", "pcm"])
def test_every_expert_keeps_a_cache_while_a_mixture_answers(method: str) -> None:
    single, mixture = (estimates(name)[0] for name in ("modpo", method))
    for name in ("KV cache", "adapters"):
        assert part(mixture, "answering", name) == 3 * part(single, "answering", name)
    assert part(mixture, "sampling the base", "KV cache") == part(single, "sampling the base", "KV cache")


def test_soups_answer_with_one_adapter_whose_rank_is_the_sum_of_its_experts() -> None:
    single, soup = (estimates(name)[0] for name in ("modpo", "dpo-soups"))
    assert part(soup, "answering", "adapters") == 3 * part(single, "answering", "adapters")
    assert part(soup, "answering", "KV cache") == part(single, "answering", "KV cache")


def test_the_bounds_of_pcm_by_hand() -> None:
    """Three experts of 5 steps of 96 pairs; 10 rollouts of 4 prompts, 2 answers each, and the base's own to each."""
    _, bounds = estimates("pcm", "steps=10", "batch=4", "epochs=3", "experts.steps=5")
    assert bounds.policies == 1
    assert bounds.reward_calls == 3 * (10 * 4 * 2 + 10 * 4)
    assert bounds.tokens_generated == (10 * 4 * 2 + 10 * 4) * 128
    assert bounds.tokens_trained == 3 * 5 * 96 * 2 * 512 + 10 * 4 * 2 * 3 * (384 + 128)


def test_experts_by_reinforcement_learning_take_the_place_of_the_others() -> None:
    """Three of them, of 7 steps of 6 answers."""
    rl = 'rl_experts={"steps": 7, "batch": 6}'
    estimate, bounds = estimates("pcm", "steps=10", "batch=4", "epochs=1", rl)
    assert bounds.reward_calls == 3 * (3 * 7 * 6 + 10 * 4 * 2 + 10 * 4)
    assert bounds.tokens_trained == (3 * 7 * 6 + 10 * 4 * 2) * (384 + 128)
    names = {phase.name for phase in estimate.phases}
    assert "rl_experts: update" in names and "experts: update" not in names


def test_checkpointing_is_counted_where_the_control_model_is_an_adapter() -> None:
    """The inputs of 32 layers of 4,096 half-precision numbers a token, and what one layer keeps; of no other form."""
    phase, few = "training: update", ("micro_batch=8", "policy.lora.dropout=0", "space=probability")
    on = (*few, "policy.gradient_checkpointing=true")
    plain, again = (part(estimates("pcm", "control.form=adapter", *how)[0], phase, "activations") for how in (few, on))
    tokens = 8 * (384 + 128)
    assert again == pytest.approx(tokens * 32 * 4096 * 2 + plain / 32, rel=1e-6)
    assert len({part(estimates("pcm", "control.form=small", *how)[0], phase, "activations") for how in (few, on)}) == 1


def test_in_logit_space_each_expert_s_logits_are_held_at_every_place() -> None:
    """Four rows, 129 places, 32,000 words: of three experts bfloat16 logits and float32 log-probabilities, two sums."""
    update = "training: update"
    probability, logit = (estimates("pcm", f"space={space}")[0] for space in ("probability", "logit"))
    assert part(logit, update, "logits") == 4 * 129 * 32000 * (3 * (2 + 4) + 8)
    assert all("logits" not in each.parts for each in probability.phases if each.name == update)


def test_drawing_from_a_nucleus_takes_a_sorted_copy_of_the_distribution() -> None:
    plain, nucleus = (estimates("sft", f"task.generation.top_p={top_p}")[0] for top_p in (1.0, 0.9))
    rows, words = 32, 32_000
    assert part(plain, "answering", "logits") == rows * words * (2 + 12)
    assert part(nucleus, "answering", "logits") == rows * words * (2 + 33)


def test_a_group_of_answers_shares_its_prompt_in_the_estimate_too() -> None:
    """16 rows in hand: of 8 answers to a prompt 2 prompts, of pairs 8, whose tokens pass through the model once."""
    common = ("share_prompts=true", "micro_batch=16", "samples=8", "batch=8")
    kept = {}
    for method in ("grpo", "mo-odpo"):
        for shares in (True, False):
            estimate, _ = estimates(method, *common, f"share_prompts={shares}")
            kept[method, shares] = part(estimate, "training: update", "activations")
    assert kept["grpo", False] == kept["mo-odpo", False]
    assert kept["grpo", True] < kept["mo-odpo", True] < kept["mo-odpo", False]
