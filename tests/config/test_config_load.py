"""Card, recipe, config and options together: what they resolve to, and all their problems in one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from moalign.config import find, load
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.methods import registry
from moalign.training.settings import DistilConfig, WarmStart


class Pairing(Strict):
    kind: Literal["random", "best"] = "random"


class Config(Strict):
    steps: int = Field(default=10, ge=1)
    lr: float = 1e-3
    pairing: Pairing = Pairing()


RECIPE = Path("recipes/demo/ric.yaml")


def recipe(path: Path | None = RECIPE, *sets: str, task: str | None = None) -> load.ResolvedRequest:
    return load.load_recipe(path, "ric", task, sets, Config)


def problems(path: Path | None = RECIPE, *sets: str, task: str | None = None) -> tuple[str, ...]:
    with pytest.raises(RequestError) as caught:
        recipe(path, *sets, task=task)
    assert caught.value.exit_code == 2
    return caught.value.problems


def edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)


# --- what is resolved -------------------------------------------------------------------------------------------


def test_a_recipe_with_its_config_and_card(recipes: Path) -> None:
    request = recipe()
    assert request.config == Config(lr=1e-4)
    assert request.recipe.config == {"steps": 10, "lr": 1e-4, "pairing": {"kind": "random"}}
    assert (request.recipe.seed, request.recipe.policy.lora.r) == (7, 8)
    assert request.card.objective_names == ["length", "polite"]
    assert request.card_path == recipes / "demo" / "task.yaml"
    assert request.as_given == {
        "method": "ric",
        "task": "demo",
        "recipe_file": "recipes/demo/ric.yaml",
        "recipe": {"method": "ric", "task": "demo", "seed": 7, "policy": {"lora": {"r": 8}}, "config": {"lr": 1e-4}},
        "set": [],
    }


def test_without_a_recipe_the_methods_defaults_hold(recipes: Path) -> None:
    request = recipe(None, task="demo")
    assert request.config == Config()
    assert (request.recipe.method, request.recipe.task, request.recipe.seed) == ("ric", "demo", 0)
    assert request.as_given["recipe"] is None
    assert request.recipe_path is None


def test_options_go_to_recipe_config_and_card(recipes: Path) -> None:
    sets = ["seed=3", "config.lr=1e-5", "steps=20", "pairing.kind=best", "policy.lora.r=2", "task.grid=3"]
    request = recipe(RECIPE, *sets, "needs.minutes=4", "task.objectives.0.maximise=false")
    assert request.config == Config(lr=1e-5, steps=20, pairing=Pairing(kind="best"))
    assert (request.recipe.seed, request.recipe.policy.lora.r, request.recipe.needs.minutes) == (3, 2, 4)
    assert request.card.grid == 3
    assert [objective.maximise for objective in request.card.objectives] == [False, True]
    assert request.as_given["set"] == [*sets, "needs.minutes=4", "task.objectives.0.maximise=false"]
    assert request.as_given["recipe"] == recipe().as_given["recipe"]  # as it stands in the file
    assert request.as_given["recipe"]["policy"] == {"lora": {"r": 8}}


def test_a_whole_config_and_the_last_of_two_options(recipes: Path) -> None:
    assert recipe(None, "config={steps: 4}", "steps=5", "steps=6", task="demo").config == Config(steps=6)


def test_a_quick_budget_goes_before_the_config_and_options_before_both(recipes: Path) -> None:
    edit(recipes / "demo" / "ric.yaml", ("lr: 1e-4", "lr: 1e-4\nquick: {steps: 2, pairing: {kind: best}}"))
    assert recipe().config == Config(lr=1e-4)
    assert recipe(RECIPE, "budget=quick").config == Config(lr=1e-4, steps=2, pairing=Pairing(kind="best"))
    assert recipe(RECIPE, "steps=3", "budget=quick").config.steps == 3
    assert recipe(RECIPE, "budget=quick", "budget=full").config == Config(lr=1e-4)
    edit(recipes / "demo" / "ric.yaml", ("seed: 7", "seed: 7\nbudget: quick"))
    assert recipe().config.steps == 2


def test_options_change_the_quick_budget_itself(recipes: Path) -> None:
    edit(recipes / "demo" / "ric.yaml", ("lr: 1e-4", "lr: 1e-4\nquick: {steps: 2}"))
    assert recipe(RECIPE, "budget=quick", "quick.steps=3").config == Config(lr=1e-4, steps=3)
    assert recipe(RECIPE, "quick.steps=3").config == Config(lr=1e-4)
    assert recipe(RECIPE, "quick={lr: 0.5}", "budget=quick").config == Config(lr=0.5)
    assert recipe(RECIPE, "budget=quick", "steps=4", "quick.steps=3").config.steps == 4
    assert recipe(None, "quick={steps: 3}", "budget=quick", task="demo").config == Config(steps=3)
    assert recipe(RECIPE, "quick.steps=3").as_given["recipe"]["quick"] == {"steps": 2}  # as it stands in the file
    without = "--set budget: found 'quick', but recipes/demo/ric.yaml has no section quick"
    assert problems(RECIPE, "budget=quick", "quick=null") == (without,)


@pytest.mark.parametrize("budget", ["full", "quick"])
def test_the_quick_budget_is_checked_whichever_is_asked_for(recipes: Path, budget: str) -> None:
    file = recipes / "demo" / "ric.yaml"
    edit(file, ("lr: 1e-4", "lr: 1e-4\nquick:\n  stepz: 10\n  lr: high\n  pairing: {kind: bset}"))
    hint = "unknown key; allowed: steps, lr, pairing; did you mean 'steps'?"
    wrong = (
        f"recipes/demo/ric.yaml:9: quick.stepz: {hint}",
        "recipes/demo/ric.yaml:10: quick.lr: found 'high'; allowed: a number",
        "recipes/demo/ric.yaml:11: quick.pairing.kind: found 'bset'; allowed: 'random' or 'best'; did you mean 'best'?",
    )
    assert problems(RECIPE, f"budget={budget}") == wrong
    edit(file, ("config:\n", "config:\n  stepz: 4\n"))
    texts = problems(RECIPE, f"budget={budget}")
    assert [text.split(": ")[1] for text in texts if "stepz" in text][-1] == "quick.stepz"  # not hidden by the other
    file.write_text("method: ric\ntask: demo\nquick: {steps: 2}\n")
    assert problems(RECIPE, f"budget={budget}", "quick.stepz=3") == (f"--set quick.stepz: {hint}",)
    file.write_text("method: ric\ntask: demo\nquick: 3\n")
    assert "recipes/demo/ric.yaml:3: quick: found 3; allowed: a section or null" in problems(RECIPE, f"budget={budget}")


class Batches(Strict):
    batch: int = 8
    accumulate: int = 1

    @model_validator(mode="after")
    def _in_equal_parts(self) -> Batches:
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate; found {self.batch} and {self.accumulate}")
        return self


def test_what_does_not_fit_only_with_the_quick_budget_names_it(recipes: Path) -> None:
    def resolved(*sets: str) -> Strict:
        return load.load_recipe(RECIPE, "ric", None, sets, Batches).config

    file = recipes / "demo" / "ric.yaml"
    file.write_text("method: ric\ntask: demo\nconfig: {batch: 8}\nquick:\n  batch: 4\n")
    assert resolved("accumulate=8") == Batches(accumulate=8)  # an option is for the budget that is asked for
    assert resolved("budget=quick", "accumulate=4") == Batches(batch=4, accumulate=4)
    wrong = "batch must be a multiple of accumulate; found 4 and 8"
    with pytest.raises(RequestError, match=rf"^recipes/demo/ric\.yaml:5: quick: {wrong}$"):
        resolved("budget=quick", "accumulate=8")
    file.write_text("method: ric\ntask: demo\nconfig: {accumulate: 8}\nquick: {batch: 4}\n")
    with pytest.raises(RequestError, match=rf"^recipes/demo/ric\.yaml:4: quick: {wrong}$"):
        resolved()


def test_a_quick_budget_that_a_recipe_lacks_and_one_that_is_none(recipes: Path) -> None:
    texts = problems(RECIPE, "budget=quick")
    assert texts == ("--set budget: found 'quick', but recipes/demo/ric.yaml has no section quick",)
    texts = problems(None, "budget=quick", task="demo")
    assert texts == ("--set budget: found 'quick', but ric without a recipe has no section quick",)
    assert problems(RECIPE, "budget=quik") == (
        "--set budget: found 'quik'; allowed: 'full' or 'quick'; did you mean 'quick'?",
    )


def test_the_task_option_goes_before_the_recipes_task(recipes: Path) -> None:
    other = recipes / "other"
    other.mkdir()
    (other / "prompts.jsonl").touch()
    (other / "task.yaml").write_text((recipes / "demo" / "task.yaml").read_text().replace("name: demo", "name: other"))
    request = recipe(task="other")
    assert (request.card.name, request.recipe.task) == ("other", "other")


def test_a_task_path_in_a_recipe_is_relative_to_the_recipe(recipes: Path) -> None:
    edit(recipes / "demo" / "ric.yaml", ("task: demo", "task: ./task.yaml"))
    assert recipe().card.name == "demo"


# --- paths ------------------------------------------------------------------------------------------------------


def test_paths_of_the_card_are_relative_to_the_card(recipes: Path) -> None:
    card = load.load_card("demo")
    folder = recipes / "demo"
    assert card.model == str(folder / "base")
    assert card.data.prompts.path == str(folder / "prompts.jsonl")  # type: ignore[union-attr]
    assert card.objectives[1].model == str(folder / "judge")  # type: ignore[union-attr]


def test_a_model_given_by_an_option_is_relative_to_the_current_directory(recipes: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "mine").mkdir()
    assert load.load_card("demo", ["task.model=mine"]).model == str(tmp_path / "mine")
    assert load.load_card("demo", ["task.model=./base"]).model == str(tmp_path / "base")  # not recipes/demo/base
    judge = load.load_card("demo", ["task.objectives.1.model=mine"]).objectives[1]
    assert judge.model == str(tmp_path / "mine")  # type: ignore[union-attr]
    assert recipe(None, "task.model=mine", task="demo").card.model == str(tmp_path / "mine")


def test_the_home_folder_is_understood(recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load.load_card("demo", ["task.model=~/model"]).model == str(tmp_path / "home" / "model")


def test_hub_ids_stay(recipes: Path) -> None:
    assert load.load_card("demo", ["task.model=owner/name"]).model == "owner/name"
    data = load.load_card("demo", ["task.data.prompts.path=owner/name"]).data
    assert data.prompts.path == "owner/name"  # type: ignore[union-attr]
    assert load.load_card("demo", ["task.model=judge"]).model == "judge"  # stands beside the card, not here


def test_paths_that_cannot_be_hub_ids_must_exist(recipes: Path, tmp_path: Path) -> None:
    edit(recipes / "demo" / "task.yaml", ("model: base", "model: ../none"), ("prompts.jsonl", "none.jsonl.gz"))
    with pytest.raises(RequestError) as caught:
        load.load_card("demo", ["task.objectives.1.model=./no"])
    assert caught.value.problems == (
        f"recipes/demo/task.yaml:13: model: found '../none'; there is no such model folder: {recipes}/demo/../none",
        "recipes/demo/task.yaml:16: data.prompts.path: found 'none.jsonl.gz'; there is no such file or folder: "
        + f"{recipes}/demo/none.jsonl.gz",
        f"--set task.objectives.1.model: found './no'; there is no such model folder: {tmp_path}/no",
    )


def test_a_section_in_the_wrong_place_is_one_problem(recipes: Path) -> None:
    file = recipes / "demo" / "task.yaml"
    edit(file, ("model: judge", "model: {model: ./judge}"))
    with pytest.raises(RequestError) as caught:
        options = ["task.data.responses={path: {path: nofile.jsonl}}", "task.data.prompts.path=none.jsonl"]
        load.load_card("demo", options)
    wrong = [problem.rsplit("; ", 1)[0] for problem in caught.value.problems]
    assert wrong == [
        "--set task.data.prompts.path: found 'none.jsonl'",
        "--set task.data.responses: data.responses.path: found a section with keys path",
        "recipes/demo/task.yaml:10: objectives.1.model: found a section with keys model",
    ]


LONG = "a" * 300
"""Longer than a file's name may be."""


@pytest.mark.parametrize("name", [LONG, f"./{LONG}", f"{LONG}/{find.CARD}"])
def test_a_name_that_is_too_long_is_no_task_and_no_recipe(recipes: Path, name: str) -> None:
    assert find.find_card(name) is None
    for wanted in (find.find_task_file, find.find_recipe):
        with pytest.raises(RequestError, match=LONG):
            wanted(name)


def test_the_file_of_a_scorer_with_a_name_that_is_too_long_is_not_there(recipes: Path) -> None:
    option = f"task.objectives.1={{name: polite, kind: python, function: {LONG}.py:f}}"
    with pytest.raises(RequestError, match=r"objectives\.1\.function: found .*; there is no such file: "):
        load.load_card("demo", [option])


# --- what is refused --------------------------------------------------------------------------------------------


def test_errors_of_card_recipe_config_and_options_are_one_error(recipes: Path) -> None:
    edit(recipes / "demo" / "task.yaml", ("kind: rule", "kind: ruel"), ("[0, 0]", "[0, x]"))
    edit(recipes / "demo" / "ric.yaml", ("seed: 7", "sede: 7"), ("lr: 1e-4", "lr: fast\n  stpes: 3"))
    texts = problems(RECIPE, "steps=none", "task.grid=1", "grdi=3", "policy.lora.r=0", "x")
    assert texts == (
        "--set grdi: unknown setting; allowed: steps, lr, pairing, description, seed, prefs, holdout, snapshots, "
        + "policy.KEY, rewards.KEY, rollout.KEY, config.KEY, budget, quick.KEY, needs.KEY, reported, trackers, "
        + "sources.KEY, task.KEY; did you mean 'task.grid'?",
        "--set x: no '=' found; write --set key=value, like --set seed=3",
        "--set task.grid: found 1; allowed: a whole number >= 2",
        "recipes/demo/task.yaml:6: objectives.0.kind: found 'ruel'; allowed: hf-classifier, judge, lm, python, rule, "
        + "sandbox; did you mean 'rule'?",
        "recipes/demo/task.yaml:11: reference_point.1: found 'x'; allowed: a number",
        "--set policy.lora.r: found 0; allowed: a whole number >= 1 and <= 65536",
        "recipes/demo/ric.yaml:3: sede: unknown key; allowed: method, task, description, seed, prefs, holdout, "
        + "snapshots, policy, rewards, rollout, config, budget, quick, needs, reported, trackers, sources; "
        + "did you mean 'seed'?",
        "--set steps: config.steps: found 'none'; allowed: a whole number >= 1",
        "recipes/demo/ric.yaml:7: config.lr: found 'fast'; allowed: a number",
        "recipes/demo/ric.yaml:8: config.stpes: unknown key; allowed: steps, lr, pairing; did you mean 'steps'?",
    )


@pytest.mark.parametrize(
    ("option", "offered"),
    [
        ("stepz=1", "steps"),
        ("pairng.kind=best", "pairing.kind"),
        ("model=x", "task.model"),
        ("lora.r=3", "policy.lora.r"),
        ("tsk.grid=3", "task.grid"),
        ("sed=3", "seed"),
        ("confg.lr=1", "config.lr"),
        ("kind=best", "pairing.kind"),
        ("knd=best", "pairing.kind"),
        ("pairng.knd=best", "pairing.kind"),
        ("max_new_tokens=9", "task.generation.max_new_tokens"),
        ("gpu_memory_gib=9", "needs.gpu_memory_gib"),
        ("objectives.0.maximise=false", "task.objectives.0.maximise"),
        ("recipe.seed=3", "seed"),
        ("quik.lr=1", "quick.lr"),
    ],
)
def test_an_unknown_option_offers_the_nearest_of_all(recipes: Path, option: str, offered: str) -> None:
    (texts,) = problems(RECIPE, option)
    assert texts.startswith(f"--set {option.split('=')[0]}: unknown setting; allowed: steps, lr, pairing,")
    assert texts.endswith(f"; did you mean {offered!r}?")


@pytest.mark.parametrize("option", ["steps=3", "stepz=3", "lr=3", "weight_decay=0"])
def test_a_setting_of_several_sections_offers_each(option: str) -> None:
    """RiC has an offline and an online stage, and no setting of its own that is called so."""
    with pytest.raises(RequestError) as caught:
        load.load_recipe(None, "ric", "sandbox", [option], registry.get("ric").Config)
    name = option.split("=")[0].replace("stepz", "steps")
    assert str(caught.value).endswith(f"; did you mean 'offline.{name}' or 'online.{name}'?")


def test_keys_inside_a_section_offer_the_nearest_there(recipes: Path) -> None:
    texts = problems(RECIPE, "config.stpes=1", "task.generation.temprature=1", "pairing.knd=best")
    assert texts == (
        "--set task.generation.temprature: unknown key; allowed: max_prompt_tokens, max_new_tokens, temperature, "
        + "top_p, batch_size; did you mean 'temperature'?",
        "--set pairing.knd: config.pairing.knd: unknown key; allowed: kind; did you mean 'kind'?",
        "--set config.stpes: unknown key; allowed: steps, lr, pairing; did you mean 'steps'?",
    )


def test_task_and_method_are_not_settings(recipes: Path) -> None:
    texts = problems(RECIPE, "task=other", "method=moc")
    assert [text.split(";")[0] for text in texts] == [
        "--set task: the task itself is not a setting",
        "--set method: the method itself is not a setting",
    ]


def test_an_option_through_a_plain_value(recipes: Path) -> None:
    texts = problems(RECIPE, "lr.x=1", "task.objectives.7.name=x")
    assert texts == (
        "--set lr.x: config.lr is 0.0001, not a section; it has no key 'x'",
        "--set task.objectives.7.name: objectives is a list; found position '7'; allowed: 0 to 1",
    )


def test_a_card_alone_takes_only_its_own_keys(recipes: Path) -> None:
    with pytest.raises(RequestError) as caught:
        load.load_card("demo", ["model=x", "zzz=1", "task.grdi=2"])
    assert caught.value.exit_code == 2
    assert caught.value.problems[:2] == (
        "--set model: unknown setting; allowed: task.KEY; did you mean 'task.model'?",
        "--set zzz: unknown setting; allowed: task.KEY",
    )
    assert caught.value.problems[2].startswith("--set task.grdi: unknown key; allowed: name, kind,")


def test_a_recipe_of_another_method(recipes: Path) -> None:
    edit(recipes / "demo" / "ric.yaml", ("method: ric", "method: moc"))
    (texts,) = problems()
    assert texts.startswith("recipes/demo/ric.yaml:1: method: found 'moc', but the method asked for is 'ric'")


def test_preferences_of_a_recipe_are_checked_against_the_cards_objectives(recipes: Path) -> None:
    edit(recipes / "demo" / "ric.yaml", ("seed: 7", "prefs:\n  - [0.3, 0.7]\n  - [3, 7]\n  - [1, 0, 0]"))
    assert problems() == (
        "recipes/demo/ric.yaml:5: prefs.1: found 3,7: the weights sum to 10, not 1; did you mean 0.3,0.7?",
        "recipes/demo/ric.yaml:6: prefs.2: found 1,0,0: 3 weights, but the task has 2 objectives (length, polite); "
        + "give one weight each",
    )


def test_wrong_preferences_are_told_with_all_else_that_is_wrong(recipes: Path) -> None:
    rows = "prefs: [[3, 7], [0.5], [a, 1], [.nan, 1], [0.5, 0.5]]\nholdout:\n  - [2, -1]\nsede: 1"
    edit(recipes / "demo" / "ric.yaml", ("seed: 7", rows), ("lr: 1e-4", "lr: fast"))
    texts = problems()
    assert [text.split("; ")[0] for text in texts if "prefs" in text.split(": ")[1]] == [
        "recipes/demo/ric.yaml:3: prefs.2.0: found 'a'",
        "recipes/demo/ric.yaml:3: prefs.3.0: found nan",
        "recipes/demo/ric.yaml:3: prefs.0: found 3,7: the weights sum to 10, not 1",
        "recipes/demo/ric.yaml:3: prefs.1: found 0.5: 1 weight, but the task has 2 objectives (length, polite)",
    ]
    assert "recipes/demo/ric.yaml:5: holdout.0: found 2,-1: the weight of polite is negative; allowed: 0 to 1" in texts
    assert len(texts) == 7 and "sede: unknown key" in "".join(texts) and "config.lr: found 'fast'" in "".join(texts)
    option = "--set prefs: prefs.0: found 3,7: the weights sum to 10, not 1; did you mean 0.3,0.7?"
    assert option in problems(RECIPE, "prefs=[[3, 7]]")
    edit(recipes / "demo" / "ric.yaml", (rows, f"prefs: [[{10**400}, 1], 3]"))
    assert [text.split(":")[2] for text in problems()][:2] == [" prefs.0.0", " prefs.1"]


def test_tasks_that_do_not_exist(recipes: Path) -> None:
    assert problems(task="dmeo") == ("--task: unknown task 'dmeo'; allowed: demo; did you mean 'demo'?",)
    edit(recipes / "demo" / "ric.yaml", ("task: demo", "task: dmeo"), ("lr: 1e-4", "lr: x"))
    assert problems() == (
        "recipes/demo/ric.yaml:2: task: unknown task 'dmeo'; allowed: demo; did you mean 'demo'?",
        "recipes/demo/ric.yaml:7: config.lr: found 'x'; allowed: a number",
    )


def test_broken_files_do_not_hide_the_other_file(recipes: Path) -> None:
    (recipes / "demo" / "ric.yaml").write_text("a: [1\n")
    edit(recipes / "demo" / "task.yaml", ("kind: text", "kind: txt"))
    texts = problems(task="demo")
    assert texts[0].startswith("recipes/demo/ric.yaml:2: broken YAML")
    assert texts[1] == "recipes/demo/task.yaml:2: kind: found 'txt'; allowed: 'sandbox' or 'text'; did you mean 'text'?"
    assert problems()[0].startswith("recipes/demo/ric.yaml:2: broken YAML")
    assert problems(Path("none.yaml"))[0] == "none.yaml: cannot be read: No such file or directory"


def test_a_config_that_needs_a_key_says_so_without_a_recipe(recipes: Path) -> None:
    class Needs(Strict):
        steps: int

    with pytest.raises(RequestError, match=r"^ric without a recipe: config.steps: missing; allowed: a whole number$"):
        load.load_recipe(None, "ric", "demo", (), Needs)
    assert load.load_recipe(None, "ric", "demo", ["steps=2"], Needs).config == Needs(steps=2)


def test_a_section_of_the_wrong_kind_is_told_once(recipes: Path) -> None:
    edit(recipes / "demo" / "ric.yaml", ("config:\n  lr: 1e-4", "config: fast"))
    assert problems() == ("recipes/demo/ric.yaml:6: config: found 'fast'; allowed: a section",)


def test_names_of_a_recipe(recipes: Path) -> None:
    file = recipes / "demo" / "ric.yaml"
    assert load.recipe_names(file) == ("ric", "demo")
    edit(file, ("method: ric", "methd: ric"), ("task: demo", "task: 3"))
    with pytest.raises(RequestError) as caught:
        load.recipe_names(file)
    assert caught.value.problems == (
        "recipes/demo/ric.yaml:1: method: missing; allowed: the name of a method; found the key 'methd'; "
        + "did you mean 'method'?",
        "recipes/demo/ric.yaml:2: task: found 3; allowed: the name of a task",
    )
    file.write_text("seed: 1\ntaks: demo\nmethod: ric\n")
    with pytest.raises(RequestError, match=r":2: task: missing; .*; found the key 'taks'; did you mean 'task'\?$"):
        load.recipe_names(file)
    file.write_text("task: demo\nprefs: null\nneeds: {}\n")  # all of them right: none was meant to be the method
    with pytest.raises(RequestError, match=r"ric\.yaml:1: method: missing; allowed: the name of a method$"):
        load.recipe_names(file)


# --- what is borrowed from another method's recipe ------------------------------------------------------------------

LENDER = "method: hindsight\ntask: demo\nconfig:\n  distil: {steps: 40, batch: 4, n: 2, lr: 0.01}\n"


class Warm(WarmStart):
    steps: int = 10


def warm(*sets: str, task: str = "demo") -> Warm:
    config = load.load_recipe(None, "moc", task, sets, Warm).config
    assert isinstance(config, Warm)
    return config


def test_a_warm_start_takes_what_is_open_from_hindsights_recipe(recipes: Path) -> None:
    (recipes / "demo" / "hindsight.yaml").write_text(LENDER)
    plain = DistilConfig()
    assert warm() == Warm() and warm().distil == plain
    taken = warm("warm_start=hindsight").distil
    assert (taken.steps, taken.batch, taken.n, taken.lr) == (40, 4, 2, 0.01)
    assert (taken.alpha, taken.resolution) == (plain.alpha, plain.resolution)
    own = warm("warm_start=hindsight", "distil.n=5").distil
    assert own == taken.model_copy(update={"n": 5})


def test_a_task_without_that_recipe_has_the_defaults(recipes: Path) -> None:
    assert warm("warm_start=hindsight").distil == DistilConfig()
    for nothing in ("config: {steps: 3}\n", "config: [1]\n", ""):
        (recipes / "demo" / "hindsight.yaml").write_text("method: hindsight\ntask: demo\n" + nothing)
        assert warm("warm_start=hindsight").distil == DistilConfig()
    assert warm("warm_start=hindsight", "distil.n=5").distil == DistilConfig(n=5)


def test_what_is_wrong_in_the_section_is_still_told(recipes: Path) -> None:
    (recipes / "demo" / "hindsight.yaml").write_text(LENDER)
    for given, text in (("distil.m=5", r"distil\.m: unknown key; allowed: steps"), ("distil=[1]", "distil")):
        with pytest.raises(RequestError, match=text):
            warm("warm_start=hindsight", given)


@pytest.mark.parametrize("method", ["moc", "mo-odpo", "p-morl"])
def test_the_sandboxs_warm_starts_distil_as_its_hindsight_does(method: str) -> None:
    def resolved(name: str, *sets: str) -> Any:
        file = find.find_recipe_file("sandbox-cold", name)
        return load.load_recipe(file, name, "sandbox-cold", sets, registry.get(name).Config).config

    assert resolved(method, "warm_start=hindsight").distil == resolved("hindsight").distil
