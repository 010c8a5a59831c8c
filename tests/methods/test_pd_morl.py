"""PD-MORL: the advantage with its directional term by hand, where directions come from, and what may be asked of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moalign.cli.main import main
from moalign.core.amounts import Amounts, SplitAmount
from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.losses.directional import angle
from moalign.losses.ppo import Experience, whitened
from moalign.methods import pd_morl
from moalign.methods.pd_morl import Config, best_means, combined, directions_of
from moalign.runs.meter import Meter

FEW = ("steps=2", "batch=4", "groups=2", "log_every=1", "lr=0.01", "policy.lora={r: 4, alpha: 8}")


def experience() -> Experience:
    """One row of two tokens and a third outside: V is (1, 0) and (1, 1), the returns are (1, 1) and (0, 1)."""
    returns = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    values = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    return Experience(mask, torch.zeros(1, 3), returns - values, returns)


def of(w: list[float], d: list[float], zero: list[float], **settings: Any) -> tuple[list[float], float]:
    vectors = (torch.tensor(vector).reshape(1, 1, 2) for vector in (w, d))
    found, metrics = combined(
        experience(), *vectors, torch.tensor(zero).reshape(1, 2), Config(whiten="none", **settings)
    )
    return found[0].tolist(), metrics["angle"]


def test_the_advantage_by_hand() -> None:
    """A is (0, 1) and (-1, 0); w = (.25, .75) makes .75 and -.25 of it.

    Towards (0, 1) the angle goes from 90 degrees to 45, and from 45 to the least, arccos(.9999): a quarter of pi is
    gained with the first token, and as much less .01414 with the second.
    """
    quarter, least = math.pi / 4, math.acos(0.9999)
    found, angle = of([0.25, 0.75], [0.0, 1.0], [0.0, 0.0], actor_angle=2.0)
    assert found == pytest.approx([0.75 + 2 * quarter, -0.25 + 2 * (quarter - least), 0.0], abs=1e-4)
    assert angle == pytest.approx((quarter + least) / 2, abs=1e-4)
    assert of([0.25, 0.75], [0.0, 1.0], [0.0, 0.0], actor_angle=0.0)[0] == pytest.approx([0.75, -0.25, 0.0])


def test_angles_are_measured_from_the_origin_given() -> None:
    """From (-1, -1) V is (2, 1) and (2, 2), the returns (2, 2) and (1, 2): least, or arccos(3 / sqrt 10) aside."""
    aside, least = math.acos(3 / math.sqrt(10)), math.acos(0.9999)
    found, _ = of([0.5, 0.5], [1.0, 1.0], [-1.0, -1.0], actor_angle=1.0)
    assert found == pytest.approx([0.5 + aside - least, -0.5 + least - aside, 0.0], abs=1e-4)


def test_the_advantage_is_whitened_as_a_whole() -> None:
    made, config = experience(), Config(whiten="scale", actor_angle=1.5)
    w, d, zero = torch.tensor([[[0.3, 0.7]]]), torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 2)
    plain = combined(made, w, d, zero, config.model_copy(update={"whiten": "none"}))[0]
    wanted = whitened(plain.unsqueeze(-1), made.mask, "scale").squeeze(-1)
    assert combined(made, w, d, zero, config)[0][0].tolist() == pytest.approx(wanted[0].tolist())


def test_a_direction_is_the_mean_of_each_prompts_best_response_by_hand() -> None:
    """At (1, 0) a's (2, 0) and b's (1, 3); at (.5, .5) a's (0, 4) and b's (1, 3), the first of equal ones."""
    prompts, z = ["a", "b", "a", "b"], np.array([[2.0, 0.0], [1.0, 3.0], [0.0, 4.0], [0.0, 4.0]])
    assert best_means(prompts, z, (1.0, 0.0)).tolist() == [1.5, 1.5]
    assert best_means(prompts, z, (0.5, 0.5)).tolist() == [0.5, 3.5]


def test_it_trains_one_policy_towards_directions_that_turn_with_the_weights(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    run, _ = train(plan(TrainRequest("pd-morl", overrides=(*small_task, *FEW), results=tmp_path)))
    directions = np.array(run.record.notes["directions"])  # of the grid (0, 1), (.5, .5), (1, 0)
    assert directions.shape == (3, 2)
    assert directions[0, 0] < directions[1, 0] < directions[2, 0] and directions[0, 1] > directions[2, 1]
    assert {"kl", "angle", "value_loss/helpfulness", "value_loss/harmlessness"} < set(run.record.notes["diagnostics"])
    method, context = context_of(run, tmp_path)
    assert method.policy(context, (0.3, 0.7)).render("hi") == context.task.renderer.preference("hi", (0.3, 0.7))


@pytest.mark.slow
def test_both_angles_reach_what_is_trained(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """The critic's reaches the value heads in the first update, the actor's the adapter, of runs that begin alike."""

    def trained(*more: str) -> tuple[bytes, bytes]:
        settings = (*small_task, *FEW, "steps=1", "directions=weights", *more)
        run, _ = train(plan(TrainRequest("pd-morl", overrides=settings, results=tmp_path)))
        heads = run.path / "value_heads-online.safetensors"
        return (run.path / "adapter" / "adapter_model.safetensors").read_bytes(), heads.read_bytes()

    neither = trained("actor_angle=0", "critic_angle=0", "clip=1000")
    critic = trained("actor_angle=0", "critic_angle=5", "clip=1000")
    actor = trained("actor_angle=5", "critic_angle=0", "clip=1000")
    assert critic[0] == neither[0] and critic[1] != neither[1]
    assert actor[0] != neither[0] and actor[1] == neither[1]


def test_the_critics_angle_is_a_cost(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """With the critic's angle alone, weighed heavily, its values turn to the directions; with its sign turned, away."""
    plain = pd_morl.update

    def last_angle(weight: float) -> float:
        seen: list[float] = []

        def spy(trainer: Any, experience: Any, advantages: Any, d: Any, origin: Any, *rest: Any) -> None:
            values = experience.returns - experience.advantages
            seen.append(float(angle(d, values - origin)[experience.mask].mean()))
            plain(trainer, experience, advantages, d, origin, *rest)

        settings = (*small_task, *FEW, "steps=6", "value_lr=0.05", "actor_angle=0", "clip=1000", "lr=1e-9")
        overrides = (*settings, f"critic_angle={weight}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pd_morl, "update", spy)
            train(plan(TrainRequest("pd-morl", overrides=overrides, results=tmp_path)))
        return seen[-1]

    assert last_angle(50.0) < last_angle(0.0)


def test_directions_need_several_responses_to_choose_from(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(TrainRequest("pd-morl", overrides=(*small_task, *FEW), results=tmp_path))
    scored = made.task.calibration()
    first = [scored.prompts.index(prompt) for prompt in dict.fromkeys(scored.prompts)]
    one = replace(
        scored,
        prompts=[scored.prompts[i] for i in first],
        responses=[scored.responses[i] for i in first],
        raw=scored.raw[first],
    )
    monkeypatch.setattr(type(made.task), "calibration", lambda task: one)
    with pytest.raises(RequestError, match="one to each; allowed: directions: weights"):
        directions_of(made.job(made.open(), Meter()))


def test_what_directions_cost() -> None:
    task = Amounts(2, calibration=SplitAmount((4, 4, 4), by_base=True))
    assert (Config().learns_from(task).rows, Config().learns_from(task).sampled) == (12, 12)
    assert Config(directions="weights").learns_from(task).rows == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("actor_angle=-1", "found -1; allowed: a number >= 0"),
        ("critic_angle=x", "found 'x'"),
        ("directions=datas", "did you mean 'data'?"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert main(["train", "pd-morl", "--results", str(tmp_path), "--set", setting]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error and setting.partition("=")[0] in error
    assert not list(tmp_path.iterdir())
