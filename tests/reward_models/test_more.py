"""MORE: the head's gradient in closed form against autograd, the weights, and the weighted loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moalign.reward_models.more import Balancer, HeadWatch, head_gradients, weighted


def batch(pairs: int = 12, width: int = 5, groups: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    winner, loser = torch.randn(2, pairs, width, generator=make)
    head = torch.randn(width, generator=make)
    group = torch.arange(pairs) % groups
    return winner, loser, head, group


def test_closed_form_equals_autograd_on_a_linear_head() -> None:
    winner, loser, head, group = batch()
    gradients = head_gradients(winner, loser, (winner - loser) @ head, group, 3)
    for number in range(3):
        weight = head.clone().requires_grad_()
        mine = group == number
        loss = -F.logsigmoid((winner[mine] - loser[mine]) @ weight).mean()
        (expected,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(gradients[number], expected, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    """One pair, delta 0: g = -sigma(0) * (z_w - z_l) = -(1/2) * (2, -4)."""
    gradients = head_gradients(
        torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 4.0]]), torch.zeros(1), torch.tensor([0]), 2
    )
    assert gradients.tolist() == [[-1.0, 2.0], [0.0, 0.0]]  # the second group has no pairs


FAMILIES = ("llama", "gpt2", "qwen2", "bert", "deberta", "bart")


def classifier(family: str) -> Any:
    import transformers as t

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    common = {"vocab_size": 40, "num_labels": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    if family == "gpt2":
        config: Any = t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **common)
    elif family == "bart":
        sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
        config = t.BartConfig(
            d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, **sides, **common
        )
    else:
        kinds = {"llama": t.LlamaConfig, "qwen2": t.Qwen2Config, "bert": t.BertConfig, "deberta": t.DebertaV2Config}
        more = {"num_key_value_heads": 2} if family in ("llama", "qwen2") else {}
        config = kinds[family](**size, **more, **common)
    torch.manual_seed(len(family))
    model = t.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_equals_autograd_on_real_classifiers(family: str) -> None:
    """Padding on the right, winners first: what the head reads is what the model reads, whatever the architecture."""
    model = classifier(family)
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (8, 10), generator=make)
    mask = torch.ones_like(ids)
    for row, length in enumerate([10, 7, 4, 9, 10, 3, 6, 8]):
        ids[row, length - 1] = 2  # BART reads at its end token
        ids[row, length:], mask[row, length:] = 0, 0
    watch = HeadWatch(model)
    rewards = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    winner, loser = watch.states(ids, pad=0).chunk(2)
    first, second = rewards.chunk(2)
    delta = first - second
    group = torch.tensor([0, 1, 0, 1])
    gradients = head_gradients(winner, loser, delta.detach(), group, 2)
    for number in range(2):
        loss = -F.logsigmoid(delta[group == number]).mean()
        (expected,) = torch.autograd.grad(loss, watch.layer.weight, retain_graph=True)
        torch.testing.assert_close(gradients[number], expected[0], rtol=1e-5, atol=1e-5)
    assert gradients.abs().max() > 1e-3


def test_equal_weights_are_the_plain_mean() -> None:
    winner, loser, head, group = batch(groups=4)
    delta = (winner - loser) @ head
    loss = weighted(delta, group, torch.full((4,), 0.25))
    torch.testing.assert_close(loss, -F.logsigmoid(delta).mean())


def test_weights_scale_their_groups_and_get_no_gradient() -> None:
    delta = torch.tensor([0.3, -1.2, 0.5, 2.0], requires_grad=True)
    group = torch.tensor([0, 1, 1, 1])
    weights = torch.tensor([0.25, 0.75])
    loss = weighted(delta, group, weights)
    plain = -F.logsigmoid(delta)
    torch.testing.assert_close(loss, 0.25 * plain[0] + 0.75 * plain[1:].mean())
    (slope,) = torch.autograd.grad(loss, delta)
    torch.testing.assert_close(slope, -torch.sigmoid(-delta.detach()) * torch.tensor([0.25, 0.25, 0.25, 0.25]))


def test_a_group_that_goes_its_own_way_is_weighed_by_the_min_norm_point() -> None:
    """Unit gradients at angles 0, 90 and 90: the nearest point of the simplex halves between the directions."""
    winner = torch.tensor([[2.0, 0.0], [0.0, 6.0], [0.0, 1.0]])
    weights = Balancer(3, normalise=True, momentum=0.99).weights(
        winner, torch.zeros(3, 2), torch.zeros(3), torch.tensor([0, 1, 2])
    )
    assert weights[0].item() == pytest.approx(0.5, abs=1e-6)
    assert weights[1:].sum().item() == pytest.approx(0.5, abs=1e-6)


def test_normalising_is_what_makes_scales_irrelevant() -> None:
    winner = torch.tensor([[2.0, 0.0], [0.0, 6.0]])
    given = winner, torch.zeros(2, 2), torch.zeros(2), torch.tensor([0, 1])
    assert Balancer(2, True, 1.0).weights(*given).tolist() == pytest.approx([0.5, 0.5])
    # Without it the shorter gradient gets the more: c = <q2, q2 - q1> / ||q1 - q2||^2 = 9 / 10.
    assert Balancer(2, False, 1.0).weights(*given).tolist() == pytest.approx([0.9, 0.1])


def test_two_normalised_groups_always_weigh_the_same() -> None:
    """Of two vectors of length 1 the shortest mixture is their middle, whatever the angle: MORE is multitask there."""
    for seed in range(5):
        winner, loser, head, group = batch(groups=2, seed=seed)
        weights = Balancer(2, True, 0.99).weights(winner, 3 * loser, (winner - loser) @ head, group)
        np.testing.assert_allclose(weights, [0.5, 0.5], atol=1e-6)


def test_momentum_keeps_a_hundredth_of_the_old() -> None:
    first, other = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    given = torch.zeros(2, 2), torch.zeros(2), torch.tensor([0, 1])
    balancer = Balancer(2, normalise=False, momentum=0.99)
    balancer.weights(first, *given)
    balancer.weights(other, *given)
    assert balancer.memory is not None
    expected = [[-0.01 * 1.0, -0.99 * 2.0], [-0.99 * 2.0, -0.01 * 1.0]]
    np.testing.assert_allclose(balancer.memory.numpy(), expected, rtol=1e-6)


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = classifier("llama")
    model.score.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable linear layer with 1 outputs"):
        HeadWatch(model)


def test_gradients_at_right_angles_have_weights_too() -> None:
    """A Gram matrix that was multiplied in float32 is not symmetric where two gradients are nearly at right angles, and
    was refused: for one in five of such draws.
    """
    for seed in range(40):
        torch.manual_seed(seed)
        inputs = torch.randn(5, 64)
        weights = Balancer(5, normalise=True, momentum=1.0).weights(
            inputs, torch.zeros(5, 64), torch.zeros(5), torch.arange(5)
        )
        assert float(weights.sum()) == pytest.approx(1)
