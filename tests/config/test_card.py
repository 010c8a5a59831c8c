"""The task card: its own checks and its hash."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from moalign.config import validate
from moalign.config.card import DEFAULTS_VERSION, TaskCard, TemplateSpec
from moalign.config.describe import yaml_form
from moalign.config.load import load_card


def card(**changes: Any) -> dict[str, Any]:
    objectives = [{"name": name, "kind": "rule", "rule": "length"} for name in ("a", "b")]
    plain = {"name": "demo", "kind": "text", "description": "x", "objectives": objectives}
    points = {"reference_point": [0, 0], "sensitivity_point": [0, 0], "data": {"prompts": ["hi"]}}
    return {**plain, **points, **changes}


def made(**changes: Any) -> TaskCard:
    value, problems = validate.check(TaskCard, card(**changes))
    assert value is not None, problems
    return value


NUMBERS = {"mean": 0, "sd": 1, "lo": -1, "hi": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"objectives": card()["objectives"][:1]},
            "objectives: found [{name: 'a', kind: 'rule', rule: 'length'}]; allowed:",
        ),
        ({"objectives": [card()["objectives"][0]] * 2}, "objective names must differ; found twice: a"),
        ({"reference_point": [0]}, "reference_point needs one number per objective (2); found 1"),
        ({"sensitivity_point": [0, 0, 0]}, "sensitivity_point needs one number per objective (2); found 3"),
        ({"normaliser": {"a": NUMBERS}}, "normaliser must name every objective (a, b); found a"),
        ({"kind": "sandbox"}, "kind: sandbox needs a section sandbox"),
        (
            {"kind": "sandbox", "model": None, "sandbox": {"base": "warm"}, "data": None},
            "kind: sandbox without a model of its own: unknown objective 'a'; allowed: brevity, harmlessness,",
        ),
        ({"data": None}, "kind: text needs data.prompts or data.prompt_grammar"),
        (
            {"kind": "sandbox", "model": "m", "sandbox": {"base": "warm"}},
            "data is for kind: text; the sandbox's prompts, responses and pairs are its own",
        ),
        ({"sandbox": {"base": "warm"}}, "sandbox is for kind: sandbox"),
        (
            {"kind": "sandbox", "model": "m", "sandbox": {"base": "warm"}, "data": None, "rewards": "learned"},
            "rewards: learned needs objectives of kind sandbox; found a of kind rule",
        ),
        (
            {
                "kind": "sandbox",
                "sandbox": {"base": "warm"},
                "model": None,
                "data": None,
                "rewards": "learned",
                "objectives": [{"name": "humor", "kind": "sandbox"}, {"name": "warmth", "kind": "sandbox"}],
            },
            "rewards: learned needs objectives that the annotators look at; found 'warmth'; allowed: helpfulness,",
        ),
        (
            {
                "objectives": [*card()["objectives"], {"name": "c", "kind": "rule", "rule": "length"}],
                "reference_point": [0] * 3,
                "sensitivity_point": [0] * 3,
            },
            "grid 11: no even grid over 3 objectives has 11 points; nearest: 10 or 15",
        ),
        (
            {"objectives": [card()["objectives"][0], {"name": "humor", "kind": "sandbox", "maximise": False}]},
            "objectives.1.maximise: found false; allowed: true, since the sandbox's optimum is the most of each",
        ),
        ({"splits": {"train": 0.9}}, "splits: train + calibration + eval must be 1; found 1.1"),
        ({"name": "Demo Task"}, "name: found 'Demo Task'; allowed: text that matches"),
    ],
)
def test_what_a_card_refuses(changes: dict[str, Any], expected: str) -> None:
    (problem,) = validate.check(TaskCard, card(**changes))[1]
    assert problem.startswith(expected)


@pytest.mark.parametrize("word", ["", "  ", "!?", "--"])
def test_a_word_that_names_an_objective_has_a_letter_or_a_digit(word: str) -> None:
    first, second = card()["objectives"]
    (problem,) = validate.check(TaskCard, card(objectives=[first, {**second, "called": ["good", word]}]))[1]
    assert problem == f"objectives.1.called: found {word!r}; allowed: words with a letter or a digit"


def test_names_keep_the_tasks_order() -> None:
    assert made().objective_names == ["a", "b"]
    assert made(objectives=card()["objectives"][::-1]).objective_names == ["b", "a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_point": [0, -0.1]},
        {"objectives": card()["objectives"][::-1]},
        {"generation": {"temperature": 0.7}},
        {"data": {"prompts": ["ho"]}},
        {"evaluation": {"seed": 1}},
        {"splits": {"salt": "other"}},
        {"model": "owner/name"},
        {"normaliser": {"a": NUMBERS, "b": NUMBERS}},
    ],
)
def test_the_hash_changes_with_all_that_changes_a_score(changes: dict[str, Any]) -> None:
    assert made(**changes).hash() != made().hash()


def test_the_hash_keeps_when_no_score_changes() -> None:
    first = made().hash()
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert made(description="other", suite=["ric"]).hash() == first
    assert made(model="/one/base").hash(model="f00") == made(model="/two/other").hash(model="f00")
    assert made(model="/one/base").hash(model="f00") != made(model="/one/base").hash(model="f01")


def test_moving_a_folder_keeps_the_hash_and_another_file_or_hub_id_changes_it() -> None:
    def hashed(path: str, judge: str) -> str:
        polite = {"name": "b", "kind": "hf-classifier", "model": judge}
        return made(objectives=[card()["objectives"][0], polite], data={"prompts": {"path": path}}).hash(model="f00")

    first = hashed("/one/prompts.jsonl", "/one/judge")
    assert hashed("/two/prompts.jsonl", "/three/judge") == first
    assert hashed("/one/other.jsonl", "/one/judge") != first
    assert hashed("owner/prompts", "/one/judge") != hashed("other/prompts", "/one/judge")


def test_the_order_of_the_phrases_changes_the_hash_since_it_changes_the_prompts() -> None:
    words = {name: [{"up_to": 1, "text": f"be {name}"}] for name in ("a", "b")}
    turned = dict(reversed(words.items()))
    assert made(template={"words": words}).hash() != made(template={"words": turned}).hash()


def test_what_a_scorer_or_a_chat_template_is_given_is_no_folder_of_the_card() -> None:
    def hashed(place: str, **template: Any) -> str:
        options = {"path": place, "more": {"model": place}}
        python = {"name": "b", "kind": "python", "function": "m:f", "options": options}
        return made(objectives=[card()["objectives"][0], python], template=template).hash()

    assert hashed("/one/list.txt") != hashed("/two/list.txt")
    given = [hashed("x", chat_kwargs={"tools": [{"path": f"/{place}/bin"}]}) for place in ("one", "two")]
    assert given[0] != given[1]


def test_the_data_of_an_objective_called_options_may_be_moved() -> None:
    def hashed(place: str) -> str:
        objectives = [{**card()["objectives"][0], "name": name} for name in ("options", "chat_kwargs")]
        pairs = {name: {"path": f"/{place}/pairs.jsonl"} for name in ("options", "chat_kwargs")}
        return made(objectives=objectives, data={"prompts": ["hi"], "pairs": pairs}).hash()

    assert hashed("one") == hashed("two")


# Hashes of these cards without their identity: runs stay comparable when settings are added.
EARLIER = {
    "sandbox": "ca1267e9df4ceef4",
    "sandbox-3": "60d67eec03224d42",
    "sandbox-cold": "22d784fa7134f7d1",
    "stories": "965d372ab4b7e3ea",
}


@pytest.mark.parametrize("name", EARLIER)
def test_settings_at_their_default_leave_the_hash(name: str) -> None:
    plain = load_card(name)
    assert plain.hash() == EARLIER[name]
    whole = plain.model_dump(mode="json")
    assert TaskCard.model_validate({**whole, "quality": {}, "overlong": "cut"}).hash() == EARLIER[name]
    sparse = plain.model_dump(mode="json", exclude_defaults=True)
    assert len(sparse) < len(whole)
    assert TaskCard.model_validate(sparse).hash() == EARLIER[name]


def test_a_setting_that_a_later_version_adds_keeps_the_hash() -> None:
    class Later(TaskCard):
        more: int = 3
        table: dict[str, int] = Field(default_factory=dict)
        section: TemplateSpec = TemplateSpec(marker="x")

    plain = card(template={"marker": "y"})
    assert Later.model_validate(plain).hash() == made(template={"marker": "y"}).hash()
    for given in ({"more": 4}, {"table": {"a": 1}}, {"section": {"marker": ""}}):
        assert Later.model_validate({**plain, **given}).hash() != made(template={"marker": "y"}).hash()


# What a card's sections mean where they are silent, at version 1 of the defaults.
SILENT = """\
AnnotatorSpec {groups: 'specialists', pairs: 3000, users: null, sharpness: 1.0, seed: 0, flipped: 0.0}
ClassifierObjective {maximise: true, called: [], store: null, pessimism: 0.0, aggregate: 'mean', load_in_4bit: false,
    load_in_8bit: false, revision: null, label: null, members: null, output: 'logit', template: '{prompt}{response}',
    pair_template: null, max_length: 512,
    batch_tokens: 16384, dtype: 'float32'}
DataSpec {prompts: null, prompt_grammar: null, responses: null, pairs: null}
EvaluationSpec {prompts: 128, samples: 1, seed: 1234, bootstrap: 1000}
GenerationSpec {max_prompt_tokens: 512, max_new_tokens: 128, temperature: 1.0, top_p: 1.0, batch_size: 256}
JudgeObjective {maximise: true, called: [], store: null, api_key_env: null, field: null, pattern: null, unreadable:
    'raise', temperature: 0.0, max_tokens: 256, seed: 0, timeout: 60.0, max_retries: 5, concurrency: 8}
LmObjective {maximise: true, called: [], store: null, load_in_4bit: false, load_in_8bit: false, revision: null,
    template: null, max_length: 512, batch_tokens: 4096, dtype: 'float32'}
PoolSpec {prompts: 256, per_prompt: 8, calibration_per_prompt: 4, temperature: null, seed: 0}
PythonObjective {maximise: true, called: [], store: null, revision: '1'}
QualitySpec {short: null}
RewardModelSpec {pessimism: 0.0, aggregate: 'mean', members: 1, seed: null, steps: null}
RuleObjective {maximise: true, called: [], store: null}
SandboxObjective {maximise: true, called: [], store: null}
SandboxSpec {base: 'warm', seed: 0, annotators: null, reward_model: {pessimism: 0.0, aggregate: 'mean', members: 1,
    seed: null, steps: null}}
SourceSpec {split: 'train', revision: null, limit: null}
SplitSpec {train: 0.8, calibration: 0.1, eval: 0.1, salt: 'moalign'}
TaskCard {gold_objectives: null, model: null, model_revision: null, dtype: 'float32', load_in_4bit: false,
    sandbox: null, rewards: null, data: null, normaliser: null, grid: 11, overlong: null, quality: null,
    recipes_from: null}
TemplateSpec {preference: '[{preference}] {prompt}', words: null, plain: '{prompt}', scores: '{prompt} {scores}',
    marker: '', end: null, system: null, chat: false, chat_kwargs: null, date: null}
"""


def test_whoever_changes_a_default_raises_the_version_that_is_part_of_every_hash() -> None:
    """A new setting is added to the table. A changed default goes with a higher DEFAULTS_VERSION."""
    schema = TaskCard.model_json_schema()
    sections = {name: part["properties"] for name, part in schema["$defs"].items()}
    sections["TaskCard"] = {name: place for name, place in schema["properties"].items() if "$ref" not in place}
    silent = {
        name: {key: place["default"] for key, place in places.items() if "default" in place}
        for name, places in sorted(sections.items())
    }
    lines = [f"{name} {yaml_form(defaults)}" for name, defaults in silent.items() if defaults]
    assert (DEFAULTS_VERSION, " ".join(lines)) == (1, " ".join(SILENT.split()))


@pytest.mark.parametrize(
    "changes",
    [
        {"overlong": "drop"},
        {"quality": {"short": 3}},
        {"template": {"words": {"a": [{"up_to": 1, "text": "be a"}]}}},
        {"template": {"date": "2025-01-01"}},
        {"gold_objectives": [{"name": "a", "kind": "rule", "rule": "brevity"}]},
        {"template": {"chat_kwargs": {"enable_thinking": False}}},
    ],
)
def test_and_change_it_where_they_are_given(changes: dict[str, Any]) -> None:
    assert made(**changes).hash() != made().hash()


def test_gold_objectives_are_hashed_as_objectives_are() -> None:
    """Not by their words, nor by where their files lie; none is what a card without the key has."""

    def hashed(**more: Any) -> str:
        return made(gold_objectives=[{"name": "b", "kind": "python", "function": "/one/s.py:f", **more}]).hash()

    assert made(gold_objectives=[]).hash() == made(gold_objectives=None).hash() == made().hash()
    assert hashed() == hashed(called=["bee"]) == hashed(function="/two/s.py:f")
    assert len({made().hash(), hashed(), hashed(maximise=False), hashed(options={"path": "/x"})}) == 4
    assert hashed(options={"path": "/x/y"}) != hashed(options={"path": "/z/y"})


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a", "bb"], "gold_objectives.1.name: 'bb' is no objective; allowed: a, b; did you mean 'b'?"),
        (["a", "a"], "gold_objectives.1.name: found 'a' twice; allowed: each objective once"),
    ],
)
def test_a_gold_objective_is_of_one_objective(names: list[str], problem: str) -> None:
    gold = [{"name": name, "kind": "rule", "rule": "length"} for name in names]
    (found,) = validate.check(TaskCard, card(gold_objectives=gold))[1]
    assert found == problem


def test_cutting_prompts_that_are_too_long_is_the_default() -> None:
    assert made(overlong="cut").hash() == made().hash()
    assert made(overlong="cut").hash(model="x") == made().hash(model="x")
    (problem,) = validate.check(TaskCard, card(overlong="crop"))[1]
    assert problem.startswith("overlong: found 'crop'; allowed: ")


def test_the_record_of_an_older_run_may_hold_what_had_no_effect() -> None:
    """A card that a new run is refused; whatever else is wrong stays wrong."""
    from pydantic import ValidationError

    from moalign.config.strict import RECORDED

    three = [*card()["objectives"], {"name": "humor", "kind": "sandbox", "maximise": False}]
    older = card(objectives=three, reference_point=[0] * 3, sensitivity_point=[0] * 3, sandbox={"base": "warm"})
    assert TaskCard.model_validate(older, context=RECORDED).objective_names == ["a", "b", "humor"]
    with pytest.raises(ValidationError):
        TaskCard.model_validate(older)
    with pytest.raises(ValidationError, match="reference_point needs one number per objective"):
        TaskCard.model_validate({**older, "reference_point": [0]}, context=RECORDED)
