"""ParetoHqD: what each stage is trained on, resume, and requests that cannot be served."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moalign.core.errors import RequestError
from moalign.core.progress import silent
from moalign.core.records import Response
from moalign.evaluation import evaluate
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.lm.quality import collapse
from moalign.methods import paretohqd
from moalign.methods.paretohqd import ParetoHqd
from moalign.pareto.directions import Pool, nearest
from moalign.runs.run import Run
from moalign.tasks.responses import from_columns

LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.1}"
STAGE = "{steps: 4, batch: 4, lr: 0.01, max_tokens: 48, log_every: 1, checkpoint_every: 2}"
SPLITS = "task.splits={train: 0.7, calibration: 0.1, eval: 0.2}"  # 505 training prompts, 8080 logged responses
QUICK = (LORA, SPLITS, "k=8", "min_pool=24", f"first={STAGE}", f"second={STAGE}", "augment_prompts=40")
CLOCKS = {"seconds", "peak_memory_bytes"}
FIRST = "stage1: preference {} ({}/3)"
SECOND = "preference {} ({}/3)"
ANSWERS = "augment: stage-1 models answer"


class Interrupted(Exception):
    """What the tests raise in the middle of training."""


def stop_at(phase: str, step: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if what == phase and done >= step:
            raise Interrupted(f"{what} {done}")

    return progress


def trained(small: tuple[str, ...], results: Path, *more: str, progress: Any = silent, **options: Any) -> Run:
    """Train with a new plan: a model, a meter and a job of its own, as a new process would have."""
    return train(
        plan(TrainRequest("paretohqd", overrides=(*small, *QUICK, *more), results=results, **options)), progress
    )[0]


@dataclass
class Training:
    """One call of the supervised engine."""

    stage: str
    texts: list[str]
    responses: list[Response]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


@contextlib.contextmanager
def watching() -> Iterator[list[Training]]:
    """Record every training within the block."""
    from moalign.lm import adapters
    from moalign.training import sft

    calls: list[Training] = []
    train_sft = sft.train_sft

    def watched(job: Any, lm: Any, texts: Any, responses: Any, config: Any, phase: str) -> None:
        before = adapters.tensors(lm)
        train_sft(job, lm, texts, responses, config, phase)
        calls.append(Training(phase, list(texts), list(responses), before, adapters.tensors(lm)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "train_sft", watched)
        yield calls


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """What the module trains once."""
    return {}


@pytest.fixture
def whole(kept: dict[str, Any], small_task: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of three preferences."""
    if not kept:
        steps: list[tuple[str, int, int]] = []
        with watching() as calls, watching_answers() as answering:
            results = tmp_path_factory.mktemp("whole")
            kept["run"] = trained(small_task, results, progress=lambda *step: steps.append(step))
        kept.update(calls=calls, answering=answering, steps=steps)
    run: Run = kept["run"]
    return run


@contextlib.contextmanager
def watching_answers() -> Iterator[list[dict[str, torch.Tensor]]]:
    """Record the adapter that answers at every call of ``respond_all`` within the block."""
    from moalign.lm import adapters
    from moalign.policies import policy

    weights: list[dict[str, torch.Tensor]] = []
    respond_all = policy.respond_all

    def watched(policies: Any, *rest: Any, **more: Any) -> Any:
        weights.append(adapters.tensors(policies[0].generator.lm))
        return respond_all(policies, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "respond_all", watched)
        yield weights


@pytest.fixture
def calls(whole: Run, kept: dict[str, Any]) -> list[Training]:
    """The trainings within that run."""
    found: list[Training] = kept["calls"]
    return found


# -- what is trained on ------------------------------------------------------------------------------------------------


def test_both_stages_train_on_the_nearest_of_their_pools(whole: Run, calls: list[Training]) -> None:
    assert [call.stage for call in calls] == [f"{walk}-{index}" for walk in ("stage1", "pref") for index in range(3)]
    context = context_of(whole, whole.path.parents[3])[1]
    plain = context.task.renderer.plain
    scored = context.task.scored()
    table = whole.read_table("augment")
    raw = table[[f"raw:{name}" for name in context.task.names]].to_numpy()
    answers = (table["prompt"].tolist(), from_columns(table), raw)
    stages = ((scored.prompts, scored.responses, scored.raw), 8), (answers, 4)
    for number, ((prompts, responses, points), k) in enumerate(stages):
        pool = Pool.of(points, prompts, k, 24)
        for index, w in enumerate(context.preferences):
            call = calls[3 * number + index]
            rows, _ = nearest(pool, w, k)
            assert call.texts == [plain(prompts[row]) for row in rows]
            assert call.responses == [responses[row] for row in rows]
            assert len(set(call.texts)) == k  # no prompt twice in a set
    sets = [set(zip(call.texts, call.responses, strict=True)) for call in calls[:3]]
    assert sets[0] != sets[1] != sets[2]  # neighbours have sets of their own


def test_stage_1_starts_at_the_base_and_stage_2_where_stage_1_ended(whole: Run, calls: list[Training]) -> None:
    for index in range(3):
        first, second = calls[index], calls[3 + index]
        for name, value in first.before.items():
            assert torch.equal(value, calls[0].before[name])  # the same fresh adapter for every preference
            if "lora_B" in name:
                assert not value.any()
        assert all(torch.equal(second.before[name], first.after[name]) for name in first.after)
        assert any(not torch.equal(second.after[name], second.before[name]) for name in second.after)
        saved = whole.load_tensors(f"adapter-pref-{index}/adapter_model")
        assert all(torch.equal(saved[name], second.after[name]) for name in saved)
    assert not list(whole.path.glob("adapter-stage1*"))  # only the last ones answer


def test_the_representatives_answer_as_stage_1_left_them(calls: list[Training], kept: dict[str, Any]) -> None:
    assert len(kept["answering"]) == 3
    for weights, call in zip(kept["answering"], calls, strict=False):
        assert all(torch.equal(weights[name], call.after[name]) for name in call.after)
    assert [step for step in kept["steps"] if step[0] == ANSWERS][-1] == (ANSWERS, 3 * 40, 3 * 40)


def test_the_augmentation_is_scored_whole_and_counted_by_cause(whole: Run) -> None:
    context = context_of(whole, whole.path.parents[3])[1]
    table = whole.read_table("augment")
    assert not table.duplicated(["prompt", "response"]).any()
    assert not any(collapse(ids, context.task.short_below) for ids in context.task.tokens(table["response"]))
    assert set(table["prompt"]) <= set(context.task.prompts["train"])
    raw = table[[f"raw:{name}" for name in context.task.names]].to_numpy()
    assert np.array_equal(raw, context.task.panel.score(table["prompt"].tolist(), table["response"].tolist()))

    told = whole.record.notes["augment"]
    assert list(told) == ["0,1", "0.5,0.5", "1,0"]  # two corners and the middle
    for one in told.values():
        assert one["answers"] == 40
        assert set(one["causes"]) == {"short", "repetitive", "loop"}
        assert 0 <= max(one["causes"].values()) <= one["rate"] <= sum(one["causes"].values())
    assert len(table) <= sum(round(one["answers"] * (1 - one["rate"])) for one in told.values())


def test_notes_tell_the_pools_and_what_the_sets_obtained(whole: Run) -> None:
    notes = whole.record.notes
    assert notes["pools"]["stage1"]["responses"] > notes["pools"]["stage1"]["pool"] >= 24
    assert notes["pools"]["stage2"]["responses"] == len(whole.read_table("augment"))
    assert list(notes["per_preference"]) == ["0,1", "0.5,0.5", "1,0"]
    rows = list(notes["per_preference"].values())
    expected = {f"stage{n}_{what}" for n in (1, 2) for what in ("loss", "distance")}
    expected |= {f"stage{n}_set/{name}" for n in (1, 2) for name in ("helpfulness", "harmlessness")}
    assert all(set(row) == expected for row in rows)
    for name in expected:
        assert notes["diagnostics"][name] == pytest.approx(np.mean([row[name] for row in rows]))
    assert rows[0]["stage1_set/harmlessness"] > rows[2]["stage1_set/harmlessness"]
    assert rows[0]["stage1_set/helpfulness"] < rows[2]["stage1_set/helpfulness"]
    (loss,) = [line["loss"] for line in whole.metrics() if line["phase"] == "stage1-2" and line["step"] == 4]
    assert rows[2]["stage1_loss"] == loss  # a tenth of four logged steps: the last


def test_costs_are_counted(whole: Run) -> None:
    cost = whole.record.cost
    assert cost.tokens_generated > 3 * 40
    assert cost.tokens_trained > 0
    scored = 505 * 16 * 2  # the logged responses, by both objectives
    assert cost.reward_calls == scored + len(whole.read_table("augment")) * 2


@pytest.mark.slow
def test_without_stage_2_nothing_is_sampled(small_task: tuple[str, ...], tmp_path: Path) -> None:
    with watching() as calls:
        run = trained(small_task, tmp_path, "second.steps=0")
    assert [call.stage for call in calls] == ["stage1-0", "stage1-1", "stage1-2"]
    assert run.record.cost.tokens_generated == 0
    assert "augment" not in run.record.notes
    for index in range(3):
        saved = run.load_tensors(f"adapter-pref-{index}/adapter_model")
        assert all(torch.equal(saved[name], calls[index].after[name]) for name in saved)


@pytest.mark.slow
def test_a_loss_that_falls_shows_that_the_responses_are_learnt(small_task: tuple[str, ...], tmp_path: Path) -> None:
    longer = "first={steps: 40, batch: 8, lr: 0.02, max_tokens: 64, log_every: 1}"
    run = trained(small_task, tmp_path, longer, "second.steps=0", "policy.lora={r: 8, alpha: 16}", prefs=("1,0",))
    losses = [line["loss"] for line in run.metrics()]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


# -- policies ----------------------------------------------------------------------------------------------------------


def test_each_preference_answers_with_its_own_adapter(whole: Run) -> None:
    method, context = context_of(whole, whole.path.parents[3])
    result = evaluate.evaluate(method, context)
    assert result.scores.shape == (8, 3, 2)
    assert "collapse" not in result.result.content["quality"]
    assert set(result.result.quality.causes) == {"short", "repetitive", "loop"}
    with pytest.raises(RequestError, match=r"0\.3,0\.7.*the nearest is 0\.5,0\.5"):
        method.policy(context, (0.3, 0.7))


@pytest.mark.slow
def test_a_single_preference_is_its_own_representative(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run = trained(small_task, tmp_path, prefs=("0.3,0.7",))
    assert list(run.record.notes["augment"]) == ["0.3,0.7"]
    assert [path.name for path in sorted(run.path.glob("adapter*"))] == ["adapter-pref-0"]


@pytest.mark.slow
def test_three_objectives(random_base: Path, tmp_path: Path) -> None:
    run = trained(
        (f"task.model={random_base}", "task.grid=6", "task.evaluation.prompts=8", "task.generation.max_new_tokens=12"),
        tmp_path,
        task="sandbox-3",
    )
    assert list(run.record.notes["augment"]) == ["0,0,1", "0,0.5,0.5", "0,1,0", "1,0,0"]


# -- resume ------------------------------------------------------------------------------------------------------------


def lines(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in run.metrics()]


def assert_same_run(run: Run, whole: Run) -> None:
    names = sorted(str(path.relative_to(whole.path)) for path in whole.path.glob("adapter*/*"))
    assert sorted(str(path.relative_to(run.path)) for path in run.path.glob("adapter*/*")) == names
    assert len(names) == 6
    for name in names:
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert lines(run) == lines(whole)
    for counter in ("tokens_generated", "tokens_trained", "reward_calls"):
        assert getattr(run.record.cost, counter) == getattr(whole.record.cost, counter), counter
    assert json.dumps(run.record.notes, sort_keys=True) == json.dumps(whole.record.notes, sort_keys=True)
    assert list(run.record.phases) == list(whole.record.phases)
    assert run.record.status == "done"
    assert not (run.path / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "step"),
    [
        pytest.param(FIRST.format("0,1", 1), 1, marks=pytest.mark.slow),
        pytest.param(FIRST.format("0.5,0.5", 2), 3, marks=pytest.mark.slow),
        pytest.param(ANSWERS, 80, marks=pytest.mark.slow),  # of two of three models
        (SECOND.format("0.5,0.5", 2), 3),
        pytest.param(SECOND.format("1,0", 3), 4, marks=pytest.mark.slow),  # its last step
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    whole: Run, small_task: tuple[str, ...], tmp_path: Path, phase: str, step: int
) -> None:
    with pytest.raises(Interrupted):
        trained(small_task, tmp_path, progress=stop_at(phase, step))
    told: list[str] = []
    run = trained(small_task, tmp_path, progress=lambda what, done, total: told.append(what))
    assert_same_run(run, whole)
    order = [
        *(FIRST.format(w, n + 1) for n, w in enumerate(("0,1", "0.5,0.5", "1,0"))),
        ANSWERS,
        *(SECOND.format(w, n + 1) for n, w in enumerate(("0,1", "0.5,0.5", "1,0"))),
    ]
    again = order[order.index(phase) :]
    assert [what for what in dict.fromkeys(told) if what in order] == again  # what was finished is not done again


@pytest.mark.slow
def test_it_may_be_interrupted_again_and_again(whole: Run, small_task: tuple[str, ...], tmp_path: Path) -> None:
    for phase, step in (
        (FIRST.format("0,1", 1), 3),
        (FIRST.format("1,0", 3), 2),
        (FIRST.format("1,0", 3), 4),
        (ANSWERS, 40),
        (ANSWERS, 120),
        (SECOND.format("0,1", 1), 1),
        (SECOND.format("0,1", 1), 3),
    ):
        with pytest.raises(Interrupted):
            trained(small_task, tmp_path, progress=stop_at(phase, step))
    assert_same_run(trained(small_task, tmp_path), whole)


@pytest.mark.slow
def test_an_interruption_of_the_last_clearing_up_is_mended(
    whole: Run, small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.runs import atomic

    remove, calls = atomic.remove_directory, []

    def once(path: Path) -> None:
        if "stage1" in path.name and path.name.startswith("adapter"):
            calls.append(path)
            if len(calls) == 2:
                raise Interrupted
        remove(path)

    monkeypatch.setattr(atomic, "remove_directory", once)
    with pytest.raises(Interrupted):
        trained(small_task, tmp_path)
    assert_same_run(trained(small_task, tmp_path), whole)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("k=506", "augment_prompts=500"), ["k = 506", "505 prompts", "allowed: k <= 505"]),
        (("min_pool=9000",), ["min_pool = 9000", "8080 scored responses", "1 to 8080"]),
        (("k=100", "augment_prompts=49"), ["k = 100", "50 different prompts", "49", "augment_prompts = 49", "k <= 99"]),
    ],
)
def test_what_cannot_be_selected_is_refused_before_training(
    small_task: tuple[str, ...], tmp_path: Path, settings: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        trained(small_task, tmp_path, *settings)
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_as_many_answers_as_a_second_set_needs_are_enough() -> None:
    task = SimpleNamespace(prompts={"train": [str(number) for number in range(60)]})
    job: Any = SimpleNamespace(config=paretohqd.Config(k=99, augment_prompts=49), task=task)
    scored: Any = SimpleNamespace(prompts=["p"] * 99)
    paretohqd._check(job, scored)


@pytest.mark.parametrize(
    ("setting", "word"), [("k=1", "k"), ("min_pool=0", "min_pool"), ("temperature=0", "temperature"), ("kk=3", "kk")]
)
def test_settings_out_of_range_are_refused_by_name(
    small_task: tuple[str, ...], tmp_path: Path, setting: str, word: str
) -> None:
    with pytest.raises(RequestError, match=word):
        trained(small_task, tmp_path, setting)


def test_a_constant_objective_is_refused_by_name(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from moalign.training.job import Job

    scored = Job.scored

    def flat(job: Job, per_prompt: int | None = None) -> Any:
        found = scored(job, per_prompt)
        return replace(found, raw=found.raw * [1.0, 0.0])

    monkeypatch.setattr(Job, "scored", flat)
    with pytest.raises(RequestError, match="sandbox: the scored responses: objective 'harmlessness' is constant"):
        trained(small_task, tmp_path)


@pytest.mark.slow
def test_when_all_answers_collapse_it_says_so(small_task: tuple[str, ...], tmp_path: Path) -> None:
    short = "task.generation.max_new_tokens=3"  # fewer than five tokens are a collapsed answer
    with pytest.raises(RequestError, match=r"all answers of the stage-1 models collapsed .*first\.steps"):
        trained(small_task, tmp_path, short)


def test_the_pool_is_two_thousand_or_twenty_sets_unless_told(small_task: tuple[str, ...], tmp_path: Path) -> None:
    made = plan(TrainRequest("paretohqd", overrides=(*small_task, *QUICK, "min_pool=null"), results=tmp_path))
    scored = made.task.scored()
    from moalign.runs.meter import Meter

    job = made.job(made.open(), Meter())
    sizes = [len(paretohqd.pool_of(job, scored, k, "stage1").rows) for k in (8, 100, 200)]
    assert 2000 <= sizes[0] == sizes[1] < 2500
    assert 4000 <= sizes[2] < 4500


def test_it_says_what_it_is() -> None:
    assert not ParetoHqd.capabilities.one_policy
    assert not ParetoHqd.capabilities.steerable
