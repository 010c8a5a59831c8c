"""MaxMin-RLHF: the weights of the game by hand, what it sees and what it does not, and what may be asked of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.cli.main import main
from moalign.core.progress import silent
from moalign.experiment.train import Plan, TrainRequest, context_of, plan, train
from moalign.lm import adapters
from moalign.methods.maxmin_rlhf import Config, weights
from moalign.preflight import cost
from moalign.preflight.check import check
from moalign.runs.meter import Meter
from moalign.training import user_rewards
from moalign.training.user_rewards import panel_of_groups, states

FEW = ("steps=2", "batch=4", "log_every=1", "lr=0.01", "pairs=8", "starts=1", "policy.lora={r: 4, alpha: 8}")


def of_groups(small_task: tuple[str, ...], results: Path, *more: str) -> Plan:
    annotators = "task.sandbox.annotators={groups: diverse, users: 3, pairs: 150, sharpness: 2}"
    request = TrainRequest(
        "maxmin-rlhf", task="sandbox-groups", overrides=(*small_task, annotators, *FEW, *more), results=results
    )
    return plan(request)


def test_weights_by_hand() -> None:
    """exp(0), exp(-.5 log 4) and exp(-.5 log 16), over their sum 1 + 1/2 + 1/4; the worst of a step takes all.

    Damped by 2, a step with means 0, 0, -log 2 makes 4, 2, 4 of 4, 2, 1.
    """
    sums = [0.0, np.log(4), np.log(16)]
    undamped, damped = Config(eta=0.5, damping=0), Config(eta=0.5, damping=2)
    assert weights(sums, np.array([3.0, 2.0, 1.0]), undamped) == pytest.approx(np.array([4, 2, 1]) / 7)
    assert weights(sums, np.array([0.0, 0.0, -np.log(2)]), damped) == pytest.approx(np.array([4, 2, 4]) / 10)
    alone = Config(play="worst")
    assert weights(sums, np.array([3.0, 1.0, 2.0]), alone).tolist() == [0, 1, 0]
    assert weights(sums, np.array([1.0, 1.0, 2.0]), alone).tolist() == [1, 0, 0]


def test_the_game_finds_the_mixture_that_serves_the_worst_off_best() -> None:
    """Rows are answers, columns groups: half of the first and half of the second is worth 1 to both, and no answer is.

    A policy that takes the best answer for the weights, step by step, comes to that on average.
    """
    worth, config = np.array([[2.0, 0.0], [0.0, 2.0], [0.9, 0.9]]), Config(eta=0.1, damping=0)
    sums, taken = np.zeros(2), np.zeros(3)
    for _ in range(400):
        means = worth[int((worth @ weights(sums.tolist(), sums, config)).argmax())]
        taken += (worth == means).all(axis=1)
        sums += means
    assert (taken / 400 @ worth).min() == pytest.approx(1.0, abs=0.05)


def test_it_trains_on_the_groups_rewards_and_answers_every_preference_alike(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    made = of_groups(small_task, tmp_path, "clusters=3")
    run, _ = train(made)
    notes = run.record.notes
    assert set(notes["groups"]["of_user"].values()) <= {1, 2, 3} and len(notes["groups"]["of_user"]) == 15
    assert 0 < notes["groups"]["agreement"] <= 1
    found = len(set(notes["groups"]["of_user"].values()))
    shares = {key: value for key, value in notes["diagnostics"].items() if key.startswith("weight/")}
    assert len(shares) == found and sum(shares.values()) == pytest.approx(1)
    assert (
        run.record.cost.reward_calls
        == 2 * 4 * found
        <= cost.estimate(made, made.method.capabilities, None, made.task).reward_calls
    )
    method, context = context_of(run, tmp_path)
    assert [method.policy(context, w).render("hi") for w in ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5))] == ["hi", "hi"]


def test_rewards_are_log_odds_of_the_base_alone_and_0_for_the_mean_answer(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    """What the policy has become does not change what an answer is worth."""
    run, _ = train(of_groups(small_task, tmp_path, "clusters=2"))
    made = of_groups(small_task, tmp_path, "clusters=2")
    job, lm = made.job(run, Meter(), silent), made.task.language_model
    users = [user.pick(range(min(8, len(user)))) for user in made.task.users]
    prompts = [prompt for user in users for prompt in user.prompts]
    chosen, rejected = ([text for user in users for text in getattr(user, side)] for side in ("chosen", "rejected"))
    plain, panel = states(job, lm, prompts, chosen), panel_of_groups(job, lm)
    z = panel.z(panel.score(prompts * 2, [*chosen, *rejected]))
    assert z.mean(axis=0) == pytest.approx(np.zeros(z.shape[1]), abs=1e-5)
    of_user = run.record.notes["groups"]["of_user"]
    groups = np.repeat([of_user[user.name] for user in users], [len(user) for user in users])
    margins = (z[: len(prompts)] - z[len(prompts) :])[np.arange(len(groups)), groups - 1]
    assert (margins > 0).mean() > 0.6  # these labels are what was learned
    least = panel.z(panel.score(prompts[:2], ["", chosen[1]]))
    assert least[0] == pytest.approx(panel.z_bounds()[:, 0]) and (least[1] != least[0]).all()
    adapters.load(lm, run.path / "adapter")
    assert states(job, lm, prompts, chosen) == pytest.approx(plain, abs=1e-5)
    adapters.drop(lm)


def test_pairs_with_an_empty_answer_say_nothing_of_a_users_group(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no state to read of it; the last one of the prompt is not an answer's."""
    made = of_groups(small_task, tmp_path, "clusters=2")
    first, *others = made.task.users
    gaps = replace(first, chosen=["", *first.chosen[1:]], rejected=[*first.rejected[:-1], ""])
    monkeypatch.setitem(vars(made.task), "users", [gaps, *others])  # a cached property
    read: list[list[str]] = []

    def spy(job: Any, lm: Any, prompts: list[str], texts: list[str]) -> Any:
        read.append(texts)
        return np.random.default_rng(len(read)).normal(size=(len(texts), 4))

    monkeypatch.setattr(user_rewards, "states", spy)
    user_rewards.find_groups(made.job(made.open(), Meter(), silent), made.task.language_model, 2, None, 1.0, 1)
    chosen, rejected = read
    assert len(chosen) == len(rejected) == sum(map(len, (first, *others))) - 2
    assert all(chosen) and all(rejected)


def test_users_say_nothing_of_their_groups(small_task: tuple[str, ...], tmp_path: Path) -> None:
    task = of_groups(small_task, tmp_path).task
    names = [user.name for user in task.users]
    assert sorted(names) == sorted(f"user-{number}" for number in range(1, 16))
    truth: dict[str, str] | None = task.group_of_user
    assert truth is not None and sorted(truth.values()) == sorted(["eager", "careful", "playful", "sober", "mild"] * 3)
    assert [truth[name] for name in names] != sorted(truth.values())
    whole = {(pairs.name, *row) for pairs in task.pair_sets() for row in zip(pairs.prompts, pairs.chosen, strict=True)}
    parts = {
        (truth[pairs.name], *row)
        for pairs in task.labelled_by_user()
        for row in zip(pairs.prompts, pairs.chosen, strict=True)
    }
    assert parts == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["clusters=3"], "clusters: found 3; allowed: 1 to 2, as task sandbox: 2 users label the pairs"),
        (["clusters=0"], "clusters: config.clusters: found 0; allowed: a whole number >= 1"),
        (
            ["clusters=6", "task.sandbox.annotators={groups: diverse, users: 4}"],
            "clusters: found 6; allowed: 1 to 5, as task sandbox: 5 groups of users label its pairs",
        ),
        (["eta=0"], "eta: found 0; allowed: a number > 0"),
        (["play=worse"], "did you mean 'worst'?"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", "maxmin-rlhf", "--results", str(tmp_path), *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not list(tmp_path.iterdir())


def test_check_says_the_same(tmp_path: Path) -> None:
    found: Any = check("sandbox/maxmin-rlhf", ["clusters=9"], tmp_path)
    assert [problem for problem in found.problems if "clusters: found 9; allowed: 1 to 2" in problem]
    assert not list(tmp_path.iterdir())
