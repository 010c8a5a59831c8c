"""Few-shot steering: what a run keeps, what a user's file is read as, and what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.cli.main import main
from moalign.core.amounts import Amounts, SplitAmount
from moalign.core.records import Pair
from moalign.experiment.handle import RunHandle
from moalign.experiment.train import TrainRequest, plan, train
from moalign.methods import few_shot_steer
from moalign.methods.few_shot_steer import ASKED, Config, FewShotSteer
from moalign.runs.run import Run
from moalign.training.users import scored_pool

QUICK = (
    "steps=3",
    "batch=8",
    "lr=0.01",
    "max_tokens=64",
    "per_prompt=4",
    "log_every=1",
    "encoder={steps: 4, users: 8, width: 8}",
    "policy.lora={r: 4, alpha: 8, dropout: 0.0}",
)
ASK = "how do i make soup ?"
PAIR = {"prompt": ASK, "chosen": "boil water", "rejected": "no idea"}


def trained(task: tuple[str, ...], results: Path, *more: str, method: str = "few-shot-steer") -> Run:
    return train(plan(TrainRequest(method, overrides=(*task, *QUICK, *more), results=results)))[0]


@pytest.fixture(scope="module")
def run(small_task: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(small_task, tmp_path_factory.mktemp("few-shot"))


def test_half_the_rows_state_their_preference_and_the_others_are_read(run: Run) -> None:
    asked = run.load_tensors(ASKED)[ASKED].numpy()
    assert asked.shape == (24, 2)
    assert asked.sum(axis=1) == pytest.approx([1.0] * 24)
    assert abs(10 * asked - (10 * asked).round()).max() < 1e-9
    # An encoder of four steps has hardly left the prior: what it reads is near the middle, what is stated is anywhere.
    middle = ((asked[:, 0] >= 0.4) & (asked[:, 0] <= 0.6)).mean()
    assert 0.35 < middle < 0.9
    assert {line["phase"] for line in run.metrics()} == {"encoder", "dpo"}
    assert run.record.notes["pairs"]["users"] == 24
    assert set(run.record.phases) >= {"encoder"}


def test_what_is_held_out_is_never_asked_for(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """What is read off pairs is near the middle, which is held out: it becomes the nearest that may be seen."""
    held = trained(small_task, tmp_path, "task.grid=5", "holdout=[[0.5, 0.5]]")
    asked = held.load_tensors(ASKED)[ASKED].numpy()
    assert set(map(tuple, asked.tolist())) <= {(0.0, 1.0), (0.25, 0.75), (0.75, 0.25), (1.0, 0.0)}
    assert len(set(asked[:, 0].tolist())) > 1


def test_the_policy_learns_what_the_user_of_a_row_prefers(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row's pair the response of more w . z is the chosen one, w the user's; the prompt states what was read."""
    from moalign.training import offline_dpo

    given: list[Any] = []
    plain = offline_dpo.encode_pairs

    def spy(job: Any, lm: Any, *texts: Any) -> Any:
        given.append((job, *texts))
        return plain(job, lm, *texts)

    monkeypatch.setattr(offline_dpo, "encode_pairs", spy)
    own = trained(small_task, tmp_path)
    ((job, texts, chosen, rejected, _, chance),) = given
    pool = scored_pool(job, job.config.per_prompt, job.config.context + job.config.targets)
    of = {(prompt, response.text): z for prompt, response, z in zip(pool.prompts, pool.responses, pool.z, strict=True)}
    _, w, pairs = few_shot_steer.drawn(job, pool)
    asked = own.load_tensors(ASKED)[ASKED].tolist()
    gaps = []
    for row, (text, better, worse) in enumerate(zip(texts, chosen, rejected, strict=True)):
        prompt = pool.prompts[pairs[row, 0]]
        assert text == job.task.renderer.preference(prompt, asked[row])
        gaps.append(float(w[row] @ (of[prompt, better.text] - of[prompt, worse.text])))
    assert min(gaps) >= 0 and max(gaps) > 0.1
    np.testing.assert_allclose(chance, 1 / (1 + np.exp(-job.config.sharpness * np.array(gaps))), rtol=1e-6)


def test_a_user_is_read_alike_by_python_and_by_the_command(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command answers as if the preference had been named; another order of the pairs changes nothing."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, {**PAIR, "chosen": "ask your mother"})))
    handle = RunHandle(run.path, run.record)
    read = handle.infer(file)
    assert sum(read) == pytest.approx(1) and all(round(10 * weight, 6) == round(10 * weight) for weight in read)
    method, context = handle.opened()
    assert isinstance(method, FewShotSteer)
    pairs = [Pair(**{**PAIR, "chosen": chosen}) for chosen in ("ask your mother", PAIR["chosen"])]
    assert method.infer(context, pairs) == read
    assert method.infer(context, []) == (0.5, 0.5)
    assert main(["generate", str(run.path), ASK, "--user", str(file), "--json"]) == 0
    shown = capsys.readouterr()
    named = ",".join(map(str, read))
    assert main(["generate", str(run.path), ASK, "--prefs", named, "--json"]) == 0
    assert json.loads(shown.out) == json.loads(capsys.readouterr().out)
    assert f"{file}: read as --prefs " in shown.err


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "mine.jsonl: the file is empty; at least one record is needed"),
        ("{broken\n", "mine.jsonl:1"),
        (json.dumps(PAIR) + "\n" + json.dumps({"prompt": ASK, "chosen": "a"}), "mine.jsonl:2"),
        (json.dumps({**PAIR, "rejected": PAIR["chosen"]}), "mine.jsonl:1: chosen and rejected are the same text"),
        (json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "chosen": " "}), "mine.jsonl: pair 2: chosen is empty; a text"),
        (
            "".join(json.dumps({**PAIR, "group": name}) + "\n" for name in "ab"),
            "found pairs of 2 users (group: a, b); allowed: those of one",
        ),
    ],
)
def test_a_file_that_does_not_hold_one_users_pairs_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, found: str
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(content)
    assert main(["generate", str(run.path), ASK, "--user", str(file)]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: --user") and found in message


def test_what_cannot_be_asked_is_refused_in_one_message(
    run: Run, small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, missing = tmp_path / "mine.jsonl", tmp_path / "mien.jsonl"
    file.write_text(json.dumps(PAIR))
    other = train(plan(TrainRequest("prompting", overrides=small_task, results=tmp_path)))[0]
    for words, expected in (
        ([str(run.path), "--user", str(file), "--prefs", "1,0"], "--user and --prefs exclude each other"),
        ([str(run.path), "--user", str(file), "--prefs-text", "safe"], "--user and --prefs exclude each other"),
        ([str(run.path), "--user", str(missing)], f"--user {missing}: no such file"),
        ([str(other.path), "--user", str(file)], "prompting reads no preference off pairs; allowed: methods that do"),
    ):
        assert main(["generate", words[0], ASK, *words[1:]]) == 2
        captured = capsys.readouterr()
        (message,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert expected in message and "Traceback" not in captured.err and captured.out == ""
    assert main(["generate", "--help"]) == 0
    assert "--user" in capsys.readouterr().out


def test_more_pairs_than_the_task_has_are_refused(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for text in (*small_task, *QUICK, "context=99999") for word in ("--set", text)]
    assert main(["train", "few-shot-steer", "--results", str(tmp_path), *words]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a user labels 100007 pairs, but the scored responses of task sandbox make " in message
    assert not list(tmp_path.glob("runs/*/*/*"))


@pytest.mark.slow
def test_without_steps_the_base_answers_for_what_is_read(small_task: tuple[str, ...], tmp_path: Path) -> None:
    bare = trained(small_task, tmp_path, "steps=0")
    assert {line["phase"] for line in bare.metrics()} == {"encoder"}
    assert bare.record.cost.tokens_trained == 0
    handle = RunHandle(bare.path, bare.record)
    base = train(plan(TrainRequest("prompting", overrides=small_task, results=tmp_path)))[0]
    asked = RunHandle(base.path, base.record).policy((0.3, 0.7)).respond([ASK])
    assert handle.policy((0.3, 0.7)).respond([ASK]) == asked


@pytest.mark.slow
def test_an_encoder_whose_training_broke_off_is_trained_anew_to_the_same_bytes(
    run: Run, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    """Its log has no line twice, and what was counted is counted once."""

    def progress(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("encoder", 3):
            raise KeyboardInterrupt

    request = TrainRequest("few-shot-steer", overrides=(*small_task, *QUICK), results=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(plan(request), progress)
    again = train(plan(request))[0]
    for name in ("encoder.safetensors", "asked.safetensors", "adapter/adapter_model.safetensors"):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    assert [(line["phase"], line["step"], line["loss"]) for line in again.metrics()] == [
        (line["phase"], line["step"], line["loss"]) for line in run.metrics()
    ]
    assert again.record.cost.reward_calls == run.record.cost.reward_calls


def test_its_cost_is_the_scored_responses_that_its_users_compare() -> None:
    task = Amounts(2, train=SplitAmount((16, 3)))
    assert [Config(per_prompt=n).learns_from(task).rows for n in (2, 8, 16)] == [4, 11, 19]
