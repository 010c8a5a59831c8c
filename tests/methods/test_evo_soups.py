"""Evo soups: what is evaluated and counted, what a preference picks, and that a found front is the run's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moalign.cli.main import main
from moalign.core.seeds import derive
from moalign.experiment.train import Plan, TrainRequest, context_of, plan, train
from moalign.methods import evo_soups, registry
from moalign.methods.evo_soups import picked
from moalign.pareto.front import nondominated
from moalign.policies.measured import calibration_prompts, mean_rewards
from moalign.runs.run import Run

Matrix = NDArray[np.float64]


@pytest.fixture
def ask(small_task: tuple[str, ...], tmp_path: Path) -> Any:
    """``ask(method, *overrides)``: a plan of seconds on the small task."""

    def planned(method: str, *overrides: str, task: str | None = None) -> Plan:
        quick = [f"{key}={json.dumps(value)}" for key, value in registry.get(method).quick.items()]
        sets = (*small_task, "policy.lora={r: 4, alpha: 8, dropout: 0.0}", *quick, *overrides)
        return plan(TrainRequest(method, task=task, overrides=sets, results=tmp_path))

    return planned


def front_of(run: Run) -> tuple[Matrix, Matrix]:
    found = run.load_tensors(evo_soups.FRONT)
    return found["weights"].numpy(), found["n"].numpy()


# -- choice ----------------------------------------------------------------------------------------------------------


ENDS_AND_MIDDLE = np.array([[0.0, 2.0], [1.0, 0.9], [2.0, 0.0]])


@pytest.mark.parametrize(
    ("w", "nearest", "largest_sum"),
    [((1, 0), 2, 2), ((0, 1), 0, 0), ((0.5, 0.5), 1, 0), ((0.6, 0.4), 1, 2), ((0.4, 0.6), 1, 0), ((0.9, 0.1), 2, 2)],
)
def test_a_preference_picks_by_its_shortfalls_or_by_its_sum(
    w: tuple[float, float], nearest: int, largest_sum: int
) -> None:
    """From the best of each, (2, 2), by hand: at .5 .5 an end falls short by 1, the middle by .55; sums 1, .95, 1."""
    assert picked(ENDS_AND_MIDDLE, w, "tchebycheff") == nearest
    assert picked(ENDS_AND_MIDDLE, w, "linear") == largest_sum
    assert picked(ENDS_AND_MIDDLE * 10 - 7, w, "linear") == largest_sum


def test_a_search_keeps_its_front_and_answers_from_it(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards that are known of every point: best where both weights are 1, which no sum of 1 reaches."""
    seen: list[Matrix] = []

    def known(job: Any, points: Matrix) -> Matrix:
        seen.append(points)
        return np.stack([-((points - (1, 0.6)) ** 2).sum(axis=1), -((points - (0.6, 1)) ** 2).sum(axis=1)], axis=1)

    monkeypatch.setattr(evo_soups, "evaluated", known)
    run, _ = train(ask("evo-soups", "population=12", "generations=12"))
    weights, z = front_of(run)
    points = np.concatenate(seen)
    values = known(None, points)
    assert len(points) == 144 and np.array_equal(z, values[nondominated(values)])
    assert np.array_equal(weights[:, 0], points[nondominated(values)])
    assert weights.sum(axis=2).max() > 1.5 and weights.min() >= 0 and weights.max() <= 1
    assert run.record.notes["search"]["evaluated"] == 144 and run.record.notes["search"]["front"] == len(z)
    assert [line["step"] for line in run.metrics() if line["phase"] == "search"] == list(range(1, 13))
    asked: list[Any] = []
    monkeypatch.setattr("moalign.policies.mixed.interpolated", lambda context, *rows: asked.append(rows))
    method, context = context_of(run, tmp_path)
    for w in ((1.0, 0.0), (0.5, 0.5)):
        method.policy(context, w)
        short = ((z.max(axis=0) - z) * w).max(axis=1) - 0.05 * (z @ w)
        assert asked[-1] == (weights[int(np.argmin(short)), 0].tolist(),)


# -- what is evaluated -----------------------------------------------------------------------------------------------


def test_a_point_is_worth_what_its_model_answers_and_all_is_counted(ask: Any, tmp_path: Path) -> None:
    """Measured again from the finished run; the cost is the experts' and 8 points of 3 prompts, 2 answers each."""
    made = ask("evo-soups", "experts.lr=0.05", "prompts=3", "samples=2")
    run, _ = train(made)
    (experts,) = made.store.runs(method="morlhf")
    assert experts.record.preferences == [(1.0, 0.0), (0.0, 1.0)], "the experts of rewarded soups"
    assert run.record.cost.reward_calls == experts.record.cost.reward_calls + 8 * 3 * 2 * 2
    more = run.record.cost.tokens_generated - experts.record.cost.tokens_generated
    assert 8 * 3 * 2 <= more <= 8 * 3 * 2 * 12
    assert run.record.cost.tokens_trained == experts.record.cost.tokens_trained

    from moalign.runs.meter import Meter

    z = front_of(run)[1]
    method, _ = context_of(run, tmp_path)
    job = made.job(run, Meter())
    prompts = calibration_prompts(job, 3, 2)
    assert prompts == [*job.task.prompts["calibration"][:3]] * 2
    for w in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        again = mean_rewards(job, method.policy(job, w), prompts, derive(0, "search", "answers"))
        assert np.array_equal(again, z[picked(z, w, "tchebycheff")])
    assert job.meter.reward_calls == 3 * 3 * 2 * 2


def test_it_begins_with_the_experts_and_the_model_is_left_as_it_was(ask: Any, tmp_path: Path) -> None:
    made = ask("evo-soups", "experts.lr=0.05", "generations=1")
    seen: list[Matrix] = []
    evaluated = evo_soups.evaluated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evo_soups, "evaluated", lambda job, points: seen.append(points) or evaluated(job, points))
        run, _ = train(made)
    assert seen[0][:2].tolist() == [[0, 1], [1, 0]]
    assert not getattr(made.task.language_model.model, "peft_config", {}), "no adapter of the search is left on it"
    assert len(front_of(run)[1]) >= 1


@pytest.mark.slow
def test_three_objectives_and_experts_from_dpo(ask: Any, tmp_path: Path) -> None:
    stage = '{"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}'
    run, _ = train(ask("evo-soups", f"dpo_experts={stage}", "population=6", task="sandbox-3"))
    (experts,) = ask("evo-soups").store.runs(method="modpo")
    assert run.record.notes["experts"] == {"method": "modpo", "run_id": experts.run_id}
    assert front_of(run)[0].shape[1:] == (1, 3)


@pytest.mark.slow
def test_train_generate_eval_and_export_as_typed(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*arguments, "--results", str(tmp_path / "results")])
        return code, *capsys.readouterr()

    sets = [part for text in (*small_task, "policy.lora={r: 4, alpha: 8, dropout: 0.0}") for part in ("--set", text)]
    for key, value in registry.get("evo-soups").quick.items():
        sets += ["--set", f"{key}={json.dumps(value)}"]
    code, out, _ = typed("train", "evo-soups", *sets, "--json")
    told = json.loads(out)
    assert (code, told["status"], len(told["evaluation"]["points"])) == (0, "done", 3)
    code, out, _ = typed("generate", told["run"], "how do i make soup ?", "--prefs", "0.25,0.75")
    assert code == 0 and len(out.splitlines()) == 1
    code, out, _ = typed("eval", told["run"], "--prefs", "0.25,0.75", "--json")
    assert code == 0
    code, out, _ = typed("export", told["run"], "--prefs", "0.25,0.75", "--out", str(tmp_path / "out"))
    assert code == 0 and json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] in (4, 8)
    front = next(Path(told["run"]).glob("front.safetensors"))
    front.write_bytes(front.read_bytes()[:-8] + b"\0" * 8)
    code, _, err = typed("generate", told["run"], "how do i make soup ?", "--prefs", "0.25,0.75")
    assert code == 2 and "its content is not what training wrote" in err


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("population=3", ">= 4"),
        ("generations=0", ">= 1"),
        ("groups=0", ">= 1"),
        ("low=0.1", "<= 0"),
        ("high=0.9", ">= 1"),
        ("samples=0", ">= 1"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, allowed: str
) -> None:
    assert main(["train", "evo-soups", "--results", str(tmp_path), "--set", setting]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name, _, value = setting.partition("=")
    assert line.startswith(f"error: --set {name}: config.{name}: found {value}; allowed: ") and allowed in line
    assert not list(tmp_path.iterdir())


def test_more_groups_than_layers_are_refused_before_any_expert_is_trained(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [part for text in (*small_task, "groups=2") for part in ("--set", text)]
    assert main(["train", "evo-soups", "--results", str(tmp_path), *sets]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == ["error: groups: found 2; allowed: 1 to 1, the layers with adapters"]
    assert not list(tmp_path.glob("runs/*/*/*"))
