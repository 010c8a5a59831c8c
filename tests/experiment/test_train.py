"""``train``: what a plan checks, when a request is the same one, and what reopening a run refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moalign.core import errors
from moalign.core.errors import RequestError
from moalign.experiment.train import Plan, TrainRequest, context_of, plan, train
from moalign.methods.base import policies_of
from moalign.runs.run import Run

SMALL = ("steps=2", "batch=4", "max_tokens=48")


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


# -- a plan writes nothing -------------------------------------------------------------------------------------------


def test_a_plan_writes_nothing(small_task: tuple[str, ...], results: Path) -> None:
    made = plan(TrainRequest("sft", overrides=(*small_task, *SMALL), results=results))
    assert made.existing_run is None
    assert made.folder.parent == results / "runs" / "sandbox" / "sft"
    assert not results.exists()


def test_a_dry_run_writes_nothing(
    small_task: tuple[str, ...], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moalign.cli import main as cli

    before = dict(os.environ)
    try:
        sets = [part for text in (*small_task, *SMALL) for part in ("--set", text)]
        assert cli.main(("train", "sft", "--dry-run", "--results", str(results), *sets)) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert "sft" in capsys.readouterr().out
    assert not results.exists()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "mo-opdo"}, "did you mean 'mo-odpo'"),
    ({"task": "sandbx"}, "did you mean 'sandbox'"),
    ({"overrides": ("stpes=3",)}, "did you mean 'steps'"),
    ({"overrides": ("steps=-1",)}, "steps"),
    ({"overrides": ("steps=many",)}, "steps"),
    ({"overrides": ("task.grid=1",)}, "grid"),
    ({"prefs": ("3,7",)}, "did you mean --prefs 0.3,0.7"),
    ({"prefs": ("0.2,0.3,0.5",)}, "2 objectives"),
    ({"prefs": ("0.5,x",)}, "not a number"),
    ({"grid": 1}, "--grid 1"),
    ({"prefs": ("0.5,0.5",), "grid": 3}, "--prefs and --grid exclude each other"),
    ({"recipe": Path("no/such/recipe.yaml")}, "no/such/recipe.yaml"),
    ({"overrides": ("task.model=no/such/folder",)}, "no/such/folder"),
]


@pytest.mark.parametrize(("changes", "told"), BAD, ids=[told for _, told in BAD])
def test_a_bad_request_is_refused_before_anything_is_written(
    changes: dict[str, Any], told: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as caught:
        plan(TrainRequest(**{"method": "sft", "results": results, **changes}))
    assert told in str(caught.value)
    assert contents(tmp_path) == []


def test_every_problem_of_a_recipe_is_told_at_once(tmp_path: Path, results: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: sft\ntask: sandbox\nconfig:\n  stpes: 3\n  batch: 0\n")
    with pytest.raises(RequestError) as caught:
        plan(TrainRequest("sft", recipe=recipe, overrides=("lr=-1",), results=results))
    told = "\n".join(caught.value.problems)
    assert f"{recipe}:4" in told
    assert "stpes" in told
    assert f"{recipe}:5" in told
    assert "batch" in told
    assert "lr" in told
    assert not results.exists()


def test_a_recipe_of_another_method_is_refused(tmp_path: Path, results: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: ric\ntask: sandbox\n")
    with pytest.raises(RequestError, match="a recipe of ric, but the method asked for is sft"):
        plan(TrainRequest("sft", recipe=recipe, results=results))


def test_a_recipe_names_its_task_and_its_preferences(tmp_path: Path, results: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: mo-odpo\ntask: sandbox-3\nseed: 4\nprefs: [[0.2, 0.3, 0.5], [1, 0, 0], [1, 0, 0]]\n"
        "config: {steps: 7}\n"
    )
    made = plan(TrainRequest("mo-odpo", recipe=recipe, results=results))
    assert made.task.card.name == "sandbox-3"
    assert made.seed == 4
    assert made.given == [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0)]  # each once
    assert made.config.steps == 7
    assert plan(TrainRequest("mo-odpo", recipe=recipe, seed=9, results=results)).seed == 9
    asked = plan(TrainRequest("mo-odpo", recipe=recipe, prefs=("0,1,0",), results=results))
    assert asked.given == [(0.0, 1.0, 0.0)]


def test_preferences_asked_for_and_the_tasks_own(small_task: tuple[str, ...], results: Path) -> None:
    def made(**changes: Any) -> Any:
        return plan(TrainRequest("mo-odpo", overrides=small_task, results=results, **changes))

    assert made().given is None
    assert made().preferences == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert made(prefs=("0.3,0.7",)).preferences == made(prefs=("0.3,0.7",)).given == [(0.3, 0.7)]
    assert made(grid=5).given == [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]


# -- the same request ------------------------------------------------------------------------------------------------


def test_the_run_is_the_same_exactly_when_the_request_is(
    small_task: tuple[str, ...], results: Path, tmp_path: Path
) -> None:
    def folder(method: str = "mo-odpo", *more: str, **changes: Any) -> str:
        request = {"overrides": (*small_task, "steps=2", *more), "results": results, **changes}
        return plan(TrainRequest(method, **request)).folder.name

    same = folder()
    assert folder() == same
    assert folder(results=tmp_path / "elsewhere") == same
    assert folder(seed=0) == same  # the recipe's
    assert folder("mo-odpo", "clip=1.0") == same  # the default again
    others = [
        folder("sft"),
        folder("mo-odpo", "steps=3"),
        folder("mo-odpo", "policy.lora.r=8"),
        folder("mo-odpo", "task.grid=4"),
        folder("mo-odpo", "task.evaluation.seed=7"),
        folder(seed=1),
        folder(prefs=("0.3,0.7",)),
        folder(prefs=("0.7,0.3",)),
        folder(grid=3),
    ]
    assert len({same, *others}) == len(others) + 1


@pytest.fixture(scope="module")
def finished(small_task: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRequest, Plan, Run]:
    """A request, its plan before anything was trained, and the run that it made."""
    results = tmp_path_factory.mktemp("finished") / "results"
    request = TrainRequest("sft", overrides=(*small_task, *SMALL), prefs=("0.3,0.7",), seed=5, results=results)
    made = plan(request)
    run, found = train(made)
    assert not found
    return request, made, run


def test_a_finished_run_is_found_and_not_trained_again(
    finished: tuple[TrainRequest, Plan, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, _, run = finished
    assert run.record.status == "done"
    written = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}

    made = plan(request)
    assert made.existing_run is not None
    monkeypatch.setattr(type(made.method), "train", lambda *given: pytest.fail("it trained again"))
    again, found = train(made)
    assert found
    assert again.path == run.path == made.folder
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()} == written


def test_the_record_holds_what_was_asked_for(finished: tuple[TrainRequest, Plan, Run]) -> None:
    _, made, run = finished
    record = run.record
    assert (record.method, record.task, record.seed) == ("sft", "sandbox", 5)
    assert record.card_hash == made.task.hash
    assert record.preferences == [(0.3, 0.7)]
    assert record.recipe["config"]["steps"] == 2
    assert record.recipe["config"]["clip"] == 1.0  # a default, resolved
    assert "clip" not in record.identity["config"]
    assert record.cost.tokens_trained > 0
    assert record.seconds > 0


def test_a_new_option_leaves_old_runs_what_they_are(
    finished: tuple[TrainRequest, Plan, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, made, run = finished
    config: Any = type(made.method).Config

    class Newer(config):  # type: ignore[misc]
        novelty: float = 0.5

    monkeypatch.setattr(type(made.method), "Config", Newer)
    newer = plan(request)
    assert newer.existing_run is not None and newer.folder == run.path
    changed = plan(replace(request, overrides=(*request.overrides, "novelty=0.6")))
    assert changed.existing_run is None


def test_a_run_under_another_default_does_not_pass_for_one_under_the_new(
    finished: tuple[TrainRequest, Plan, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, made, run = finished
    config: Any = type(made.method).Config

    class Changed(config):  # type: ignore[misc]
        clip: float | None = 2.0

    monkeypatch.setattr(type(made.method), "Config", Changed)
    changed = plan(request)
    assert changed.folder == run.path
    for ask in (lambda: changed.existing_run, changed.open, lambda: train(changed)):
        with pytest.raises(RequestError, match=r"config\.clip: 1\.0 then, 2\.0 now.*move its folder away"):
            ask()
    old = plan(replace(request, overrides=(*request.overrides, "clip=1.0")))
    assert old.folder != run.path and old.existing_run is None


@pytest.mark.slow
def test_a_failure_is_recorded_and_the_same_request_goes_on(
    small_task: tuple[str, ...], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = TrainRequest("sft", overrides=(*small_task, *SMALL), results=results)
    made = plan(request)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(made.method), "train", lambda *given: (_ for _ in ()).throw(errors.WorkError("the disk sang"))
        )
        with pytest.raises(errors.WorkError):
            train(made)
    left = plan(request).existing_run
    assert left is not None
    assert left.record.status == "failed"
    assert left.record.error == "WorkError: the disk sang"
    run, found = train(plan(request))
    assert not found
    assert (run.record.status, run.record.error) == ("done", None)


def test_a_run_that_another_process_trains_is_refused(small_task: tuple[str, ...], results: Path) -> None:
    request = TrainRequest("sft", overrides=(*small_task, *SMALL), results=results)
    made = plan(request)
    run = made.open()
    with run.lock(), pytest.raises(RequestError, match=f"pid {os.getpid()}"):
        train(plan(request))


# -- reopening -------------------------------------------------------------------------------------------------------


def test_a_run_is_reopened_from_its_record_alone(finished: tuple[TrainRequest, Plan, Run]) -> None:
    request, made, run = finished
    method, context = context_of(run, request.results)
    assert method.name == "sft"
    assert context.config == made.config
    assert context.policy_spec == made.recipe.policy
    assert context.task.hash == made.task.hash
    assert context.task.normaliser == made.task.normaliser
    assert list(context.preferences) == [(0.3, 0.7)]


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_an_unfinished_run_is_not_reopened(small_task: tuple[str, ...], results: Path, status: Any) -> None:
    made = plan(TrainRequest("sft", overrides=(*small_task, "steps=0"), results=results))
    run = made.open()
    run.mark(status)
    with pytest.raises(RequestError, match=f"it is {status}, not done; finish it with the same train command"):
        context_of(run, results)


def test_a_run_whose_base_has_changed_is_not_reopened(
    small_task: tuple[str, ...], results: Path, tmp_path: Path, random_base: Path
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(random_base, base)
    run, _ = train(plan(TrainRequest("sft", overrides=(*small_task, f"task.model={base}", "steps=0"), results=results)))
    assert context_of(run, results)[1].task.hash == run.record.card_hash
    tensors = load_file(base / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + torch.ones_like(tensors[name])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match="its task card has changed since") as caught:
        context_of(run, results)
    assert run.record.card_hash in str(caught.value)
    assert "or an older moalign, whose hashes were made otherwise, made this run" in str(caught.value)


def test_a_run_on_another_machines_base_answers_nothing_here(
    finished: tuple[TrainRequest, Plan, Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its adapter would change another base than the one it was trained on."""
    _, _, run = finished
    method, context = context_of(run, run.path.parents[3])
    assert policies_of(method, context, [(0.3, 0.7)])
    context.task.base_sum = "bbbb"
    monkeypatch.setitem(run.record.notes, "base", "aaaa")
    with pytest.raises(RequestError, match=r"other weights \(aaaa\) than this machine's \(bbbb\)"):
        policies_of(method, context, [(0.3, 0.7)])
    monkeypatch.setitem(run.record.notes, "base", "bbbb")
    assert policies_of(method, context, [(0.3, 0.7)])


def test_a_run_whose_card_was_edited_is_not_reopened(small_task: tuple[str, ...], results: Path) -> None:
    run, _ = train(plan(TrainRequest("sft", overrides=(*small_task, "steps=0"), results=results)))
    path = run.path / "run.json"
    told = json.loads(path.read_text())
    told["recipe"]["card"]["reference_point"] = [0.1, 0.1]
    path.write_text(json.dumps(told))
    with pytest.raises(RequestError, match="its task card has changed since"):
        context_of(type(run).load(run.path), results)


def test_a_run_that_knows_a_setting_by_its_former_name_is_read() -> None:
    """PPO's kl_target became kl_budget; stages and experts have settings of their own inside."""
    from moalign.experiment.train import _by_todays_names
    from moalign.methods import registry

    method = registry.get("rewarded-soups")
    then = {"experts": {**method.Config().model_dump(mode="json")["experts"], "kl_target": 4.0}}
    del then["experts"]["kl_budget"]
    with pytest.raises(ValueError, match="kl_target"):
        method.Config.model_validate(then)
    assert method.Config.model_validate(_by_todays_names(then)).model_dump()["experts"]["kl_budget"] == 4.0


def test_an_interruption_of_learning_rewards_does_not_begin_it_again(
    small_task: tuple[str, ...], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.tasks.sandbox import learned

    calls = []

    def stop(task: Any) -> Any:
        calls.append(task)
        raise KeyboardInterrupt

    monkeypatch.setattr(learned, "objectives", stop)
    numbers = "{mean: 0, sd: 1, lo: -1, hi: 1}"
    given = f"task.normaliser={{helpfulness: {numbers}, harmlessness: {numbers}}}"
    made = plan(TrainRequest("sft", task="sandbox-learned", overrides=(*small_task, *SMALL, given), results=results))
    with pytest.raises(KeyboardInterrupt):
        train(made)
    assert len(calls) == 1
    assert made.existing_run is not None and made.existing_run.status == "interrupted"
