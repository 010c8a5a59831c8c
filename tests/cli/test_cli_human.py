"""The task ``assistant-human``: its pairs, its card, and that methods and the judge see different reward models.

Tiny models with random weights stand in for SmolLM2 and for the reward models that ``make llm-human`` trains on it.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moalign.config.load import load_card
from moalign.config.objectives import ClassifierObjective
from moalign.data.splits import normalised

FILES = ("questions", "harmless-a", "harmless-b")
DIALOGUE = "\n\nHuman: {prompt}\n\nAssistant: {response}"


@pytest.fixture(scope="module")
def folder(checkout: Path) -> Path:
    return checkout / "recipes" / "assistant-human"


def pairs(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def of_person(row: dict[str, str]) -> tuple[str, str]:
    return row["chosen"], row["rejected"]


# -- the pairs -----------------------------------------------------------------------------------------------------


def test_no_dialogue_begins_alike_in_two_files(folder: Path) -> None:
    openings = {}
    for name in FILES:
        rows = pairs(folder / f"{name}.jsonl.gz")
        openings[name] = {normalised(row["chosen"].split("\n\nAssistant:")[0]) for row in rows}
        assert f"| `{name}.jsonl.gz` | {len(rows)} |" in (folder / "README.md").read_text()
    assert sum(map(len, openings.values())) == len(set.union(*openings.values()))
    for row in pairs(folder / "questions.jsonl.gz"):
        assert row["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip() == row["question"]


def test_the_script_of_the_page_makes_the_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From all their pairs in one file, whatever its order, as from the original."""
    given = {name: pairs(folder / f"{name}.jsonl.gz") for name in FILES}
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for name in FILES for row in given[name]]
    assert len(rows) == 2312
    with gzip.open(tmp_path / "all.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in reversed(rows))
    (script,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["split.py", str(tmp_path / "all.jsonl.gz"), str(tmp_path)])
    exec(compile(script, "split.py", "exec"), {})
    for name in FILES:
        assert sorted(pairs(tmp_path / f"{name}.jsonl.gz"), key=of_person) == sorted(given[name], key=of_person)


def test_the_pairs_are_those_that_people_gave(folder: Path, shared: Path) -> None:
    original = shared / "data" / "hh-harmless-base-test.jsonl.gz"
    if not original.is_file():
        pytest.skip(f"the original pairs are not there: {original}")
    shipped = [row for name in FILES for row in pairs(folder / f"{name}.jsonl.gz")]
    assert sorted(map(of_person, shipped)) == sorted(map(of_person, pairs(original)))


# -- the card ------------------------------------------------------------------------------------------------------


def reward_models() -> list[ClassifierObjective]:
    """What methods see and what the judge sees."""
    card = load_card("assistant-human")
    specs = [card.objectives[0], (card.gold_objectives or [])[0]]
    return [spec for spec in specs if isinstance(spec, ClassifierObjective)]


def small(base: Path) -> list[str]:
    """Options that put the tiny model in SmolLM2's place."""
    settings = (
        f"model={base}", "template.chat=false", "template.system=null", "grid=2", "generation.max_new_tokens=12",
        "objectives.1.options={}",  # it ends no sentence
        "pool={prompts: 6, per_prompt: 2, calibration_per_prompt: 2}", "evaluation.prompts=4", "evaluation.samples=1",
        "evaluation.bootstrap=100",
    )  # fmt: skip
    return [part for text in settings for part in ("--set", f"task.{text}")]


@pytest.fixture
def stand_ins(moalign: Any, random_base: Path) -> list[Any]:
    """Two reward models with random weights, in the places that the card names; returns them, loaded."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    made = []
    for seed, spec in enumerate(reward_models()):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(AutoConfig.from_pretrained(random_base, num_labels=1))
        model.save_pretrained(spec.model)
        AutoTokenizer.from_pretrained(random_base).save_pretrained(spec.model)
        made.append(model.eval())
    return made


def test_a_reward_model_reads_a_dialogue_as_it_was_trained_to(folder: Path) -> None:
    """A question and its answer in the card's template are the dialogue of a pair, to the letter."""
    believed, true = reward_models()
    assert believed.template == true.template == DIALOGUE
    row = next(row for row in pairs(folder / "questions.jsonl.gz") if row["chosen"].count("\n\nHuman:") == 1)
    answer = row["chosen"].partition("\n\nAssistant: ")[2]
    text = believed.template.replace("{prompt}", row["question"]).replace("{response}", answer)
    assert text == row["chosen"]


def test_without_the_reward_models_it_says_what_makes_them(moalign: Any, random_base: Path) -> None:
    ended = moalign("check", "assistant-human", *small(random_base))
    assert ended.code == 2 and len(ended.errors) == 2, ended.errors
    for spec, message in zip(reward_models(), ended.errors, strict=True):
        assert f"objective harmless: model {spec.model!r}: there is no such folder" in message
        assert message.endswith("moalign reward train makes it: the card says of what")
    assert ended.errors[1].startswith("gold_objectives: ") and "no revision is pinned" not in ended.err + ended.out
    ended = moalign("train", "prompting", "--task", "assistant-human", *small(random_base))
    assert ended.code == 2 and ended.errors[0].endswith("moalign reward train makes it: the card says of what")


def test_check_and_show_name_both_reward_models(moalign: Any, random_base: Path, stand_ins: list[Any]) -> None:
    ended = moalign("check", "assistant-human", *small(random_base))
    assert ended.code == 0, ended.errors
    assert "gold objective harmless  used by the judge only: hf-classifier, larger is better" in ended.out
    shown = moalign("show", "assistant-human").out
    believed, true = reward_models()
    assert believed.model != true.model
    assert believed.model in shown.partition("\ngold_objectives ")[0]
    assert true.model in shown.partition("\ngold_objectives ")[2]


def test_it_is_trained_on_the_first_reward_model_and_judged_by_the_second(
    moalign: Any, random_base: Path, stand_ins: list[Any]
) -> None:
    import torch
    from transformers import AutoTokenizer

    ended = moalign("train", "best-of-n", "--task", "assistant-human", *small(random_base), "--json")
    assert ended.code == 0, ended.err
    run = Path(json.loads(ended.out)["run"])
    table, stored = pd.read_parquet(run / "responses.parquet"), json.loads((run / "eval.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    texts = [
        DIALOGUE.replace("{prompt}", prompt).replace("{response}", response)
        for prompt, response in zip(table["prompt"], table["response"], strict=True)
    ]
    with torch.inference_mode():
        believed, true = (
            np.array([float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts])
            for model in stand_ins
        )
    np.testing.assert_allclose(table["harmless"], true, atol=1e-5)
    assert np.abs(believed - true).max() > 0.01
    scale = json.loads(next(Path("results/tasks").glob("assistant-human-*/normaliser.json")).read_text())
    unit = (believed - scale["lo"][0]) / (scale["hi"][0] - scale["lo"][0])
    means = [point["mean"][0] for point in stored["proxy_reward"]["points"]]
    np.testing.assert_allclose(means, unit.reshape(len(means), -1).mean(axis=1), atol=1e-5)
    assert moalign("eval", str(run)).out.count("believed") >= 2


@pytest.mark.slow
def test_the_card_names_the_reward_models_that_make_llm_human_trains(checkout: Path, smollm2: Path) -> None:
    """Whoever changes the pairs or the Makefile's settings has to write other folders into the card."""
    from moalign.experiment import reward
    from moalign.reward_models.runs import MODEL, RewardStore

    text = (checkout / "Makefile").read_text().replace("\\\n", "")
    (settings,) = re.findall(r"^HUMAN_SETTINGS := (.*)$", text, re.MULTILINE)
    for half, spec in zip("ab", reward_models(), strict=True):
        file = f"{checkout}/recipes/assistant-human/harmless-{half}.jsonl.gz"
        request = reward.RewardTrainRequest(
            (file,), overrides=shlex.split(settings)[1::2], model="smollm2-135m-instruct"
        )
        plan = reward.plan(request)
        made = RewardStore("results").folder("bt", plan.name, plan.identity()) / MODEL
        assert Path(spec.model) == made
        assert plan.settings.max_tokens <= spec.max_length and plan.settings.template == "{prompt}{response}"
