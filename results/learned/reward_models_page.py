"""What reward_models.py found, as statistics, tables and a figure; everything here is a function of its record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Cell = Mapping[str, Any]

LOSSES = ("bt", "multitask", "more")
DRAWS = 2000
FEWEST = 6
"""Reward models below which no correlation is given."""
MEASURES = {"accuracy": "accuracy", "ece": "ECE", "log_loss": "log loss"}
PREDICTORS = {
    "ece": "ECE",
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "true_ece": "true ECE",
    "true_accuracy": "true accuracy",
    "true_log_loss": "true log loss",
    "ece_scaled": "ECE after temperature scaling",
}
OUTCOMES = {"share": "hypervolume", "inner_product": "inner product"}


# -- statistics -----------------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and mean and 95 % interval of the mean (Student's t), over training seeds."""
    from moalign.pareto.statistics import student

    mean, count = statistics.fmean(values), len(values)
    half = student(0.95, count) * statistics.stdev(values) / count**0.5 if count > 1 else 0.0
    return {"median": statistics.median(values), "mean": mean, "lo": mean - half, "hi": mean + half, "seeds": count}


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Kendall's tau-b of ``x`` and ``y`` over their last axis, ``[..., n]``; 0 where either is all ties."""
    signs_x, signs_y = (np.sign(values[..., :, None] - values[..., None, :]) for values in (x, y))
    untied = np.sqrt((signs_x**2).sum(axis=(-2, -1)) * (signs_y**2).sum(axis=(-2, -1)))
    return _ratio((signs_x * signs_y).sum(axis=(-2, -1)), untied)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation over the last axis, ``[..., n]``; 0 where either is all ties."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(x, axis=-1), rankdata(y, axis=-1)])
    centred = ranks - ranks.mean(axis=-1, keepdims=True)
    return _ratio((centred[0] * centred[1]).sum(axis=-1), np.sqrt((centred**2).sum(axis=-1).prod(axis=0)))


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of ``x`` and ``y``, ``[..., n]``, without what both share with ``given``.

    0 where ``given`` leaves nothing of either.
    """
    xy, xg, yg = spearman(x, y), spearman(x, given), spearman(y, given)
    return _ratio(xy - xg * yg, np.sqrt(np.maximum((1 - xg**2) * (1 - yg**2), 0)))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return ``part / whole``, 0 where the whole is (but for rounding)."""
    nothing = whole < 1e-9
    return np.where(nothing, 0.0, part / np.where(nothing, 1.0, whole))


def with_interval(statistic: Callable[..., np.ndarray], *columns: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return a statistic of columns ``[n]`` with its 95 % percentile interval over resampled rows."""
    table = np.array(columns, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(table.shape[1], size=(DRAWS, table.shape[1]))
    chunks = np.array_split(picks, max(1, DRAWS // 250))  # kendall holds all pairs of a chunk's rows
    drawn = np.concatenate([statistic(*(column[rows] for column in table)) for rows in chunks])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(statistic(*table)), "lo": float(low), "hi": float(high)}


# -- what the record says -------------------------------------------------------------------------------------------


def groups(cells: Sequence[Cell], part: str) -> dict[tuple[str, int, int], dict[str, list[Cell]]]:
    """Return a part's cells by (backbone, layers, pairs) and by loss, both in order; seeds in order."""
    mine = sorted((cell for cell in cells if cell["part"] == part), key=lambda cell: cell["seed"])
    order = list(dict.fromkeys(cell["backbone"] for cell in mine))
    mine.sort(key=lambda cell: (order.index(cell["backbone"]), cell["layers"], cell["pairs"]))
    result: dict[tuple[str, int, int], dict[str, list[Cell]]] = {}
    for cell in mine:
        rows = result.setdefault((cell["backbone"], cell["layers"], cell["pairs"]), {})
        rows.setdefault(cell["loss"], []).append(cell)
    return result


def paired(first: Sequence[Cell], second: Sequence[Cell], name: str) -> list[float]:
    """Return ``second - first`` of a measure for every seed that both have."""
    theirs = {cell["seed"]: cell[name] for cell in second}
    return [theirs[cell["seed"]] - cell[name] for cell in first if cell["seed"] in theirs]


def size(count: int) -> str:
    """Return a number of parameters as text."""
    return f"{count / 1e6:.0f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def _layers(count: int) -> str:
    return f"{count} layer" + ("s" if count > 1 else "")


def _numbers(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    spread = over_seeds(values)
    median = f"{spread['median']:{sign}.{digits}f}"
    return median + (f" [{spread['lo']:{sign}.{digits}f}, {spread['hi']:{sign}.{digits}f}]" if len(values) > 1 else "")


def scaling_table(cells: Sequence[Cell], part: str) -> list[str]:
    """Return the table of a part: a row for every backbone, number of pairs and loss."""
    every = groups(cells, part)
    if not every:
        return ["None yet."]
    known = all("true_ece" in cell for rows in every.values() for row in rows.values() for cell in row)
    measures = {**MEASURES, "by_chance": "ECE by chance", **({"true_ece": "true ECE"} if known else {})}
    head = ["backbone", "pairs a group", "loss", "seeds", *measures.values()]
    lines = ["| " + " | ".join(head) + " |", "| --- | ---: | --- |" + " ---: |" * (len(head) - 3)]
    for (backbone, layers, pairs), rows in every.items():
        for loss in (loss for loss in LOSSES if loss in rows):
            name = f"{backbone}, {_layers(layers)}, {size(rows[loss][0]['parameters'])}"
            values = [_numbers([cell[measure] for cell in rows[loss]]) for measure in measures]
            lines.append(f"| {name} | {pairs} | {loss} | {len(rows[loss])} | {' | '.join(values)} |")
    return lines


def difference_table(cells: Sequence[Cell], part: str) -> list[str]:
    """Return MORE less multitask, paired over seeds: a row for every backbone and number of pairs."""
    measure = {"accuracy": "accuracy", "ece": "ECE", "true_ece": "true ECE"}
    rows = []
    for (backbone, layers, pairs), losses in groups(cells, part).items():
        both = losses.get("multitask", []), losses.get("more", [])
        names = [name for name in measure if all(name in cell for cell in (*both[0], *both[1]))]
        if paired(*both, "ece"):
            values = [_numbers(paired(*both, name), 4, "+") for name in names]
            rows.append(f"| {backbone}, {_layers(layers)} | {pairs} | {' | '.join(values)} |")
    if not rows:
        return []
    head = ["MORE - multitask", "pairs a group", *(measure[name] for name in names)]
    return ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1), *rows]


def size_table(cells: Sequence[Cell], part: str) -> list[str]:
    """Return the largest size less the smallest, paired over seeds, for every backbone, number of pairs and loss."""
    measure = {"accuracy": "accuracy", "ece": "ECE", "log_loss": "log loss"}
    every = groups(cells, part)
    lines = []
    for backbone, pairs in dict.fromkeys((backbone, pairs) for backbone, _, pairs in every):
        sizes = [layers for name, layers, count in every if (name, count) == (backbone, pairs)]
        small, large = (every[backbone, layers, pairs] for layers in (min(sizes), max(sizes)))
        for loss in (loss for loss in LOSSES if small is not large and loss in small and loss in large):
            if paired(small[loss], large[loss], "ece"):
                values = [_numbers(paired(small[loss], large[loss], name), 3, "+") for name in measure]
                name = f"{backbone}, {_layers(max(sizes))} - {_layers(min(sizes))}"
                lines.append(f"| {name} | {pairs} | {loss} | {' | '.join(values)} |")
    if not lines:
        return []
    head = ["largest - smallest", "pairs a group", "loss", *measure.values()]
    return ["| " + " | ".join(head) + " |", "| --- | ---: | --- |" + " ---: |" * len(measure), *lines]


def correlations(cells: Sequence[Cell], outcome: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return every measure's rank correlations with the truth of what best-of-n picked.

    ``kendall``, ``spearman``, and ``given_accuracy``: Spearman's at equal (true) accuracy; signs as they are, so that a
    calibration error that tells has a negative one.
    """
    truth = [cell[outcome] for cell in cells]
    result = {}
    for name in PREDICTORS:
        values = [cell[name] for cell in cells]
        given = [cell["true_accuracy" if name.startswith("true") else "accuracy"] for cell in cells]
        result[name] = {
            "kendall": with_interval(kendall, values, truth),
            "spearman": with_interval(spearman, values, truth),
        }
        if not name.endswith("accuracy"):
            result[name]["given_accuracy"] = with_interval(partial_spearman, values, truth, given)
    return result


def ranking_table(cells: Sequence[Cell]) -> list[str]:
    """Return the rank correlations with both outcomes, of all reward models and of those without flipped labels."""
    mine = [cell for cell in cells if cell["part"] == "ranking"]
    lines = []
    for title, chosen in (("all", mine), ("no label flipped", [cell for cell in mine if not cell["flipped"]])):
        if len(chosen) < FEWEST or (title != "all" and len(chosen) == len(mine)):
            continue
        for outcome, noun in OUTCOMES.items():
            low, high = min(cell[outcome] for cell in chosen), max(cell[outcome] for cell in chosen)
            ceiling = chosen[0]["ceiling"][outcome]
            lines += [
                f"{len(chosen)} reward models ({title}); {noun}, share of the optimum's: {low:.2f} to {high:.2f}; by "
                f"the exact rewards {ceiling:.2f}.",
                "",
                "| measure | Kendall | Spearman | Spearman at equal accuracy |",
                "| --- | ---: | ---: | ---: |",
            ]
            for name, row in correlations(chosen, outcome).items():
                values = [
                    f"{row[kind]['value']:+.2f} [{row[kind]['lo']:+.2f}, {row[kind]['hi']:+.2f}]" if kind in row else ""
                    for kind in ("kendall", "spearman", "given_accuracy")
                ]
                lines.append(f"| {PREDICTORS[name]} | {' | '.join(values)} |")
            lines.append("")
    return lines or ["Too few yet.", ""]


def policies_table(cells: Sequence[Cell]) -> list[str]:
    """Return what the method made of some reward models, beside what best-of-n did."""
    models = {_model(cell): cell for cell in cells if cell["part"] == "ranking"}
    trained = [(models[_model(cell)], cell) for cell in cells if cell["part"] == "policies" and _model(cell) in models]
    if not trained:
        return []
    lines = [
        "| pairs | flipped | accuracy | ECE | true ECE | best-of-n: share | policy: share | inner product | KL |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, policy in sorted(trained, key=lambda pair: pair[0]["ece"]):
        values = [model["accuracy"], model["ece"], model["true_ece"], model["share"]]
        values += [policy["share"], policy["inner_product"]]
        shown = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {model['pairs']} | {model['flipped']:.0%} | {shown} | {policy['kl']:.1f} |")
    return lines


def _model(cell: Cell) -> tuple[Any, ...]:
    return cell["layers"], cell["pairs"], cell["flipped"], cell["seed"]


# -- page and figure ------------------------------------------------------------------------------------------------


TEXTS = {
    "title": """
        Made by `python results/learned/reward_models.py` (settings: [reward_models.yaml](reward_models.yaml); every
        number: [reward_models.json](reward_models.json)) in {hours:.1f} hours of CPU. Numbers are medians over seeds,
        with the 95 % interval of the mean over seeds (Student's t). ECE: 10 bins, both orders of every pair, mean over
        groups; by chance: what a calibrated model has on so few pairs; true: against the annotators' known
        probabilities instead of labels. Held-out pairs are as many whatever was trained on.""",
    "ranking": """
        Reward models of {task} (two specialists, a head each) of {sizes} sizes, on {least} to {most} pairs, with and
        without flipped labels, each with labels of its own. Each picks the best of {n} answers of the base at every
        preference, from the same candidates, and the exact rewards judge what it picked: the mildest way to use a
        reward model; no policy is trained. They are measured on held-out pairs of the same annotators, flipped as
        theirs. Best-of-n takes a head in units of its own spread, so that a temperature, which moves an ECE, changes
        nothing: what an ECE tells here, it tells by what it shares with the order of answers. The last column is what
        is left of a measure at equal accuracy. Intervals (95 %) resample the reward models.""",
    "policies": "What `{method}` makes of some of them, judged by the truth:",
    "sandbox": """
        {passes} passes; judged on {held_out} pairs of each group. `bt` is one reward model a group, judged on its own
        group; `multitask` and `more` are one for all groups. Sizes: the sandbox's base (2 layers), its first layer
        alone, and the base with four layers more that begin as the identity.""",
    "hh": """
        {passes} pass. The file has one group of annotators; dialogues of 1 to {turns} human turns (the last: and more)
        stand in for groups, which differ in what is read more than in taste. Measured on all groups' held-out pairs
        together. SmolLM2-135M is cut to its first layers and
        trained by adapters on its last four, and the head; stories260k is trained whole. Every seed has held-out
        prompts of its own. Learning rates were not tuned.""",
}


def _text(name: str, **values: Any) -> str:
    return " ".join(TEXTS[name].format(**values).split())


def markdown(record: Mapping[str, Any]) -> str:
    """Return the page."""
    cells, settings = record["cells"], record["settings"]
    ranking = settings["ranking"]
    least, most = min(ranking["pairs"]), max(ranking["pairs"])
    lines = [
        "# Reward models: calibration against size and data, and what it is worth",
        "",
        _text("title", hours=sum(cell["cpu_seconds"] for cell in cells) / 3600),
        "",
        "## Does the calibration error tell which reward model leads to the truth?",
        "",
        _text("ranking", task=ranking["task"], sizes=len(ranking["layers"]), least=least, most=most, n=ranking["n"]),
        "",
        *ranking_table(cells),
    ]
    if policies := policies_table(cells):
        lines += [_text("policies", method=settings["policies"]["method"]), "", *policies, ""]
    titles = {
        "sandbox": "## Five annotator groups that disagree (sandbox)",
        "hh": "## Real people's pairs (HH, harmless-base test)",
    }
    for part, title in titles.items():
        lines += [title, "", _text(part, **settings[part]), "", *scaling_table(cells, part), ""]
        for differences in (difference_table(cells, part), size_table(cells, part)):
            lines += [*differences, ""] if differences else []
    return "\n".join([*lines, "![ECE by size and data; best-of-n by ECE](reward_models.png)", ""])


def draw(record: Mapping[str, Any]) -> bytes:
    """Return the figure: the truth of best-of-n against ECE, and ECE against pairs for each backbone.

    A backbone that has one number of pairs and several sizes has one panel, of its parameters.
    """
    from moalign.report import style

    cells = record["cells"]
    ranking = [cell for cell in cells if cell["part"] == "ranking"]
    sizes: dict[tuple[str, str, str], dict[int, dict[str, list[Cell]]]] = {}
    for part in ("sandbox", "hh"):
        every_cell = groups(cells, part)
        for (backbone, _, pairs), losses in every_cell.items():
            weights = next(iter(losses.values()))[0]["parameters"]
            own = [(other, count) for name, other, count in every_cell if name == backbone]
            if len({count for _, count in own}) == 1 < len({other for other, _ in own}):
                sizes.setdefault((part, f"{backbone}, {pairs} pairs", "parameters"), {})[weights] = losses
            else:
                sizes.setdefault((part, f"{backbone}, {size(weights)}", "pairs a group"), {})[pairs] = losses
    count = len(OUTCOMES) + len(sizes)
    columns = min(3, count)
    with style.canvas(3.0 * columns, 2.6 * -(-count // columns) + 0.3, "light") as (figure, colours):
        every = style.panels(figure, count, columns)
        for axes, (outcome, noun) in zip(every, OUTCOMES.items(), strict=False):
            _scatter(axes, ranking, outcome, colours)
            axes.set(title="best-of-n", xlabel="ECE", ylabel=f"true {noun}, share")
        for axes, ((part, title, along), found) in zip(every[len(OUTCOMES) :], sizes.items(), strict=True):
            _lines(axes, found, "true_ece" if part == "sandbox" else "ece", colours)
            axes.set(title=title, xscale="log", xlabel=along)
            axes.set_xticks(list(found), [size(x) if along == "parameters" else str(x) for x in found])
            axes.minorticks_off()
            axes.set_ylabel("true ECE" if part == "sandbox" else "ECE")
            axes.set_ylim(bottom=0)
        for axes in (every[0], *every[len(OUTCOMES) :][:1]):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
        return style.content(figure, "", ".png")


def _scatter(axes: Any, models: Sequence[Cell], outcome: str, colours: Any) -> None:
    from moalign.report import style

    for number, flipped in enumerate(sorted({cell["flipped"] for cell in models})):
        mine = [cell for cell in models if cell["flipped"] == flipped]
        points = [cell["ece"] for cell in mine], [cell[outcome] for cell in mine]
        axes.plot(*points, label=f"{flipped:.0%} flipped", **style.look(number, colours).marks(5, 0))


def _lines(axes: Any, by_pairs: Mapping[int, Mapping[str, Sequence[Cell]]], name: str, colours: Any) -> None:
    from moalign.report import style

    for number, loss in enumerate(LOSSES):
        spread = {n: over_seeds([cell[name] for cell in rows[loss]]) for n, rows in by_pairs.items() if loss in rows}
        if spread:
            middle = [numbers["mean"] for numbers in spread.values()]
            half = [numbers["hi"] - numbers["mean"] for numbers in spread.values()]
            marks = style.look(number, colours).marks(5, 1.2)
            axes.errorbar(list(spread), middle, yerr=half, capsize=2, label=loss, **marks)
