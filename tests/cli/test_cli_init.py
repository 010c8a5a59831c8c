"""``moalign init`` as typed: what it writes trains as it is, and nothing is ever overwritten."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from moalign.config import load, yaml_lines
from moalign.experiment import init
from moalign.methods import registry

TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SMALL = [
    *("--set", "task.generation.max_new_tokens=10", "--set", "task.grid=2", "--set", "task.evaluation.prompts=2"),
    *("--set", "task.pool.calibration_per_prompt=2", "--set", "task.evaluation.bootstrap=100"),
    *("--set", "steps=2", "--set", "batch=2", "--set", "samples=2"),
]


@pytest.fixture(autouse=True)
def byte_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python is started by default: what is imported may leave a ``__pycache__``."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


@pytest.fixture(scope="module")
def chat_base(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model with a tokenizer that has a chat template."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("chat-base")
    AutoModelForCausalLM.from_pretrained(random_base).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def card_of(folder: str) -> dict[str, Any]:
    return yaml_lines.load(Path(folder, "task.yaml")).data


def test_what_it_writes_trains_as_it_is(moalign: Any, chat_base: Path, tmp_path: Path) -> None:
    ended = moalign("init", "--model", str(chat_base))
    assert (ended.code, ended.err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "my-task").iterdir())
    assert names == ["mo-odpo.yaml", "prompts.jsonl", "scorers.py", "task.yaml"]
    for line in ("moalign check my-task", "moalign preview --task my-task", "moalign train mo-odpo --task my-task"):
        assert f"  {line}\n" in ended.out
    assert card_of("my-task")["template"]["chat"] is True
    trained = moalign("train", "mo-odpo", "--task", "my-task", *SMALL, "--json")
    assert trained.code == 0, trained.err
    content = json.loads(trained.out)
    assert (content["task"], content["status"]) == ("my-task", "done")
    assert content["evaluation"]["objectives"] == ["brevity", "variety"]
    # The same task, named by its card's file, finds the run.
    again = json.loads(moalign("train", "mo-odpo", "--task", "my-task/task.yaml", *SMALL, "--json").out)
    assert again["found"] and again["run"] == content["run"]


def test_without_a_chat_template_prompts_are_plain(moalign: Any, random_base: Path) -> None:
    assert moalign("init", "plain", "--model", str(random_base)).code == 0
    template = card_of("plain")["template"]
    assert template["chat"] is False and template["marker"] == "\nAnswer:"
    assert "words" not in template


def test_the_context_of_the_model_limits_prompts(moalign: Any, random_base: Path) -> None:
    assert moalign("init", "plain", "--model", str(random_base)).code == 0
    assert card_of("plain")["generation"]["max_prompt_tokens"] == 256 - init.NEW_TOKENS


def test_one_s_own_data_and_objectives(moalign: Any, random_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.csv"
    data.write_text("prompt,other\n" + "".join(f"What is number {i}?,x\n" for i in range(40)))
    ended = moalign("init", "deep/er", "--model", str(random_base), "--data", "mine.csv",
                    "--objectives", "brevity, keyword-density, on-topic, good-manners")  # fmt: skip
    assert ended.code == 0
    assert "good-manners is yours to define: good_manners() in deep/er/scorers.py" in ended.err
    assert sorted(path.name for path in Path("deep/er").iterdir()) == ["mo-odpo.yaml", "scorers.py", "task.yaml"]
    card = card_of("deep/er")
    assert card["data"]["prompts"]["path"] == "../../mine.csv"
    assert [item["kind"] for item in card["objectives"]] == ["rule", "rule", "python", "python"]
    assert (card["grid"], card["reference_point"]) == (10, [0, 0, 0, 0])
    config = registry.get("mo-odpo").Config
    resolved = load.load_recipe(Path("deep/er/mo-odpo.yaml"), "mo-odpo", None, (), config)
    from moalign.rewards.panel import RewardPanel

    panel = RewardPanel.from_specs(resolved.card.objectives, Path.cwd())
    scores = panel.score(["bake some bread"] * 2, ["Bread, you see.", "cats and dogs"])
    assert scores[:, 2].tolist() == [1.0, 0.0]  # one word of four letters or more, which the prompt has
    assert scores[:, 3].tolist() == [1 / 3, 0.0]


def test_an_objective_may_be_named_as_a_builtin(moalign: Any, random_base: Path) -> None:
    """``sum``, which the function calls, must not be the function itself; nor ``len``, which variety calls."""
    from moalign.rewards.panel import RewardPanel

    ended = moalign("init", "own", "--model", str(random_base), "--objectives", "variety,sum,len,ends-with")
    assert ended.code == 0 and "ends-with may score all of the model's answers alike" in ended.err
    config = registry.get("mo-odpo").Config
    card = load.load_recipe(Path("own/mo-odpo.yaml"), "mo-odpo", None, (), config).card
    panel = RewardPanel.from_specs(card.objectives, Path.cwd())
    np.testing.assert_allclose(panel.score(["p"], ["you know the end."])[0, :3], [np.log(2), 1 / 2, 1 / 2])


def test_every_rule_can_be_an_objective(moalign: Any, random_base: Path) -> None:
    pytest.importorskip("vaderSentiment")
    from moalign.rewards.rules import RULES

    ended = moalign("init", "all", "--model", str(random_base), "--objectives", ",".join(RULES))
    assert ended.code == 0, ended.err
    assert [item["rule"] for item in card_of("all")["objectives"]] == list(RULES)
    assert "an example that nothing uses" in Path("all/scorers.py").read_text()
    assert moalign("check", "all/mo-odpo.yaml").code == 0


def test_the_built_in_model_is_named_and_told_when_it_is_missing(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moalign.lm import builtin

    monkeypatch.setattr(builtin, "converted", lambda name: None)  # as on a machine without its wheel
    monkeypatch.setattr(builtin, "installed", lambda name: None)
    ended = moalign("init", "own")
    assert ended.code == 0
    assert card_of("own")["model"] == "smollm2-135m-instruct"
    assert "make llm" in ended.err


def test_an_empty_folder_is_filled_and_json_tells_what_was_written(
    moalign: Any, random_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "My Task").mkdir()
    content = json.loads(moalign("init", "My Task", "--model", str(random_base), "--json").out)
    assert content["task"] == "my-task"
    for name in ("task.yaml", "mo-odpo.yaml"):
        assert "# command: moalign train mo-odpo --task 'My Task'\n" in Path("My Task", name).read_text()
    assert content["files"][-1] == "My Task/task.yaml" and all(Path(name).is_file() for name in content["files"])


def test_a_folder_of_a_task_s_name_is_named_as_a_folder(moalign: Any, random_base: Path) -> None:
    ended = moalign("init", "sandbox", "--model", str(random_base))
    assert (ended.code, "  moalign train mo-odpo --task ./sandbox\n" in ended.out) == (0, True)
    for name in ("task.yaml", "mo-odpo.yaml"):
        assert "# command: moalign train mo-odpo --task ./sandbox\n" in Path("sandbox", name).read_text()


@pytest.mark.parametrize("before", ["task.yaml", "notes.txt"])
def test_nothing_is_overwritten(moalign: Any, random_base: Path, tmp_path: Path, before: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / before).write_text("mine")
    ended = moalign("init", "full", "--model", str(random_base))
    assert ended.code == 2
    assert "the folder is not empty, and nothing is overwritten" in ended.errors[0]
    assert [(path.name, path.read_text()) for path in (tmp_path / "full").iterdir()] == [(before, "mine")]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objectives", "brevity"], "two or more names are needed"),
        (["--objectives", "brevity,brevity"], "found twice: brevity"),
        (["--objectives", "my-own,my_own"], "names of functions must differ; found twice: my_own"),
        (["--objectives", "brevty,variety"], "did you mean 'brevity'?"),
        (["--objectives", "brevity,9 lives"], "begins with a letter"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: there is no such file"),
        (["--data", "questions.jsonl"], "prompt"),
        (["--data", "few.jsonl"], "every split needs at least one"),
        (["--model", "./nowhere"], "there is no model folder './nowhere'"),
        (["--model", "smollm2-135m-instrct"], "did you mean 'smollm2-135m-instruct'?"),
        (["--model", "empty"], "not a model folder"),
        (["--model", "someone/some-model"], "the hub cannot be reached"),
    ],
)
def test_what_cannot_train_is_refused_and_nothing_is_left(
    moalign: Any, random_base: Path, tmp_path: Path, options: list[str], message: str, exists: bool
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "why?"}\n')
    (tmp_path / "few.jsonl").write_text('{"prompt": "why?"}\n')
    (tmp_path / "empty").mkdir()
    if exists:
        (tmp_path / "new").mkdir()
    before = sorted(tmp_path.rglob("*"))
    given = options if "--model" in options else [*options, "--model", str(random_base)]
    ended = moalign("init", "new", *given)
    assert ended.code == 2
    assert message in ended.errors[0]
    assert sorted(tmp_path.rglob("*")) == before


OWN = ("--objectives", "brevity,on-topic")
"""The second is a function of ``scorers.py``."""


def test_a_changed_scorer_file_is_another_task(moalign: Any, random_base: Path, tmp_path: Path) -> None:
    from moalign.tasks.load import make_task

    assert moalign("init", "own", "--model", str(random_base), *OWN).code == 0

    def seen(folder: str) -> tuple[str, str]:
        task = make_task(load.load_card(folder), tmp_path / "results")
        return task.hash, task.panel.objectives[1].revision

    first = seen("own")
    Path("own").rename("moved")
    assert seen("moved") == first
    scorers = Path("moved/scorers.py")
    scorers.write_text(scorers.read_text().replace("len(word) > 3", "len(word) > 4"))
    second = seen("moved")
    assert second[0] != first[0] and second[1] != first[1]


def test_a_scorer_file_that_is_gone_or_broken_is_told(moalign: Any, random_base: Path) -> None:
    assert moalign("init", "own", "--model", str(random_base), *OWN).code == 0
    Path("own/scorers.py").write_text("import math\n\non_topic = 1 / 0\n")
    ended = moalign("check", "own/mo-odpo.yaml")
    assert ended.code == 2
    assert "scorers.py failed: ZeroDivisionError: division by zero (line 3)" in ended.errors[0]
    Path("own/scorers.py").unlink()
    ended = moalign("check", "own/mo-odpo.yaml")
    assert ended.code == 2
    assert (
        "own/task.yaml:" in ended.errors[0] and "found 'scorers.py:on_topic'; there is no such file" in ended.errors[0]
    )
