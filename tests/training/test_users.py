"""Simulated users: what they compare, how they label, and what the encoder can read off it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.lm.language_model import LanguageModel
from moalign.methods.few_shot_steer import Config
from moalign.training.reference import mean_states
from moalign.training.users import Encoder, Pool, first, scored_pool, train_encoder


def pool(prompts: int = 40, each: int = 4, objectives: int = 2, seed: int = 0) -> Pool:
    z = np.random.default_rng(seed).standard_normal((prompts * each, objectives))
    names = [f"p{row // each}" for row in range(len(z))]
    return Pool.of(names, [Response(f"r{row}") for row in range(len(z))], z)


def test_pairs_are_different_responses_to_one_prompt() -> None:
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("a", " x"), ("b", "x"), ("c", "z")]
    own = Pool.of([p for p, _ in rows], [Response(r) for _, r in rows], np.zeros((6, 2)))
    assert own.pairs.tolist() == [[0, 1], [1, 3]]


def test_users_label_by_bradley_terry_and_see_no_pair_twice() -> None:
    own, w = pool(), np.repeat([[0.9, 0.1]], 4000, axis=0)
    chosen, rejected = own.labelled(w, 5, 2.0, np.random.default_rng(1))
    assert chosen.shape == rejected.shape == (4000, 5)
    known = {frozenset(pair) for pair in own.pairs.tolist()}
    for user in zip(chosen[:50].tolist(), rejected[:50].tolist(), strict=True):
        pairs = {frozenset(pair) for pair in zip(*user, strict=True)}
        assert len(pairs) == 5 and pairs <= known
    gap = (own.z[chosen] - own.z[rejected]) @ [0.9, 0.1]
    # Of pairs whose utilities differ by g (either way), the better one wins with sigma(2 g).
    for low, high in ((0.2, 0.4), (0.9, 1.1)):
        inside = (abs(gap) > low) & (abs(gap) < high)
        expected = (1 / (1 + np.exp(-2 * abs(gap[inside])))).mean()
        assert (gap[inside] > 0).mean() == pytest.approx(expected, abs=0.03)
    assert own.chance(np.array([0.5, 0.5]), np.array([0]), np.array([0]), 1.0).tolist() == [0.5]


def test_who_shows_how_many() -> None:
    assert first(np.array([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


def test_the_opposite_labels_are_read_as_the_mirrored_taste() -> None:
    encoder, features = Encoder(6, 2, 16, 1.0, seed=3), torch.randn(8, 6)
    a, b, known = np.arange(4)[None], np.arange(4, 8)[None], np.ones((1, 4), dtype=bool)
    mean, variance = encoder(features[a], features[b], torch.from_numpy(known))
    other, same = encoder(features[b], features[a], torch.from_numpy(known))
    torch.testing.assert_close(other, -mean)
    torch.testing.assert_close(same, variance)
    assert encoder.read(features, a, b, ~known)[0].tolist() == pytest.approx([0.5, 0.5])
    order = [2, 0, 3, 1]
    assert encoder.read(features, a[:, order], b[:, order], known) == pytest.approx(
        encoder.read(features, a, b, known), abs=1e-6
    )


class _Log:
    record = SimpleNamespace(method="few-shot-steer")

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def truncate_metrics(self, phase: str, step: int) -> None:
        self.rows.clear()

    def log(self, step: int, phase: str, **values: Any) -> None:
        self.rows.append({"step": step, "phase": phase, **values})


def _job(seed: int = 0) -> Any:
    meter = SimpleNamespace(cost=dict)
    return SimpleNamespace(seed=seed, run=_Log(), meter=meter, given_preferences=None, progress=lambda *_: None)


def test_where_embeddings_hold_the_rewards_it_reads_as_exact_inference_does() -> None:
    """Bayes on a grid knows prior, rewards and likelihood; the encoder sees labels and embeddings alone."""
    own, config = pool(200, 6), Config(sharpness=2.0, encoder={"steps": 150, "width": 16, "lr": 0.01, "draws": 2})
    features = torch.as_tensor(own.z @ np.array([[1.0, 0.5, -0.3], [0.2, -1.0, 0.4]]), dtype=torch.float32)
    job = _job()
    encoder = train_encoder(job, config, own, features)
    rng = np.random.default_rng(9)
    w = rng.dirichlet([1, 1], size=1500)
    chosen, rejected = own.labelled(w, 8, 2.0, rng)
    grid = np.linspace(0, 1, 101)
    errors = {}
    for k in (0, 2, 8):
        gaps = 2.0 * (own.z[chosen] - own.z[rejected])[:, :k]
        margins = gaps[..., :1] * grid + gaps[..., 1:] * (1 - grid)
        belief = np.exp(-np.logaddexp(0, -margins).sum(1))
        exact = (belief * grid).sum(1) / belief.sum(1)
        read = encoder.read(features, chosen, rejected, first(np.full(1500, k), 8))[:, 0]
        errors[k] = [float(np.sqrt(((guess - w[:, 0]) ** 2).mean())) for guess in (read, exact)]
    assert errors[0][0] == pytest.approx(errors[0][1], abs=0.005)
    assert errors[8][0] < errors[2][0] < errors[0][0]
    assert errors[8][0] < errors[8][1] + 0.03
    assert job.run.rows[-1]["latent_kl"] > 0.1  # what is shown moves the belief: the latent is not ignored


def test_it_is_fixed_by_the_seed() -> None:
    own, config = pool(), Config(encoder={"steps": 3, "users": 4, "width": 8})
    features = torch.as_tensor(own.z, dtype=torch.float32)
    torch.manual_seed(5)
    one = train_encoder(_job(), config, own, features).state_dict()
    torch.manual_seed(6)
    two = train_encoder(_job(), config, own, features).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = train_encoder(_job(1), config, own, features).state_dict()
    assert not torch.equal(one["body.0.weight"], other["body.0.weight"])


def test_a_pool_of_fewer_pairs_than_users_label_is_refused() -> None:
    scored = SimpleNamespace(prompts=["a"] * 3, responses=[Response(t) for t in "xyz"], raw=np.zeros((3, 2)))
    job: Any = SimpleNamespace(
        scored=lambda per_prompt: scored,
        panel=SimpleNamespace(z=lambda raw: raw),
        task=SimpleNamespace(card=SimpleNamespace(name="tiny")),
    )
    assert len(scored_pool(job, 4, 3).pairs) == 3
    with pytest.raises(RequestError, match=r"a user labels 4 pairs, but .* task tiny make 3 pairs .*per_prompt: 4"):
        scored_pool(job, 4, 4)


def test_states_are_those_of_the_responses_own_tokens(lm: LanguageModel) -> None:
    """Against one row at a time, unpadded; answers of one token are told apart by that token alone."""
    rows = [([1, 5, 6, 7], 1), ([1, 5, 6, 8], 1), ([1, 9, 10, 11, 12, 13], 3)]
    found = mean_states(lm, rows)
    for (ids, length), mean in zip(rows, found, strict=True):
        states = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -length:]
        torch.testing.assert_close(mean, states.mean(0).detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[1])
