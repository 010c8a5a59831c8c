"""``task.gold_objectives`` as typed: python scorers train (believed), rules judge (true), and both are shown."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

CARD = """\
name: own
kind: text
description: a test
model: {model}
objectives:
  - {{name: short, kind: python, function: "scorers.py:short"}}
  - {{name: vowels, kind: python, function: "scorers.py:long"}}
gold_objectives:
  - {{name: vowels, kind: rule, rule: regex-count, options: {{pattern: "[aeiou]"}}}}
data:
  prompts: {{path: prompts.jsonl}}
splits: {{train: 0.4, calibration: 0.3, eval: 0.3}}
pool: {{prompts: 6, per_prompt: 2, calibration_per_prompt: 4}}
grid: 2
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
generation: {{max_prompt_tokens: 60, max_new_tokens: 8}}
evaluation: {{prompts: 4, samples: 2, bootstrap: 100}}
suite: [prompting, best-of-n]
"""
SCORERS = """\
def short(prompts, responses):
    return [-float(len(text)) for text in responses]
def long(prompts, responses):
    return [float(len(text)) for text in responses]
def same(prompts, responses):
    return [1.0 for text in responses]
"""


@pytest.fixture
def card(moalign: Any, random_base: Path) -> Path:
    from moalign.tasks.sandbox import world

    folder = Path("own")
    folder.mkdir()
    (folder / "task.yaml").write_text(CARD.format(model=random_base))
    (folder / "scorers.py").write_text(SCORERS)
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in world.prompts()[:40])
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder / "task.yaml"


def test_what_judged_the_base_before_a_training_is_gone_when_it_begins(
    moalign: Any, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be as large as what trains."""
    from moalign.experiment import train as workflow
    from moalign.methods.prompting import Prompting

    made, alive, make = [], [], workflow.make_task

    def noted(*given: Any, **more: Any) -> Any:
        task = make(*given, **more)
        made.append(weakref.ref(task))
        return task

    monkeypatch.setattr(workflow, "make_task", noted)
    monkeypatch.setattr(
        Prompting, "train", lambda self, job: alive.extend(ref() is job.task for ref in made if ref() is not None)
    )
    assert moalign("train", "prompting", "--task", str(card)).code == 0
    assert len(made) >= 2, "the plan's own, and the one that judges before"
    assert alive == [True], "the plan's own alone"


def test_check_and_show_name_the_judges_own_scorers(moalign: Any, card: Path) -> None:
    ended = moalign("check", str(card))
    assert ended.code == 0
    assert "gold objective vowels  used by the judge only: rule, larger is better" in ended.out
    shown = [line for line in moalign("show", str(card)).out.splitlines() if line.startswith("gold_objectives ")]
    assert len(shown) == 1 and "{name: 'vowels'" in shown[0] and "rule: 'regex-count'" in shown[0]
    (line,) = [line for line in moalign("show", "stories").out.splitlines() if line.startswith("gold_objectives ")]
    assert line.split() == ["gold_objectives", "null"]


def test_eval_shows_believed_and_true_side_by_side(moalign: Any, card: Path) -> None:
    """Vowels are what the judge counts, length is what was trained on; brevity has one scorer for both."""
    run = Path(json.loads(moalign("train", "prompting", "--task", str(card), "--json").out)["run"])
    stored, table = json.loads((run / "eval.json").read_text()), pd.read_parquet(run / "responses.parquet")
    folder = next(Path("results/tasks").glob("own-*"))
    believed, truth = (json.loads((folder / f"{name}.json").read_text()) for name in ("normaliser", "truth"))
    assert believed["names"] == ["short", "vowels"] and truth["names"] == ["vowels"]
    texts = table["response"]
    assert table["vowels"].tolist() == [sum(text.count(vowel) for vowel in "aeiou") for text in texts]

    def unit(raw: Any, scale: Any, column: int) -> Any:
        means = np.array(raw, dtype=float).reshape(len(stored["points"]), -1).mean(axis=1)
        return (means - scale["lo"][column]) / (scale["hi"][column] - scale["lo"][column])

    short = unit(-texts.str.len(), believed, 0)
    true = np.stack([short, unit(table["vowels"], truth, 0)], axis=1)
    proxy = np.stack([short, unit(texts.str.len(), believed, 1)], axis=1)
    np.testing.assert_allclose([point["mean"] for point in stored["points"]], true)
    np.testing.assert_allclose([point["mean"] for point in stored["proxy_reward"]["points"]], proxy)
    # The grid is (0, 1) and (1, 0): vowels at the first, brevity at the second.
    inner = [float(table[0][1] + table[1][0]) / 2 for table in (proxy, true)]
    assert [stored[part]["inner_product"] for part in ("proxy_reward", "indicators")] == pytest.approx(inner)
    low, high = stored["proxy_reward"]["hypervolume_ci"]
    assert low <= stored["proxy_reward"]["hypervolume"] <= high
    assert stored["gap"] == pytest.approx(stored["proxy_reward"]["hypervolume"] - stored["hypervolume"])

    lines = moalign("eval", str(run)).out.splitlines()
    top = next(k for k, line in enumerate(lines) if line.startswith("preference") and "believed" in line)
    kl = f"{stored['points'][0]['kl']:.2f}"
    first = [short[0], short[0], proxy[0, 1], true[0, 1], proxy[0, 1], true[0, 1]]
    assert lines[top].split() == ["preference", "(nats)", *["believed", "true"] * 3]
    assert lines[top + 2].split() == ["0,1", kl, *(f"{value:z.3f}" for value in first)]
    (line,) = [line for line in lines if line.startswith("believed")]
    assert line.endswith(f"inner product {inner[0]:.3f}")
    # From another reference point, believed and true are both seen from there.
    there = json.loads(moalign("eval", str(run), "--ref=-1,-1", "--json").out)
    assert there["gap"] == pytest.approx(there["proxy_reward"]["hypervolume"] - there["hypervolume"])
    assert there["proxy_reward"]["hypervolume"] > stored["proxy_reward"]["hypervolume"]


def test_compare_shows_believed_beside_true(moalign: Any, card: Path) -> None:
    ended = moalign("compare", "--task", str(card))
    assert ended.code == 0 and "believed and true" in ended.out
    record = json.loads(next(Path("results/compare").glob("own-*/compare.json")).read_text())
    for row in record["rows"]:
        stored = json.loads((Path(row["runs"][0]["run"]) / "eval.json").read_text())
        assert row["believed"]["hypervolume"] == stored["proxy_reward"]["hypervolume"]
        assert row["believed"]["inner_product"] == stored["proxy_reward"]["inner_product"]
        assert f"{row['believed']['inner_product']:.3f}" in ended.out
    assert (Path(record["json"]).parent / "believed.png").is_file()


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ("[{name: vowels, kind: python, function: 'own/scorers.py:lang'}]", "gold_objectives: objective 'vowels': "),
        ("[{name: vowels, kind: hf-classifier, model: ./none}]", "gold_objectives"),
        ("[{name: bowels, kind: rule, rule: length}]", "did you mean 'vowels'?"),
    ],
)
def test_a_gold_scorer_that_is_wrong_is_refused_before_training(
    moalign: Any, card: Path, gold: str, message: str
) -> None:
    for verb in (("check", str(card)), ("train", "prompting", "--task", str(card))):
        ended = moalign(*verb, "--set", f"task.gold_objectives={gold}")
        assert ended.code == 2 and len(ended.errors) == 1 and message in ended.errors[0], ended.errors
    assert not Path("results/runs").exists()


def test_a_gold_scorer_that_says_nothing_is_seen_before_training(moalign: Any, card: Path) -> None:
    """Every calibration response scores the same: the run, which could not be judged, is not made."""
    gold = "[{name: vowels, kind: python, function: 'own/scorers.py:same'}]"
    ended = moalign("train", "prompting", "--task", str(card), "--set", f"task.gold_objectives={gold}")
    assert ended.code == 2 and not Path("results/runs").exists()
    assert "error: gold_objectives: objective 'vowels' is constant" in ended.err


def test_the_cards_own_numbers_are_those_of_the_methods_scorers(moalign: Any, card: Path) -> None:
    """The scale of a gold scorer is fitted all the same; an objective without one keeps the card's numbers."""
    from moalign.config.load import load_card
    from moalign.tasks.load import make_task

    numbers = "{short: {mean: -9, sd: 2, lo: -20, hi: 0}, vowels: {mean: 9, sd: 2, lo: 0, hi: 20}}"
    task = make_task(load_card(card, (f"task.normaliser={numbers}",)), Path("results"))
    scale = task.judge_normaliser
    assert scale.names == ("short", "vowels") and (scale.mean[0], scale.lo[0], scale.hi[0]) == (-9, -20, 0)
    assert scale.mean[1] == json.loads((task.folder / "truth.json").read_text())["mean"][0] != 9
    assert task.normaliser.mean == (-9, 9)
    assert task.judge_panel.objectives[0] is task.panel.objectives[0], "one scorer, loaded once"
    assert task.judge_panel.score(["p"], ["aeb"]).tolist() == [[-3, 2]]
    assert task.panel.score(["p"], ["aeb"]).tolist() == [[-3, 3]]
    assert make_task(load_card(card, ("task.gold_objectives=[]",)), Path("results")).hash != task.hash


def test_another_gold_file_makes_another_task(moalign: Any, card: Path) -> None:
    from moalign.config.load import load_card
    from moalign.tasks.load import make_task

    (card.parent / "gold.py").write_text(SCORERS)
    text = card.read_text().replace("kind: rule, rule: regex-count", 'kind: python, function: "gold.py:long"')
    card.write_text(text.replace(', options: {pattern: "[aeiou]"}', ""))

    def hashed() -> str:
        return make_task(load_card(card), Path("results")).hash

    before = hashed()
    assert f"'{(card.parent / 'gold.py').resolve()}:long'" in moalign("show", str(card)).out
    (card.parent / "gold.py").write_text(f"{SCORERS}# another\n")
    assert hashed() != before
