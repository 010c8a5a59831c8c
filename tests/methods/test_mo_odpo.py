"""MO-ODPO: pairs, labels, and which preferences are drawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.experiment.train import TrainRequest, plan, train
from moalign.losses.dpo import pair_loss
from moalign.methods import mo_odpo
from moalign.methods.mo_odpo import Config, Pairs, best_against_worst, loss, paired
from moalign.training import preference_draws
from moalign.training.online import Part
from moalign.training.preference_draws import Draw
from moalign.training.rollout import Rollout

W = np.array([[0.25, 0.75], [1.0, 0.0]])
TEXTS = ["a", "b", "c", "d"]


def rewards(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def linear(z: np.ndarray, per_prompt: int, w: np.ndarray = W) -> np.ndarray:
    """Return w . z of every row."""
    return (z * np.repeat(w, per_prompt, axis=0)).sum(axis=1)


# -- pairs ---------------------------------------------------------------------------------------------------------


def test_the_better_response_by_the_weighted_score_comes_first() -> None:
    # w.r: .25 * 4 + .75 * 0 = 1 against .25 * 0 + .75 * 2 = 1.5; then 4 against 0.
    rows, labels = best_against_worst(z := rewards((4, 0), (0, 2), (4, 0), (0, 2)), linear(z, 2), 2, TEXTS, "weighted")
    assert rows.tolist() == [[1, 0], [2, 3]]
    assert labels.tolist() == [[1.0], [1.0]]


def test_of_more_than_two_the_best_meets_the_worst() -> None:
    z = rewards((0, 1), (0, 3), (0, -1), (5, 0), (1, 9), (2, 2))
    rows, labels = best_against_worst(z, linear(z, 3), 3, ["a", "b", "c", "d", "e", "f"], "weighted")
    assert rows.tolist() == [[1, 2], [3, 4]]
    assert labels.tolist() == [[1.0], [1.0]]


def test_exact_ties_have_label_zero() -> None:
    # .25 * 3 + .75 * 0 = .25 * 0 + .75 * 1, exactly
    _, labels = best_against_worst(z := rewards((3, 0), (0, 1), (3, 0), (0, 1)), linear(z, 2), 2, TEXTS, "weighted")
    assert labels.tolist() == [[0.0], [1.0]]
    _, labels = best_against_worst(np.zeros((6, 2)), np.zeros(6), 3, ["a", "b", "c", "d", "e", "f"], "weighted")
    assert labels.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("pairing", ["weighted", "per_objective"])
def test_identical_responses_make_no_pair_whatever_their_scores(pairing: Any) -> None:
    _, labels = best_against_worst(
        z := rewards((4, 0), (0, 2), (4, 0), (0, 2)), linear(z, 2), 2, ["same", "same", "c", "d"], pairing
    )
    assert not labels[0].any()
    assert labels[1].any()


def test_a_label_per_objective_keeps_the_order_of_sampling() -> None:
    rows, labels = best_against_worst(
        z := rewards((1, 5), (3, 2), (7, 0), (7, 1)), linear(z, 2), 2, TEXTS, "per_objective"
    )
    assert rows.tolist() == [[0, 1], [2, 3]]
    assert labels.tolist() == [[-1.0, 1.0], [0.0, -1.0]]


@given(st.integers(1, 6), st.integers(2, 5), st.integers(2, 3), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_pairs_hold_for_any_numbers(prompts: int, samples: int, objectives: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.integers(-2, 3, size=(prompts * samples, objectives)).astype(float)  # small integers: ties happen
    w = rng.dirichlet(np.ones(objectives), size=prompts)
    rows, labels = best_against_worst(z, linear(z, samples, w), samples, [str(i) for i in range(len(z))], "weighted")
    assert rows.shape == (prompts, 2)
    assert labels.shape == (prompts, 1)
    for i, ((best, worst), label) in enumerate(zip(rows.tolist(), labels[:, 0].tolist(), strict=True)):
        own = range(i * samples, (i + 1) * samples)
        assert best in own
        assert worst in own
        utility = {row: float(z[row] @ w[i]) for row in own}
        assert utility[best] == pytest.approx(max(utility.values()))
        assert utility[worst] == pytest.approx(min(utility.values()))
        assert label in (0.0, 1.0)
        if max(utility.values()) - min(utility.values()) > 1e-9:
            assert label == 1.0


def test_a_label_per_objective_needs_exactly_two_samples() -> None:
    assert Config(pairing="per_objective").samples == 2
    with pytest.raises(ValueError, match="per_objective needs samples: 2; found 4"):
        Config(pairing="per_objective", samples=4)
    with pytest.raises(ValueError, match="samples"):
        Config(samples=1)
    with pytest.raises(ValueError, match="sft_coef needs pairing: weighted"):
        Config(pairing="per_objective", sft_coef=0.1)


# -- the loss --------------------------------------------------------------------------------------------------------


def rollout(z: np.ndarray, texts: list[str]) -> Rollout:
    nothing: Any = None
    return Rollout(["p", "q"], W, len(z) // 2, nothing, texts, z, z, nothing)


def test_pairs_that_teach_nothing_are_left_out_and_counted() -> None:
    chosen = paired(rollout(rewards((3, 0), (0, 1), (3, 0), (0, 1)), TEXTS), Config(), 0.1)
    assert chosen.rows.tolist() == [2, 3]
    assert chosen.dropped == 1
    assert chosen.metrics == {"dropped": 1.0, "dropped_share": 0.5}
    assert chosen.tensors["labels"].tolist() == [[1.0]]
    assert chosen.tensors["weights"].tolist() == [[1.0]]
    assert chosen.tensors["preferences"].tolist() == [[1.0, 0.0]]


def test_when_all_tie_nothing_is_left() -> None:
    chosen = paired(rollout(np.zeros((4, 2)), TEXTS), Config(), 0.1)
    assert len(chosen.rows) == 0
    assert chosen.dropped == 2
    assert chosen.metrics == {"dropped": 2.0, "dropped_share": 1.0}


def test_labels_per_objective_weigh_as_the_preference_does() -> None:
    chosen = paired(rollout(rewards((1, 5), (3, 2), (7, 0), (7, 0)), TEXTS), Config(pairing="per_objective"), 0.1)
    assert chosen.rows.tolist() == [0, 1]
    assert chosen.tensors["labels"].tolist() == [[-1.0, 1.0]]
    assert chosen.tensors["weights"].tolist() == [[0.25, 0.75]]


def test_what_is_kept_brings_its_own_weights() -> None:
    """The first pair is a tie on both objectives: what is left is the second prompt's, weights and all."""
    chosen = paired(rollout(rewards((2, 2), (2, 2), (7, 0), (3, 1)), TEXTS), Config(pairing="per_objective"), 0.1)
    assert chosen.rows.tolist() == [2, 3]
    assert chosen.tensors["labels"].tolist() == [[1.0, -1.0]]
    assert chosen.tensors["weights"].tolist() == chosen.tensors["preferences"].tolist() == [[1.0, 0.0]]


def test_a_tie_in_all_that_a_preference_weighs_teaches_nothing() -> None:
    """The second prompt's responses differ in the second objective alone, which its preference (1, 0) leaves out."""
    chosen = paired(rollout(rewards((1, 5), (3, 2), (7, 0), (7, 4)), TEXTS), Config(pairing="per_objective"), 0.1)
    assert chosen.rows.tolist() == [0, 1]
    assert chosen.dropped == 1


def test_the_loss_of_a_part_by_hand() -> None:
    """D+ = 2, D- = -1 in the first pair (.554355), the other way round in the second (.854355): mean .704355."""
    lengths = torch.tensor([4, 1, 1, 1])
    mask = torch.arange(4)[None] < lengths[:, None]
    logps = torch.zeros(4, 4)
    logps[0], logps[1:, 0] = 0.5, torch.tensor([-1.0, -1.0, 2.0])
    entropy = torch.zeros(4, 4)
    entropy[0], entropy[1:, 0] = torch.tensor([1.0, 3.0, 2.5, 1.5]), torch.tensor([2.0, 0.5, 0.1])
    part = Part(
        logps=logps,
        entropy=entropy,
        response_mask=mask,
        old_logps=logps,
        ref_logps=torch.zeros(4, 4),
        tensors={"labels": torch.ones(2, 1), "weights": torch.ones(2, 1), "preferences": torch.tensor(W).float()},
    )
    value, told = loss(part, Config(), ["one", "two"], 0.1)
    assert value.item() == pytest.approx(0.704355, abs=1e-5)
    assert told["accuracy"] == (1.0, 2)
    assert told["entropy"] == pytest.approx((2 + 2 + 0.5 + 0.1) / 4)
    assert told["entropy/two"] == (pytest.approx(4.0), 2)  # the first prompt weighs the second objective most
    assert told["entropy/one"] == (pytest.approx(0.6), 2)
    # The preferred rows have log-likelihoods per token of 2 / 4 and -1 / 1, mean -.25. The rejected ones would have .5,
    # or .875 over the preferred ones' lengths; the preferred ones over the rejected ones' lengths .5.
    value, told = loss(part, Config(sft_coef=0.2), ["one", "two"], 0.1)
    assert told["nll"] == pytest.approx(0.25)
    assert value.item() == pytest.approx(0.704355 + 0.2 * 0.25, abs=1e-5)


def test_what_is_undecided_is_not_right_and_no_one_s_favourite_has_no_entropy() -> None:
    """Three pairs at ratios of 0, .5 and -.5 in favour of the better response; all weigh the first objective most."""
    logps = torch.tensor([[0.0], [0.0], [0.5], [0.0], [0.0], [0.5]])
    part = Part(
        logps=logps,
        entropy=torch.ones(6, 1),
        response_mask=torch.ones(6, 1, dtype=torch.bool),
        old_logps=logps,
        ref_logps=torch.zeros(6, 1),
        tensors={
            "labels": torch.ones(3, 1),
            "weights": torch.ones(3, 1),
            "preferences": torch.tensor([[1.0, 0.0], [0.8, 0.2], [0.6, 0.4]]),
        },
    )
    _, metrics = loss(part, Config(), ["one", "two"], 0.1)
    assert metrics == {"accuracy": (1.0, 3), "entropy": 1.0, "entropy/one": (6.0, 6), "entropy/two": (0.0, 0)}


def test_what_is_preferred_is_the_score_s_whichever_response_is_further_from_the_closed_form() -> None:
    """By advantage the first of a pair is the one that has too little so far; here s prefers the second, by 3 to 1."""
    logps = torch.tensor([[-4.0], [-1.0]])
    part = Part(
        logps=logps,
        entropy=torch.ones(2, 1),
        response_mask=torch.ones(2, 1, dtype=torch.bool),
        old_logps=logps,
        ref_logps=torch.tensor([[-2.0], [-2.0]]),
        tensors={
            "labels": torch.ones(1, 1),
            "chance": torch.full((1, 1), 0.25),
            "weights": torch.ones(1, 1),
            "preferences": torch.tensor([[1.0, 0.0]]),
        },
    )
    value, told = loss(part, Config(labels="bradley-terry", extremes="advantage", sft_coef=0.2), ["one", "two"], 1.0)
    assert told["accuracy"] == (1.0, 1)  # the policy has made what is preferred likelier: D is 1, and -2 of the other
    assert told["nll"] == pytest.approx(1.0)  # of what is preferred; the other one's is 4
    expected = 0.25 * np.log1p(np.exp(3)) + 0.75 * np.log1p(np.exp(-3))
    assert value.item() == pytest.approx(expected + 0.2 * 1.0, abs=1e-5)


# -- preferences -----------------------------------------------------------------------------------------------------


def preferences_seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Return a list that every rollout's preferences are put into from here on, ``[prompts, objectives]`` each."""
    seen: list[np.ndarray] = []
    plain = mo_odpo.paired

    def look(rollout: Rollout, *rest: Any) -> Pairs:
        seen.append(rollout.preferences)
        return plain(rollout, *rest)

    monkeypatch.setattr(mo_odpo, "paired", look)
    return seen


def test_alpha_and_resolution_are_those_of_the_draw(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[Draw] = []
    plain = preference_draws.independent
    monkeypatch.setattr(preference_draws, "independent", lambda *a: [made := plain(*a), draws.append(made)][0])
    few = (*small_task, "steps=1", "batch=4")
    train(plan(TrainRequest("mo-odpo", overrides=(*few, "alpha=0.3"), results=tmp_path)))
    drawn = draws[-1](np.random.default_rng(0), 20_000)
    assert drawn[:, 0].var() == pytest.approx(0.25 / 1.6, rel=0.03)  # m = 2: (1/4) / (2 alpha + 1)
    assert np.abs(drawn * 5 - np.rint(drawn * 5)).max() > 0.1
    train(plan(TrainRequest("mo-odpo", overrides=(*few, "resolution=5"), results=tmp_path)))
    round_ones = draws[-1](np.random.default_rng(0), 20_000)
    assert np.allclose(round_ones * 5, np.rint(round_ones * 5))


def test_only_the_vectors_given_are_trained_on(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--prefs`` reaches the prompts of every rollout; without it every prompt has a vector of its own."""
    seen = preferences_seen(monkeypatch)
    few = (*small_task, "steps=2", "batch=6", "samples=2")
    train(plan(TrainRequest("mo-odpo", overrides=few, prefs=("0.3,0.7", "1,0"), results=tmp_path)))
    assert {tuple(row) for row in np.concatenate(seen).tolist()} == {(0.3, 0.7), (1.0, 0.0)}
    seen.clear()
    train(plan(TrainRequest("mo-odpo", overrides=few, results=tmp_path)))
    assert len({tuple(row) for row in np.concatenate(seen).tolist()}) == 12


def test_the_preference_is_in_the_prompt_and_the_scorer_sees_the_bare_one(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.lm.language_model import LanguageModel
    from moalign.rewards.panel import RewardPanel

    read: list[str] = []
    scored: list[str] = []
    encode, score = LanguageModel.encode, RewardPanel.score

    def look(self: LanguageModel, texts: Any, *rest: Any) -> Any:
        read.extend(texts)
        return encode(self, texts, *rest)

    def judge(self: RewardPanel, prompts: Any, *rest: Any) -> Any:
        scored.extend(prompts)
        return score(self, prompts, *rest)

    made = plan(
        TrainRequest(
            "mo-odpo", overrides=(*small_task, "steps=1", "batch=3", "samples=2"), prefs=("0.3,0.7",), results=tmp_path
        )
    )
    _ = made.task.normaliser
    monkeypatch.setattr(LanguageModel, "encode", look)
    monkeypatch.setattr(RewardPanel, "score", judge)
    train(made)
    bare = made.task.prompts["train"]
    assert len(read) == 3
    assert all(
        text.startswith("[helpfulness 30.0% harmlessness 70.0%] ") and text.split("] ")[1] in bare for text in read
    )
    assert len(scored) == 6
    assert set(scored) <= set(bare)


# -- labels with a minimum, and other scores -----------------------------------------------------------------------


def test_bradley_terry_labels_are_least_at_the_closed_form_and_order_labels_nowhere() -> None:
    """A tabular policy over 4 answers: the gradient of the expected loss is 0 at pi_ref exp(s / beta) / Z alone."""
    torch.manual_seed(0)
    beta, s = 0.3, torch.tensor([0.0, 0.4, 1.0, -0.5], dtype=torch.float64)
    reference = torch.log_softmax(torch.randn(4, dtype=torch.float64), 0)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))

    def gradient(logits: torch.Tensor, certain: bool) -> torch.Tensor:
        logits = logits.clone().requires_grad_()
        ratio = torch.log_softmax(logits, 0) - reference
        apart = s[first] - s[second]
        labels, chance = torch.sign(apart)[:, None], torch.sigmoid(apart.abs())[:, None]
        value = pair_loss(
            ratio[first], ratio[second], labels, torch.ones_like(labels), beta, None if certain else chance
        )
        value.mean().backward()
        assert logits.grad is not None
        return logits.grad

    closed = reference + s / beta
    assert gradient(closed, certain=False).abs().max() < 1e-12
    assert gradient(closed, certain=True).abs().max() > 0.01
    logits = torch.zeros(4, dtype=torch.float64)
    for _ in range(20_000):
        logits = logits - 20 * gradient(logits, certain=False)
    torch.testing.assert_close(torch.softmax(logits, 0), torch.softmax(closed, 0), atol=1e-6, rtol=0)


def test_a_scalarisation_decides_which_two_are_paired() -> None:
    """At w = (.5, .5) the uneven (4, -1) wins linearly, the even (1, 1) by Tchebycheff."""
    z = rewards((4, -1), (1, 1), (0, 0), (4, -1), (1, 1), (0, 0))
    nothing: Any = None
    drawn = Rollout(["p", "q"], np.full((2, 2), 0.5), 3, nothing, [*"abcdef"], z, z, nothing)
    assert paired(drawn, Config(samples=3), 0.1).rows.tolist() == [0, 2, 3, 5]
    assert paired(drawn, Config(samples=3, scalarisation="tchebycheff"), 0.1).rows.tolist() == [1, 0, 4, 3]


def test_the_chance_of_a_pair_is_that_of_its_scores() -> None:
    """w.z of the pairs: 1.5 against 1 (sigma(.5) = .6225), and 4 against 0 (sigma(4) = .9820)."""
    drawn = rollout(rewards((4, 0), (0, 2), (4, 0), (0, 2)), TEXTS)
    assert paired(drawn, Config(labels="bradley-terry"), 0.1).tensors["chance"][:, 0].tolist() == pytest.approx(
        [0.62246, 0.98201], abs=1e-5
    )
    assert paired(drawn, Config(), 0.1).tensors["chance"][:, 0].tolist() == [1.0, 1.0]


def test_what_does_not_go_with_labels_per_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="per_objective orders responses by each reward alone"):
        Config(pairing="per_objective", labels="bradley-terry")
    with pytest.raises(ValueError, match="found tchebycheff, order, score"):
        Config(pairing="per_objective", scalarisation="tchebycheff")
    with pytest.raises(ValueError, match="found linear, order, advantage"):
        Config(pairing="per_objective", extremes="advantage")


def test_by_advantage_the_pair_is_what_is_furthest_from_the_closed_form() -> None:
    """s = 3, 2, 0 and D = 40, 5, 0 nats: at beta .1 s - beta D is -1, 1.5, 0: the second is paired with the first."""
    z = rewards((3, 3), (2, 2), (0, 0))
    logps = torch.tensor([[-10.0], [-5.0], [-4.0]])
    drawn: Any = SimpleNamespace(logps=logps)
    reference = logps - torch.tensor([[40.0], [5.0], [0.0]])
    one = Rollout(["p"], np.full((1, 2), 0.5), 3, drawn, ["a", "b", "c"], z, z, lambda rows: reference[rows])
    assert paired(one, Config(samples=3), 0.1).rows.tolist() == [0, 2]
    pairs = paired(one, Config(samples=3, extremes="advantage", labels="bradley-terry"), 0.1)
    assert pairs.rows.tolist() == [1, 0]
    assert pairs.tensors["chance"].item() == pytest.approx(1 / (1 + np.e))  # s still prefers the first, by 1


def test_at_the_closed_form_all_advantages_are_alike() -> None:
    """pi = pi_ref exp(s / beta) / Z: s - beta D = beta log Z for every response."""
    rng = np.random.default_rng(0)
    s, reference, beta = rng.normal(size=5), np.log(rng.dirichlet(np.ones(5))), 0.3
    logits = reference + s / beta
    log_z = np.log(np.exp(logits).sum())
    assert s - beta * (logits - log_z - reference) == pytest.approx(np.full(5, beta * log_z))
