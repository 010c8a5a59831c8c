"""``moalign reward`` as typed: train, find again, judge, and every wrong request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moalign.config.load import load_card
from moalign.rewards.hf_classifier import ClassifierScorer

SHORT = ("--set", "steps=3", "--set", "batch=6", "--set", "lr=0.01", "--set", "max_tokens=64", "--set", "log_every=1")


def write_pairs(path: Path, count: int = 60, **more: str) -> Path:
    rows = [
        {"prompt": f"how do i make soup {n} ?", "chosen": "stay safe .", "rejected": f"rush straight {n}", **more}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two pair files in the current folder."""
    return write_pairs(tmp_path / "ann.jsonl"), write_pairs(tmp_path / "bob.jsonl")


@pytest.mark.slow
def test_train_then_find_then_judge(moalign: Any, files: tuple[Path, Path], random_base: Path) -> None:
    command = ("reward", "train", "--pairs", "ann.jsonl", "--model", str(random_base), *SHORT)
    ended = moalign(*command, "--json")
    assert ended.code == 0
    content = json.loads(ended.out)
    assert (content["status"], content["found"], content["loss"]) == ("done", False, "bt")
    assert content["cost"]["tokens_trained"] > 0
    assert Path(content["run"]).parts[:2] == ("results", "reward-models")
    evaluation = content["evaluation"]
    (row,) = evaluation["datasets"]
    assert row["name"] == "ann"
    assert set(row["ece"]) == {"5", "10", "20"}
    assert (
        row["pairs"] + content["notes"]["pairs"]["train"]["ann"] + content["notes"]["pairs"]["calibration"]["ann"] == 60
    )
    assert Path(evaluation["figures"][0]).read_bytes()[:4] == b"\x89PNG"

    again = json.loads(moalign(*command, "--json").out)
    assert (again["found"], again["run"], again["evaluation"]) == (True, content["run"], evaluation)
    human = moalign(*command)
    assert "found trained" in human.out and "as an objective of a task card" in human.out

    for named in (content["run"], content["run_id"], f"{content['run']}/model"):
        judged = json.loads(moalign("reward", "eval", named, "--json").out)
        assert judged["datasets"] == evaluation["datasets"]
    other = json.loads(
        moalign("reward", "eval", content["run_id"], "--pairs", "bob.jsonl", "--split", "all", "--json").out
    )
    assert other["datasets"][0]["pairs"] == 60
    assert other["datasets"][0]["temperature"] is None


def test_the_objective_that_is_printed_is_valid_in_a_card(
    moalign: Any, files: tuple[Path, Path], random_base: Path, tmp_path: Path
) -> None:
    content = json.loads(
        moalign("reward", "train", "--pairs", "ann.jsonl", "--pairs", "bob.jsonl", "--loss", "multitask", "--set",
                "heads=each", "--model", str(random_base), *SHORT, "--no-eval", "--json").out
    )  # fmt: skip
    assert content["evaluation"] is None
    assert [spec["label"] for spec in content["objectives"]] == ["ann", "bob"]
    card = {"name": "demo", "kind": "text", "description": "x", "objectives": content["objectives"]}
    points = {"reference_point": [0, 0], "sensitivity_point": [0, 0], "data": {"prompts": ["hi"]}}
    (tmp_path / "card.yaml").write_text(json.dumps({**card, **points, "model": str(random_base)}))
    for spec in load_card(tmp_path / "card.yaml").objectives:
        score = ClassifierScorer(spec, tmp_path).score(["how do i make soup ?"], [" stay safe ."])  # type: ignore[arg-type]
        assert abs(score[0]) < 100


def test_more_with_one_group_says_that_it_is_plain(moalign: Any, files: tuple[Path, Path], random_base: Path) -> None:
    ended = moalign(
        "reward", "train", "--pairs", "ann.jsonl", "--loss", "more", "--model", str(random_base), *SHORT, "--dry-run"
    )
    assert ended.code == 0
    assert "there is one data set only (ann), so this is plain Bradley-Terry" in ended.err
    assert "dry run: nothing was trained or written" in ended.out
    assert not Path("results").exists()


@pytest.mark.slow
def test_groups_in_one_file_and_more(moalign: Any, tmp_path: Path, random_base: Path) -> None:
    both = tmp_path / "both.jsonl"
    parts = [write_pairs(tmp_path / f"{name}.tmp.jsonl", 40, group=name).read_text() for name in ("ann", "bob")]
    both.write_text("".join(parts))
    content = json.loads(
        moalign(
            "reward", "train", "--pairs", "both.jsonl", "--loss", "more", "--model", str(random_base), *SHORT, "--json"
        ).out
    )
    assert [row["name"] for row in content["evaluation"]["datasets"]] == ["ann", "bob"]
    lines = [json.loads(line) for line in (Path(content["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["weight_0"] + lines[0]["weight_1"] == pytest.approx(1)


@pytest.mark.slow
def test_the_sandboxs_annotators(moalign: Any, random_base: Path) -> None:
    content = json.loads(
        moalign(
            "reward", "train", "--task", "sandbox", "--model", str(random_base), "--loss", "multitask", *SHORT,
            "--set", "task.sandbox.annotators={groups: diverse, pairs: 60}", "--set", "batch=10", "--json",
        ).out
    )  # fmt: skip
    rows = content["evaluation"]["datasets"]
    assert [row["name"] for row in rows] == ["eager", "careful", "playful", "sober", "mild"]
    assert all(0 <= row["truth"]["ece"]["10"] <= 1 for row in rows)
    judged = moalign("reward", "eval", content["run_id"])
    assert judged.code == 0 and "true ECE" in judged.out


def test_changed_pairs_are_noticed(moalign: Any, files: tuple[Path, Path], random_base: Path) -> None:
    content = json.loads(
        moalign("reward", "train", "--pairs", "ann.jsonl", "--model", str(random_base), *SHORT, "--json").out
    )
    ended = moalign("reward", "eval", content["run_id"], "--set", "splits.seed=1")
    assert (ended.code, "--set splits.seed=1: the run is judged on its own pairs" in ended.errors[0]) == (2, True)
    write_pairs(files[0], 61)
    ended = moalign("reward", "eval", content["run_id"])
    assert ended.code == 2
    assert "its pairs have changed since it was trained" in ended.errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "no pairs: give --pairs [NAME=]FILE, or --task NAME"),
        (("train", "--pairs", "ann.jsonl"), "--model: missing"),
        (("train", "--pairs", "ann.jsonl", "--task", "sandbox"), "--pairs and --task exclude each other"),
        (("train", "--pairs", "an.jsonl", "--model", "m"), "did you mean 'ann.jsonl'?"),
        (("train", "--pairs", "=ann.jsonl", "--model", "m"), "found an empty name"),
        (
            ("train", "--pairs", "ann.jsonl", "--model", "m", "--loss", "mor"),
            "--loss: loss: found 'mor'; allowed: 'bt', 'multitask' or 'more'",
        ),
        (("train", "--pairs", "ann.jsonl", "--model", "m", "--set", "stpes=3"), "did you mean 'steps'?"),
        (("train", "--pairs", "ann.jsonl", "--model", "m", "--set", "task.grid=3"), "there is no task"),
        (("train", "--pairs", "ann.jsonl", "--pairs", "bob.jsonl", "--model", "m"), "loss bt is for one data set"),
        (("train", "--pairs", "ann.jsonl", "--model", "./nowhere"), "there is no model folder './nowhere'"),
        (("train", "--task", "stories", "--model", "m"), "its card has no data.pairs"),
        (
            ("train", "--pairs", "ann.jsonl", "--model", "m", "--seed", str(2**63)),
            f"seed: found {2**63}; allowed: 0 to",
        ),
        (("train", "--pairs", "ann.jsonl", "--model", "m", "--seed", "-1"), "seed: found -1; allowed: 0 to"),
        (("eval", "abcdef"), "unknown run 'abcdef'"),
        (("eval", "./nowhere", "--pairs", "ann.jsonl"), "there is no model folder './nowhere'"),
        (("eval", "./nowhere"), "it has no pairs of its own"),
        (
            ("eval", "./m", "--pairs", "ann.jsonl", "--set", "lr=1"),
            "--set lr=1: nothing is trained here; allowed: splits",
        ),
        (
            ("eval", "./m", "--pairs", "ann.jsonl", "--split", "all", "--set", "splits.seed=1"),
            "--set splits.seed=1: with --split all the pairs are not divided",
        ),
        (("eval", "x" * 300), "unknown run"),
    ],
)
def test_wrong_requests(
    moalign: Any, files: tuple[Path, Path], arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    ended = moalign("reward", *arguments)
    assert ended.code == 2
    assert any(message in text for text in ended.errors), ended.err
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_wrong_split_and_label(moalign: Any, files: tuple[Path, Path], random_base: Path) -> None:
    run = json.loads(
        moalign("reward", "train", "--pairs", "ann.jsonl", "--model", str(random_base), *SHORT, "--json").out
    )["run"]
    ended = moalign("reward", "eval", run, "--split", "tset")
    assert (ended.code, "--split: unknown split 'tset'" in ended.errors[0]) == (2, True)
    Path("file").write_text("")
    ended = moalign("reward", "eval", run, "--out", "file")
    assert (ended.code, "not a folder; choose another folder with --out DIR" in ended.errors[0]) == (2, True)
    ended = moalign("reward", "eval", run, "--label", "4")
    assert (ended.code, "the model has no label 4" in ended.errors[0]) == (2, True)
    weights = Path(run) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"xx")
    ended = moalign("reward", "eval", run)
    assert (ended.code, ended.errors[0].startswith(f"damaged: {weights}: its content is not what")) == (2, True)


def test_a_dry_run_of_a_real_recipe_needs_nothing_but_the_recipe(moalign: Any) -> None:
    ended = moalign("train", "moc", "--task", "hh-rlhf-2", "--dry-run")
    assert ended.code == 0
    for text in ("meta-llama/Llama-2-7b-hf", "training: update", "cost", "h on A100", "config.groups", "not here yet"):
        assert text in ended.out
    content = json.loads(moalign("train", "ric", "--task", "safe-rlhf", "--dry-run", "--json").out)
    assert content["dry_run"] and content["memory"]["total_gib"] > 40 and content["cost"]["tokens_trained"] > 0
    given = ("--prefs", "0.3,0.7", "--seed", "4", "--json")
    content = json.loads(moalign("train", "ric", "--task", "safe-rlhf", "--dry-run", *given).out)
    assert (content["seed"], content["prefs"], content["holdout"]) == (4, [[0.3, 0.7]], None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prefs", "3,7"), "--prefs 3,7: the weights sum to 10"),
        (("--seed", "9" * 30), "seed: found 99999"),
        (("--grid", "0"), "--grid"),
        (("--set", "holdout=[[0.5, 0.6]]"), "holdout"),
    ],
)
def test_a_dry_run_without_the_model_refuses_what_training_refuses(
    moalign: Any, more: tuple[str, ...], message: str
) -> None:
    ended = moalign("train", "ric", "--task", "safe-rlhf", "--dry-run", *more)
    assert ended.code == 2 and message in ended.errors[0]


@pytest.mark.usefixtures("toys")
def test_the_run_of_a_policy_is_no_reward_model(moalign: Any) -> None:
    run = json.loads(moalign("train", "toy", "--no-eval", "--json").out)["run"]
    for more in ((), ("--task", "sandbox")):
        ended = moalign("reward", "eval", run, *more)
        assert ended.code == 2
        assert ended.errors == [
            f"run {run}: it is no run of moalign reward train: its record (method toy) holds no settings of a reward "
            "model; moalign eval is for runs of moalign train"
        ]


def test_a_reward_model_is_no_policy(moalign: Any, files: tuple[Path, Path], random_base: Path) -> None:
    command = ("reward", "train", "--pairs", "ann.jsonl", "--model", str(random_base), *SHORT, "--json")
    run = json.loads(moalign(*command).out)["run"]
    for verb in (("eval",), ("compare",), ("export", "--out", "made"), ("generate", "--prefs", "1,0")):
        ended = moalign(verb[0], run, *verb[1:])
        assert ended.code == 2
        assert ended.errors == [
            f"run {run}: it is no run of moalign train: its record (loss bt) is a reward model's; moalign reward eval "
            f"looks at it, and an objective has it as its model ({run}/model)"
        ]
    assert not Path("made").exists()
    shown = moalign("show", run)
    assert shown.code == 0 and "settings.loss" in shown.out and "mean over data sets: accuracy" in shown.out
    assert json.loads(moalign("show", run, "--json").out)["evaluation"]["datasets"][0]["name"] == "ann"


@pytest.mark.parametrize(
    ("place", "value"), [(("datasets", 0, "ece_ci", "10"), ["a", "b"]), (("mean",), None), (("figures",), 3)]
)
def test_a_stored_evaluation_that_is_damaged_is_one_message(tmp_path: Path, place: Any, value: Any) -> None:
    """What is printed as a number must be one: the file, the place and what to do are named."""
    from moalign.core.errors import RequestError
    from moalign.reward_models.evaluation import read

    report = {
        "name": "ann", "pairs": 4, "accuracy": 0.5, "accuracy_ci": [0.1, 0.9], "log_loss": 0.7, "ece": {"10": 0.1},
        "ece_ci": {"10": [0.0, 0.2]}, "ece_by_chance": {"10": 0.1}, "reliability": [], "rows_shortened": 0,
        "temperature": None, "ece_scaled": None, "truth": None,
    }  # fmt: skip
    content: Any = {"datasets": [report], "mean": {"accuracy": 0.5, "ece": {"10": 0.1}}, "figures": [], "run": "x"}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read(path, "judge again") == content
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RequestError, match=rf"eval\.json: {'.'.join(map(str, place))}.*not what moalign wrote.*again"):
        read(path, "judge again")


def test_named_pairs_are_divided_as_the_runs_own_were(
    moalign: Any, files: tuple[Path, Path], random_base: Path
) -> None:
    """Those that it was trained on are not among the held-out ones, whatever its splits; from any folder."""
    splits = ("--set", "splits={train: .6, calibration: .2, eval: .2, salt: mine}")
    command = ("reward", "train", "--pairs", "ann.jsonl", "--model", str(random_base), *SHORT, *splits, "--json")
    content = json.loads(moalign(*command).out)
    own = json.loads(moalign("reward", "eval", content["run"], "--json").out)["datasets"]
    named = json.loads(moalign("reward", "eval", content["run"], "--pairs", "ann.jsonl", "--json").out)["datasets"]
    assert named == own
    changed = ("--set", "splits.salt=other")
    other = json.loads(moalign("reward", "eval", content["run"], "--pairs", "ann.jsonl", *changed, "--json").out)
    assert other["datasets"] != own


def test_data_sets_whose_names_are_not_ascii_are_objectives_of_their_own(
    moalign: Any, files: tuple[Path, Path], random_base: Path
) -> None:
    given = ("--pairs", "安全=ann.jsonl", "--pairs", "有用=bob.jsonl", "--loss", "multitask", "--set", "heads=each")
    ended = moalign("reward", "train", *given, "--model", str(random_base), *SHORT, "--json")
    assert ended.code == 0, ended.err
    content = json.loads(ended.out)
    assert [spec["name"] for spec in content["objectives"]] == ["head", "head-2"]
    assert [spec["label"] for spec in content["objectives"]] == ["安全", "有用"]
    assert len(set(content["evaluation"]["figures"])) == 2


def test_a_reward_model_of_a_relative_task_is_judged_from_any_folder(
    moalign: Any, files: tuple[Path, Path], random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.config.load import load_card
    from moalign.experiment.reward import RewardTrainRequest, plan

    (tmp_path / "mine").mkdir()
    card = load_card("sandbox").model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "mine" / "task.yaml").write_text(json.dumps({**card, "model": str(random_base)}))
    (tmp_path / "base").symlink_to(random_base)
    made = plan(
        RewardTrainRequest(
            task="./mine", overrides=("task.model=base", "task.grid=3", "steps=1", "batch=2"), loss="multitask"
        )
    )
    assert made.as_given["task"] == str(tmp_path / "mine" / "task.yaml")
    assert made.as_given["set"][:2] == [f"task.model={random_base.resolve()}", "task.grid=3"]
    assert (
        plan(RewardTrainRequest(task="sandbox", overrides=("task.model=base",), loss="multitask")).as_given["task"]
        == "sandbox"
    )


def test_without_reward_models_the_command_that_makes_one_is_named(moalign: Any) -> None:
    ended = moalign("reward", "eval", "nope")
    assert ended.code == 2
    assert "there are no runs in results/reward-models; train one: moalign reward train, or" in ended.errors[0]
