"""Every shipped recipe passes ``moalign check``: real tasks at the size of the papers and on small GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.config import find, load
from moalign.core.errors import RequestError
from moalign.methods import registry
from moalign.preflight import check, cost, inputs, memory
from moalign.preflight.report import Preflight
from moalign.training.settings import GroupsUsers

REAL = ("hh-rlhf", "hh-rlhf-2", "reddit-summary", "safe-rlhf", "helpsteer2")
SMALL = ("Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B")
METHODS = [name for name in registry.names() if not issubclass(registry.get(name).Config, GroupsUsers)]
"""All but those that group the users who label pairs: the data of none of these tasks says who that was."""
FIVE = ("moc", "mo-odpo", "ric", "modpo", "paretohqd")
"""The methods whose recipes have a quick budget beside the papers' own."""


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub models that are not here are looked for in the cache alone and noted, as on a machine that has a network."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method", "path"), find.list_recipes(), ids=lambda value: getattr(value, "stem", value)
)
def test_every_recipe_passes_the_preflight(task: str, method: str, path: Path, tmp_path: Path) -> None:
    told = [] if task != "stories" else ["task.model=Qwen/Qwen2.5-0.5B"]
    report = check.check(str(path), told, tmp_path)
    assert report.problems == []
    assert any(what == "cost" for what, _ in report.checked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", REAL)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe_for_every_real_task_that_fits_its_gpu(task: str, method: str) -> None:
    report = check.check(f"{task}/{method}")
    assert report.problems == []
    phases = report.memory["phases"]
    assert phases[0]["phase"] == "sampling the base"
    assert report.memory["total_gib"] == max(phase["total_gib"] for phase in phases)
    assert 12 < report.memory["total_gib"] <= report.memory["stated_gib"] == 80
    assert report.memory["unknown"] == []
    assert report.cost["gpu"] == "A100"


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("task", [task for task in REAL if task != "safe-rlhf"])
@pytest.mark.parametrize("method", METHODS)
def test_small_models_fit_a_small_gpu(task: str, method: str, model: str) -> None:
    """The small models that the cards name, on 24 GB."""
    told = [f"task.model={model}", "needs.gpu=RTX 4090", "needs.gpu_memory_gib=24"]
    report = check.check(f"{task}/{method}", told)
    assert report.problems == []


def test_safe_rlhf_needs_a_large_gpu_for_its_reward_models_alone() -> None:
    report = check.check("safe-rlhf/sft", ["task.model=Qwen/Qwen2.5-0.5B", "needs.gpu_memory_gib=24"])
    assert len(report.problems) == 1
    assert "most: reward models, 24.6" in report.problems[0] or "most: reward models, 25.1" in report.problems[0]
    assert "24 GiB are stated" in report.problems[0]


def test_a_phase_that_does_not_fit_names_what_to_make_smaller() -> None:
    report = check.check("hh-rlhf/mo-odpo", ["micro_batch=128"])
    (problem,) = report.problems
    assert "training: update take up to" in problem
    assert "most: activations" in problem
    assert "a smaller micro_batch" in problem


def test_borrowed_recipes_are_checked_on_the_task_that_asks() -> None:
    report = check.check("safe-rlhf/moc")
    assert report.recipe.parent.name == "hh-rlhf"
    card = dict(report.checked)["card"]
    assert "safe-rlhf" in card and "helpful, harmless" in card


def test_cost_counts_policies_and_experts() -> None:
    def told(task: str, method: str, *overrides: str) -> cost.CostBounds:
        path = find.find_recipe_file(task, method)
        found = registry.get(method)
        resolved = load.load_recipe(path, method, task, overrides, found.Config)
        return cost.estimate(resolved, found.capabilities, memory.sizes_of(str(resolved.card.model)))

    one = told("hh-rlhf-2", "mo-odpo")
    assert one.policies == 1
    assert one.tokens_generated == 1000 * 64 * 2 * 128
    assert one.reward_calls == 1000 * 64 * 2 * 2
    assert one.hours is not None and one.hours > 1
    grid = told("hh-rlhf-2", "modpo")
    assert grid.policies == 11
    assert grid.tokens_trained == 11 * 1000 * 96 * 2 * 512
    experts = told("hh-rlhf-2", "dpo-soups")
    assert experts.tokens_trained == 2 * 1000 * 96 * 2 * 512
    assert told("hh-rlhf-2", "morlhf").policies == 11
    assert told("hh-rlhf-2", "morlhf", "conditioned=true").policies == 1
    assert told("hh-rlhf-2", "best-of-n").policies == 0
    assert told("hh-rlhf-2", "mo-odpo", "needs.gpu=a toaster").hours is None


@pytest.mark.parametrize("task", [*REAL, "qwen-instruct"])
def test_the_quick_budget_of_five_methods_stays_within_eight_hours_of_an_a100(task: str) -> None:
    hours = {"full": 0.0, "quick": 0.0}
    for budget in hours:
        for method in FIVE:
            path, found = find.find_recipe_file(task, method), registry.get(method)
            sets = [f"budget={budget}", "needs.gpu=A100 80GB"]
            resolved = load.load_recipe(path, method, task, sets, found.Config)
            told = cost.estimate(resolved, found.capabilities, memory.sizes_of(str(resolved.card.model)))
            assert told.hours is not None
            hours[budget] += told.hours
    assert hours["quick"] <= 8 < hours["full"]


@pytest.mark.parametrize("method", [*FIVE, "sft", "prompting", "best-of-n"])
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_the_small_instruct_model_fits_a_card_of_24_gb(method: str, model: str) -> None:
    report = check.check(f"qwen-instruct/{method}", ["budget=quick", f"task.model={model}"])
    assert report.problems == []
    assert 0 < report.memory["total_gib"] <= report.memory["stated_gib"] == 24
    assert report.memory["unknown"] == []


def test_names_too_long_for_a_file_are_problems_of_the_request() -> None:
    long = "a" * 300
    with pytest.raises(RequestError, match=long):
        check.check(f"sandbox/{long}")
    problems = check.check("sandbox/sft", [f"task.model={long}"]).problems
    assert any("a hub id has the form owner/name" in text for text in problems)


def test_a_hub_model_is_looked_up_once(monkeypatch: pytest.MonkeyPatch, random_base: Path, tmp_path: Path) -> None:
    import huggingface_hub

    places: list[str] = []

    def download(place: str, **_: object) -> str:
        places.append(place)
        return str(random_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    card = load.load_card("sandbox", ["task.model=owner/name"])
    report = Preflight(tmp_path)
    assert inputs.check_inputs(report, card, tmp_path).model == random_base
    assert places == ["owner/name"]
    assert dict(report.checked)["model"] == "owner/name: hub id, revision not pinned, in the local cache"


def test_published_statistics_are_compared_once_a_normaliser_is_there(tmp_path: Path, random_base: Path) -> None:
    from moalign.tasks.load import make_task

    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "task.yaml").write_text(
        "name: demo\nkind: text\ndescription: x\n"
        f"model: {random_base}\n"
        "objectives:\n  - {name: long, kind: rule, rule: length}\n  - {name: short, kind: rule, rule: brevity}\n"
        "published: {long: {mean: 5, sd: 2}, short: {mean: -50, sd: 1}}\n"
        "reference_point: [0, 0]\nsensitivity_point: [0, 0]\n"
        "data: {prompt_grammar: {template: ['how {a} ?'], a: [" + ", ".join(f"w{i}" for i in range(60)) + "]}}\n"
    )
    (folder / "sft.yaml").write_text("method: sft\ntask: ./task.yaml\n")
    results = tmp_path / "results"
    report = check.check(str(folder / "sft.yaml"), (), results)
    assert "no normaliser has been fitted yet" in dict(report.checked)["published"]
    from moalign.rewards.normaliser import Normaliser

    place = make_task(load.load_card(folder / "task.yaml"), results).folder
    bounds = ((0.0, 9.0), (-9.0, 0.0))
    Normaliser(("long", "short"), (5.2, -5.2), (2.1, 2.1), (0.0, -9.0), (9.0, 0.0), bounds).to_json(
        place / "normaliser.json"
    )
    report = check.check(str(folder / "sft.yaml"), (), results)
    assert report.problems == []
    assert "long 5.200 (sd 2.100), published 5 (sd 2)" in dict(report.checked)["published"]
    far = [note for note in report.notes if note.startswith("published")]
    assert len(far) == 1 and "short" in far[0]


def test_the_methods_and_the_task_that_a_card_names_are_looked_up(tmp_path: Path) -> None:
    lines = (find.recipes_root() / "sandbox" / "task.yaml").read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("suite", "quick_suite"))]
    path, first = tmp_path / "task.yaml", len(lines) + 1
    wrong = "suite: [sft, rick, sft]\nquick_suite:\n  - moc\n  - mocc\nrecipes_from: sandbocks\n"
    path.write_text("\n".join([*lines, wrong]))
    problems = check.check(str(path)).problems
    assert [text.split("; ")[0] for text in problems] == [
        f"{path}:{first}: suite.1: unknown method 'rick'",
        f"{path}:{first}: suite.2: found 'sft' twice",
        f"{path}:{first + 3}: quick_suite.1: unknown method 'mocc'",
        f"{path}:{first + 4}: recipes_from: unknown task 'sandbocks'",
    ]
    assert problems[0].endswith("did you mean 'ric'?") and problems[3].endswith("did you mean 'sandbox'?")
    told = check.check(str(path), ["task.suite=[stf]", "task.quick_suite=[]"]).problems
    assert len(told) == 2 and told[0].startswith("--set task.suite: suite.0: unknown method 'stf'; ")
    path.write_text("\n".join([*lines, "suite: [sft, ric]\nquick_suite: [sft]\nrecipes_from: sandbox\n"]))
    assert check.check(str(path)).problems == []


@pytest.mark.parametrize("task", find.list_tasks())
def test_every_card_names_methods_and_a_task_that_there_are(task: str) -> None:
    card = load.load_card(task)
    for suite in (card.suite, card.quick_suite):
        assert set(suite) <= set(registry.names()) and len(suite) == len(set(suite))
    assert card.recipes_from is None or card.recipes_from in find.list_tasks()
