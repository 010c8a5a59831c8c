"""The pages in results/ that scripts beside them write: they say what their records say, and their lists can be run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

import moalign
from moalign.config import yaml_lines
from moalign.report.units import count

RESULTS = Path(__file__).resolve().parents[1] / "results"
ABLATIONS = sorted((RESULTS / "ablations").glob("*.yaml"))


def script(name: str) -> ModuleType:
    path = RESULTS / name
    spec = importlib.util.spec_from_file_location(f"result_script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def record(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_there_are_lists() -> None:
    assert {path.stem for path in ABLATIONS} >= {"moc", "hindsight"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablations_page_is_made_of_its_record(path: Path) -> None:
    ablate = script("ablations/ablate.py")
    told = record(path)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == ablate.markdown(told)
    assert ablate.draw(told).startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablations_rows_are_those_of_its_list_and_can_be_asked_for(
    path: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every row resolves to a checked run; the record has the list's labels and as many runs as it says."""
    from moalign.experiment.train import TrainRequest, plan

    ablate = script("ablations/ablate.py")
    spec, told = yaml_lines.load(path).data, record(path)
    wanted = [(group["title"], row["label"]) for group in spec["groups"] for row in group["rows"]]
    assert wanted == [(group["title"], row["label"]) for group in told["groups"] for row in group["rows"]]
    for group, recorded in zip(spec["groups"], told["groups"], strict=True):
        for row, one in zip(group["rows"], recorded["rows"], strict=True):
            assert len(one["runs"]) == min(told["seeds"], row.get("seeds", spec["seeds"]))
            arguments = ablate.arguments(spec, row, 0, tmp_path)
            settings = [text for before, text in itertools.pairwise(arguments) if before == "--set"]
            if any(text.startswith("task.model=") for text in settings):
                model = request.getfixturevalue("stories")  # skips where the model is not there
                settings = [f"task.model={model}" if text.startswith("task.model=") else text for text in settings]
            asked = TrainRequest(arguments[1], task=arguments[3], overrides=settings, results=tmp_path)
            assert plan(asked).method.name == row.get("method", spec["method"])


def test_a_rows_summary_is_that_of_its_seeds() -> None:
    """Median, worst and best of the shares, and means of the costs, by hand."""
    import numpy as np

    ablate = script("ablations/ablate.py")
    rng = np.random.default_rng(0)
    scores = [0.5 + 0.01 * rng.standard_normal((40, 3, 2)) for _ in range(3)]
    runs = [
        {
            "ref": [0.0, 0.0],
            "optimum": 0.5,
            "hypervolume": value,
            "tau": value,
            "generalisation": None,
            "tokens_generated": 10 * k,
            "tokens_trained": k,
            "reward_calls": 1,
            "seconds": 2.0,
        }
        for k, value in enumerate((0.2, 0.4, 0.25))
    ]
    one = ablate.summary(runs, scores)
    assert (one["median"], one["worst"], one["best"], one["tau"], one["tau_worst"]) == (0.5, 0.4, 0.8, 0.25, 0.2)
    assert (one["tokens_generated"], one["tokens_trained"], one["reward_calls"]) == (10, 1, 1)
    assert one["ci"][0] < 0.5 < one["ci"][1]  # scores near (.5, .5) everywhere: .25 of .5


def test_the_calibration_page_is_made_of_its_record() -> None:
    calibration = script("calibration/calibration.py")
    path = RESULTS / "calibration" / "more.md"
    told = record(path)
    assert told["summary"] == {kind: calibration.summary(told["rows"], kind) for kind in told["summary"]}
    assert told["verdict"] == calibration.verdict(told["summary"])
    assert path.read_text(encoding="utf-8") == calibration.markdown(told)


def test_the_page_of_times_is_made_of_its_record_and_promises_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS / "bench"))
    told = record(RESULTS / "bench/cpu.json")
    assert (RESULTS / "bench/cpu.md").read_text(encoding="utf-8") == script("bench/bench.py").table(told)
    promised = [row for row in told["rows"] if row["limit_seconds"] is not None]
    assert len(promised) >= 9
    assert [row["name"] for row in promised if row["seconds"] > row["limit_seconds"]] == []


@pytest.mark.skipif(not (RESULTS / "bench/mixture.json").is_file(), reason="mixtures have not been measured yet")
def test_the_page_of_mixtures_is_made_of_its_record_and_promises_are_kept() -> None:
    mixture, measured = script("bench/mixture.py"), record(RESULTS / "bench/mixture.json")
    assert (RESULTS / "bench/mixture.md").read_text(encoding="utf-8") == mixture.page(measured)
    for numbers in measured["tasks"].values():
        assert max(numbers["ratio"][kind] for kind in ("probability", "logit")) <= mixture.GOALS["mixture"]
    # In CPU time: with a few rounds of 20 seconds the clock says more about the machine's other work.
    assert measured["tasks"]["assistant-3"]["control_share_of_cpu"]["small"] <= mixture.GOALS["control"]


@pytest.mark.parametrize(
    ("heading", "task"),
    [
        ("## Sandbox\n", "sandbox"),
        ("## Sandbox, cold base\n", "sandbox-cold"),
        ("## Sandbox, three objectives\n", "sandbox-3"),
        ("## Sandbox, five objectives\n", "sandbox-5"),
    ],
)
def test_the_tables_of_results_say_what_the_records_say(heading: str, task: str, checkout: Path) -> None:
    told = record(RESULTS / "published" / task / "compare.json")
    text = (checkout / "results/README.md").read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
    table = text[text.index("| method |") :].partition("\n\n")[0].splitlines()
    heads = [cell.strip() for cell in table[0].strip("|").split("|")]
    rows = [dict(zip(heads, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in table[2:]]
    assert [row["method"].strip("`") for row in rows] == [row["label"] for row in told["rows"]]
    most = told["optimum"]["hypervolume"]
    for row, one in zip(rows, told["rows"], strict=True):
        assert row["hypervolume"] == f"{one['hypervolume']:.3f}"
        assert row["95 % interval"] == f"[{one['ci'][0]:.3f}, {one['ci'][1]:.3f}]"
        shares = [f"{100 * value / most:.0f}" for value in one["hypervolume_by_seed"]]
        seeds = f" ({', '.join(shares)})" if len(shares) > 1 else ""
        assert row["% of optimum (each seed)"] == f"{100 * one['optimal_share']:.0f} %{seeds}"
        assert row["inner product"] == f"{one['indicators']['inner_product']:.3f}"
        assert row["tau"] == f"{one['indicators']['tau']:.2f}"
        units = {"tokens generated": "tokens_generated", "trained on": "tokens_trained", "reward calls": "reward_calls"}
        spent = {head: count(one["cost"][unit]) for head, unit in units.items() if head in row}
        assert {head: row[head] for head in spent} == spent, one["label"]
        bound = "≤ " if one["quality"]["kl_bound"] else ""
        nats = f"{one['quality']['kl']:.1f}".replace("-0.0", "0.0")
        assert row.get("KL") in (None, f"{bound}{nats}"), one["label"]


DIFFERENCES = {
    "sandbox-3": [
        ("moc", "hindsight", "hypervolume", "{}"),
        ("moc", "paretohqd", "hypervolume", "`paretohqd` ({} and"),
        ("hindsight", "paretohqd", "hypervolume", "and {})"),
        ("mo-odpo", "moc", "inner product", "`mo-odpo` is ahead of `moc` ({})"),
        ("mo-odpo", "hindsight", "inner product", "level with `hindsight` ({})"),
        ("hindsight", "mo-odpo", "hypervolume", "by {} in hypervolume"),
        ("evo-soups", "rewarded-soups", "hypervolume", "than `rewarded-soups` ({})"),
        ("bone-soups", "rewarded-soups", "hypervolume", "`bone-soups` less ({})"),
        ("pcm", "mod", "hypervolume", "ahead of `mod` by {}"),
    ],
    "sandbox-5": [
        ("hindsight", "mo-odpo", "hypervolume", "all but `mo-odpo` ({})"),
        ("grpo", "mo-odpo", "inner product", "`grpo` over `mo-odpo` by {}, open"),
        ("mo-odpo", "moc", "inner product", "(`mo-odpo` by {})"),
    ],
}
"""First and second method, what they differ in, and how the section of the task says by how much."""


@pytest.mark.parametrize("task", DIFFERENCES)
def test_sections_of_results_say_how_methods_differ(task: str, checkout: Path) -> None:
    pairs = {(pair["a"], pair["b"]): pair for pair in record(RESULTS / "published" / task / "compare.json")["pairs"]}
    page = " ".join((checkout / "results/README.md").read_text(encoding="utf-8").split())
    for first, second, what, sentence in DIFFERENCES[task]:
        sign, pair = (1, pairs[first, second]) if (first, second) in pairs else (-1, pairs[second, first])
        told = pair if what == "hypervolume" else pair["inner_product"]
        ends = sorted(sign * end for end in told["ci"])
        middle, low, high = (f"{value:+.3f}" for value in (sign * told["difference"], *ends))
        plain = [number.replace("+0.", ".").replace("-0.", "-.") for number in (low, high)]
        number = f"{middle.replace('0.', '.', 1)} [{plain[0]}, {plain[1]}]".replace("[-.000", "[.000")
        assert sentence.format(number) in page, sentence.format(number)


def test_results_say_how_long_the_suite_takes(checkout: Path) -> None:
    page = " ".join((checkout / "results/README.md").read_text(encoding="utf-8").split())
    told = record(RESULTS / "bench/suite.json")
    took, suite = told["training_seconds"], yaml_lines.load(checkout / "recipes/sandbox/task.yaml").data["suite"]
    assert set(took) == set(suite) and len(took) == 22
    minutes, seconds = divmod(told["seconds"], 60)
    assert f"takes {minutes} min {seconds} s on two quiet cores" in page and told["seconds"] <= 12 * 60
    before = sum(time for method, time in took.items() if method not in told["since_16_methods"])
    assert f"{sum(took.values()) / before:.1f} times as long as the 16 methods" in page


def test_results_say_what_the_worst_off_group_gets(checkout: Path) -> None:
    page = " ".join((checkout / "results/README.md").read_text(encoding="utf-8").split())
    rows = {row["label"]: row for row in record(RESULTS / "published/sandbox-groups/compare.json")["rows"]}
    worst = {name: f"{row['worst_group']:.2f}".replace("0.", ".", 1) for name, row in rows.items()}
    assert f"`maxmin-rlhf` {worst['maxmin-rlhf']} (by seed" in page
    assert f"`prompting` {worst['prompting']}, `sft` {worst['sft']} (one seed each)" in page
    assert f"`moc` {worst['moc']}, `mo-odpo` {worst['mo-odpo']}." in page
    shares = {name: f"{100 * row['optimal_share']:.0f}" for name, row in rows.items()}
    assert f"of the hypervolume it has {shares['maxmin-rlhf']} %, `moc` {shares['moc']}." in page


def test_the_table_of_the_real_llm_says_what_the_record_says(checkout: Path) -> None:
    told = record(RESULTS / "published" / "assistant" / "compare.json")
    text = (checkout / "results/README.md").read_text(encoding="utf-8").partition("## A real LLM: assistant\n")[2]
    table = text[text.index("| method |") :].partition("\n\n")[0].splitlines()
    heads = [cell.strip() for cell in table[0].strip("|").split("|")]
    rows = [dict(zip(heads, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in table[2:]]
    assert [row["method"].strip("`") for row in rows] == [row["label"] for row in told["rows"]]
    for row, one in zip(rows, told["rows"], strict=True):
        assert row["hypervolume"] == f"{one['hypervolume']:.3f}"
        assert row["95 % interval"] == f"[{one['ci'][0]:.3f}, {one['ci'][1]:.3f}]"
        assert row["inner product"] == f"{one['indicators']['inner_product']:.3f}"
        assert row["tau"] == f"{one['indicators']['tau']:.2f}"
        quality = one["quality"]
        assert row["KL to base"] == f"{'≤ ' if quality['kl_bound'] else ''}{abs(quality['kl']):.1f}"
        assert row["collapsed"] == f"{100 * quality['rate']:.0f} %"
        at = {tuple(point["prefs"]): point["mean"] for point in one["points"]}
        for head, corner in (("brevity, detail at (0,1)", (0.0, 1.0)), ("at (1,0)", (1.0, 0.0))):
            assert row[head] == " ".join(f"{mean:.2f}".lstrip("0") for mean in at[corner])


def rows_under(page: str, head: str) -> dict[str, list[str]]:
    """The cells of the table whose head begins so, by its first column without marks."""
    table = page[page.index(head) :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {first.strip("`"): rest for first, *rest in cells}


def test_the_page_on_learned_rewards_says_what_the_records_say() -> None:
    """Both tables of results/learned/README.md, from its curves and the published comparisons."""
    import statistics

    curves = script("learned/curves.py")
    page = (RESULTS / "learned/README.md").read_text(encoding="utf-8")
    records = json.loads((RESULTS / "learned/curves.json").read_text(encoding="utf-8"))
    published = {
        task: {row["method"]: row for row in reversed(record(RESULTS / f"published/{task}/compare.yaml")["rows"])}
        for task in ("sandbox", "sandbox-learned")
    }
    methods = rows_under(page, "| method | true hypervolume")
    assert set(methods) == set(curves.METHODS)
    for method, cells in methods.items():
        own = [one for one in records if one["method"] == method]
        learned, exact = published["sandbox-learned"][method], published["sandbox"][method]
        assert len(own) == len(learned["runs"]) == 5
        best = statistics.mean(max(row["true"] for row in one["rows"]) for one in own)
        believed, end = learned["believed"]["inner_product"], learned["indicators"]["inner_product"]
        wanted = [f"{100 * learned['optimal_share']:.0f}", f"{end:.3f}", f"{best:.3f}", f"{believed:.3f}"]
        assert cells == [*wanted, f"{learned['quality']['kl']:.1f}", f"{100 * exact['optimal_share']:.0f}"], method
    losses = {method: [curves.stopped(one) for one in records if one["method"] == method] for method in methods}
    for rule, (mean, worst) in rows_under(page, "| rule | mean").items():
        by_method = {method: statistics.mean(loss[rule] for loss in own) for method, own in losses.items()}
        assert mean == f"{statistics.mean(by_method.values()):.3f}"
        assert worst == f"{max(by_method.values()):.3f} (`{max(by_method, key=lambda name: by_method[name])}`)"


def test_the_page_on_learned_rewards_says_how_methods_differ_over_reward_models() -> None:
    """Student's interval of the differences over five reward models, from the record of the table above it."""
    page = " ".join((RESULTS / "learned/README.md").read_text(encoding="utf-8").split())
    groups = json.loads((RESULTS / "learned/other_models.json").read_text(encoding="utf-8"))["groups"]
    runs = {group["title"]: [row["runs"][0] for row in group["rows"]] for group in groups}

    def over(one: str, other: str, key: str, scale: float, form: str) -> str:
        apart = np.array([scale * (a[key] - b[key]) for a, b in zip(runs[one], runs[other], strict=True)])
        half = stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
        mean, low, high = (format(x, form).replace("0.", ".", 1 if form == ".3f" else 0)
                           for x in (apart.mean(), apart.mean() - half, apart.mean() + half))  # fmt: skip
        return f"{mean} [{low}, {high}]"

    support, best = "MOC with support=2", ("optimal_share", 100.0)
    mean = {title: f"{100 * np.mean([run['optimal_share'] for run in of]):.0f}" for title, of in runs.items()}
    assert f"({mean[support]} %; `hindsight`, whose recipe has it, {mean['hindsight']}, and" in page
    assert f"does not search, {mean['ParetoHqD']})" in page and f"of the front ({mean['MO-ODPO']} %)" in page
    assert f"ahead of `hindsight` by {over(support, 'hindsight', *best, '.1f').replace(' [', ' points [')}" in page
    assert f"of `paretohqd` by {over(support, 'ParetoHqD', *best, '.1f')}" in page
    assert f"are level ({over('hindsight', 'ParetoHqD', *best, '.1f')})" in page
    both = [over(one, "MO-ODPO", *best, ".0f").split(" ", 1)[1] for one in ("hindsight", "ParetoHqD")]
    assert f"by 19 each ({both[0]} and {both[1]})" in page
    asked = ("inner_product", 1.0)
    assert f"ahead of `paretohqd` by {over('hindsight', 'ParetoHqD', *asked, '.3f')}" in page
    assert f"with `support` by {over('hindsight', support, *asked, '.3f')}" in page
    assert f"level with `mo-odpo` ({over('hindsight', 'MO-ODPO', *asked, '.3f')})" in page


def test_the_page_on_learned_rewards_says_what_reward_models_are_worth() -> None:
    """Rank correlations of section "What helps", from the table that its script writes."""
    page = " ".join((RESULTS / "learned/README.md").read_text(encoding="utf-8").split())
    table = (RESULTS / "learned/reward_models.md").read_text(encoding="utf-8")

    def spearman(heading: str, measure: str) -> str:
        part = table.split(heading)[1].split("reward models (")[0]
        cells = next(line for line in part.splitlines() if line.startswith(f"| {measure} |")).split("|")
        return cells[3].strip().replace("+", "").replace("0.", ".")

    every, clean = "22 reward models (all); ", "11 reward models (no label flipped); "
    by_wn, by_hv = "inner product", "hypervolume"
    assert f"{spearman(every + by_wn, 'accuracy')} by w.n, {spearman(every + by_hv, 'accuracy')} by hypervolume" in page
    ece = spearman(every + by_hv, "ECE").split(" ")[0]
    assert f"not for certain ({spearman(every + by_wn, 'ECE')}, and {ece})" in page
    assert f"({spearman(clean + by_hv, 'ECE')}; accuracy {spearman(clean + by_hv, 'accuracy').split(' ')[0]})" in page
    assert f"({spearman(clean + by_wn, 'ECE')}; accuracy {spearman(clean + by_wn, 'accuracy').split(' ')[0]})" in page


def test_the_page_on_learned_rewards_says_what_reward_models_of_people_s_pairs_are_worth() -> None:
    """Differences by size, and MORE's, from the table that its script writes."""
    page = " ".join((RESULTS / "learned/README.md").read_text(encoding="utf-8").split())
    table = (RESULTS / "learned/reward_models.md").read_text(encoding="utf-8").split("## Real people's pairs")[1]

    def cells(first: str) -> list[str]:
        line = next(line for line in table.splitlines() if line.startswith(f"| {first} |"))
        return [cell.strip().replace("+0.", ".").replace("-0.", "-.").replace("0.", ".") for cell in line.split("|")]

    sizes = "smollm2-135m, 30 layers - 8 layers | 50"
    by_loss = {loss: cells(f"{sizes} | {loss}")[4] for loss in ("bt", "multitask", "more")}
    assert f"{by_loss['bt']} (`bt`), {by_loss['multitask']} (`multitask`) and {by_loss['more']} (`more`)" in page
    stories = {pairs: cells(f"stories260k, 5 layers, 260 k | {pairs} | multitask")[5] for pairs in (50, 300)}
    assert f"accuracy of {stories[50]} from 50 pairs a group and {stories[300]} from 300" in page
    assert f"({', '.join(cells(f'stories260k, 5 layers | {n}')[4].split(' ')[0] for n in (50, 200, 300))})" in page


def test_the_page_on_learned_rewards_says_what_the_closed_form_has() -> None:
    page = " ".join((RESULTS / "learned/README.md").read_text(encoding="utf-8").split())
    told = json.loads((RESULTS / "learned/closed_form.json").read_text(encoding="utf-8"))
    most = told["optimum"]["hypervolume"]

    def of(rewards: str, scalarisation: str) -> tuple[str, str, str]:
        """The hypervolume and w.n of the beta with most, as the page writes them, and the share of the optimum."""
        rows = [row for row in told["rows"] if (row["rewards"], row["scalarisation"]) == (rewards, scalarisation)]
        best = max(rows, key=lambda row: row["hypervolume"])
        numbers = [f"{best[name]:.3f}".removeprefix("0") for name in ("hypervolume", "inner_product")]
        return numbers[0], numbers[1], f"{100 * best['hypervolume'] / most:.0f}"

    linear, exponential = of("learned, seed 0", "linear"), of("learned, seed 0", "exponential")
    others, mean = (
        [of(f"learned, seed {seed}", "exponential")[0] for seed in (1, 2, 3)],
        of("mean of four", "exponential"),
    )
    assert f"allows {linear[2]} % of the optimum" in page
    assert f"({linear[0]} of {f'{most:.3f}'.removeprefix('0')}, w.n {linear[1]})" in page
    assert (
        f"{exponential[2]} with exponential utility at `hindsight`'s beta ({exponential[0]}, {exponential[1]})" in page
    )
    assert f"allow {others[0]}, {others[1]} and {others[2]}, the mean of the four {mean[0]}" in page


REMEDIES = {
    "first version": "{share} % of the optimum, w.n -.12 at 49 nats",
    "+ support": "`support` ({share} %, w.n {product})",
    "+ kl_stop 8 nats": "a stop at 8 nats ({share}, {product})",
    "+ tchebycheff": "Tchebycheff scores ({share})",
    "+ 4 members, pessimism 1": "(three seeds: {share}, ",
    "+ kl_budget 6 nats": "a KL budget of 6 nats ({share}: it ends at 17)",
    "without support": "and {share} ({product}) without",
    "without bradley-terry (order, beta 0.1)": "{share} without Bradley-Terry labels ({product})",
    "without advantage (score)": "{share} without pairs by advantage ({product})",
    "without exponential (linear)": "{share} with linear scores ({product}",
    "MO-ODPO + support": "with `support` {share}",
    "MO-ODPO + exponential, support": "with exponential scores as well {share}",
    "MO-ODPO + kl_budget 6 nats": "with a KL budget of 6 nats {share}",
    "MOC + kl_stop 8 nats": "a stop at 8 nats ({share})",
}
"""What the page says of a row of remedies.json; of labels that two groups share the second."""


def test_the_page_on_learned_rewards_says_what_people_and_remedies_gave() -> None:
    page = " ".join((RESULTS / "learned/README.md").read_text(encoding="utf-8").split())
    people = record(RESULTS / "published/assistant-human/compare.yaml")
    for row in people["rows"]:
        believed, true = row["believed"], (row["hypervolume"], row["indicators"]["inner_product"])
        numbers = (believed["hypervolume"], true[0], believed["inner_product"], true[1])
        cells = " | ".join(f"{number:.3f}" for number in numbers)
        assert f"| `{row['method']}` | {cells} | {row['quality']['kl']:.1f} |" in page
    rows = {row["label"]: row for group in record(RESULTS / "learned/remedies.yaml")["groups"] for row in group["rows"]}

    def shares(label: str) -> list[str]:
        return [f"{100 * run['hypervolume'] / run['optimum']:.0f}" for run in rows[label]["runs"]]

    *first, last = shares("MOC + support")
    *before, without = shares("MOC")
    with_it = f"{', '.join(first)} and {last} % with `support`"
    assert f"MOC has {with_it} and {', '.join(before)} and {without} without" in page
    for label, words in REMEDIES.items():
        one = rows[label]["runs"][0]
        share, product = shares(label)[0], f"{one['inner_product']:.3f}".replace("0.", ".")
        assert words.format(share=share, product=product) in page, label


def test_the_page_on_learned_rewards_says_what_other_reward_models_gave() -> None:
    page = (RESULTS / "learned/README.md").read_text(encoding="utf-8")
    names = {"hindsight": "hindsight", "moc": "MOC", "moc`, `support=2": "MOC with support=2", "mo-odpo": "MO-ODPO"}
    names["paretohqd"] = "ParetoHqD"
    table = rows_under(page, "| method | the card's")
    told = {group["title"]: group["rows"] for group in record(RESULTS / "learned/other_models.yaml")["groups"]}
    assert {names[name] for name in table} == set(told)
    for name, cells in table.items():
        for cell, row in zip([cell for cell in cells if cell], told[names[name]], strict=True):
            (run,) = row["runs"]
            share, true, believed = run["hypervolume"] / run["optimum"], run["inner_product"], run["believed"]
            assert cell == f"{100 * share:.0f} ({true:.3f}, {believed:.3f})", (name, row["label"])


def test_the_runs_of_the_least_likely_tokens_are_those_that_its_script_would_train(tmp_path: Path) -> None:
    class Found(Exception):
        """Stops a request once it is checked."""

    def stop(plan: Any) -> None:
        raise Found(plan.folder.name)

    page = (RESULTS / "learned/support.md").read_text(encoding="utf-8")
    for method, task, settings in script("learned/support.py").RUNS:
        with pytest.raises(Found) as found:
            moalign.train(method, task, seed=0, settings=settings, results=tmp_path, planned=stop)
        assert f"well-formed, of {method} on {task} ({found.value})" in page
