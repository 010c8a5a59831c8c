"""MORE against multitask on the sandbox's annotators: does weighing the groups lower the calibration error?

Five annotator groups label pairs by Bradley-Terry with known truth. Per seed (of the labels and of the training) one
reward model is trained on all groups with each loss, from the sandbox's base, and judged on every group's held-out
pairs; differences are paired over seeds. Groups that disagree (diverse) and, as a control, groups with one taste
(alike). Written beside this file: ``more.json``, ``more.md``, ``more.png``.

    python results/calibration/calibration.py [--seeds N] [--pairs N] [--steps N] [--sharpness X]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
LOSSES = ("multitask", "more")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t by number of seeds."""
CLAIM = (
    "arXiv 2312.07401, averages over five data sets: Pythia-1.4B multitask accuracy 62.38 %, ECE .0541; MORE 63.34 %, "
    ".0364. Pythia-2.8B 64.00 %, .0456; 64.01 %, .0366. LLaMA2-7B 70.13 %, .0570; 70.32 %, .0458. With diverse "
    "annotators, it says, MORE lowers the calibration error at equal accuracy."
)


def judged(kind: str, loss: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one reward model and return its means over the groups."""
    from moalign.config.card import SplitSpec
    from moalign.reward_models import evaluation, runs
    from moalign.reward_models.settings import RewardSettings
    from moalign.tasks.sandbox import annotators, base, world

    groups = annotators.groups_of(kind, world.OBJECTIVES[:3], options.sharpness)
    sets = annotators.label(groups, world.prompts(), options.pairs, seed)
    settings = RewardSettings(
        loss=loss,
        steps=options.steps,
        batch=80,
        lr=options.lr,
        warmup=10,
        weight_decay=0.01,
        max_tokens=128,
        template="{prompt} {response}",
        splits=SplitSpec(train=0.7, calibration=0.1, eval=0.2),
    )
    backbone = base.ensure(["helpfulness", "harmlessness"], "warm", 0)
    request = runs.make(f"{kind}-{seed}", settings, str(backbone), sets, seed=seed, results=folder)
    started = time.monotonic()
    run, _ = runs.obtain(request)
    result = evaluation.evaluate(runs.objective(run), request.parts["eval"], draws=200)
    mean = result["mean"]
    lines = [line for line in run.metrics() if "weight_0" in line]
    weights = [float(np.mean([line[f"weight_{i}"] for line in lines])) for i in range(len(sets))] if lines else None
    return {
        "kind": kind,
        "loss": loss,
        "seed": seed,
        "accuracy": mean["accuracy"],
        "true_accuracy": mean["truth"]["accuracy"],
        "ece": mean["ece"],
        "true_ece": mean["truth"]["ece"],
        "by_chance": float(np.mean([row["ece_by_chance"]["10"] for row in result["datasets"]])),
        "by_group": {row["name"]: {"accuracy": row["accuracy"], "ece": row["ece"]["10"]} for row in result["datasets"]},
        "weights": weights,
        "training_seconds": round(run.record.seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and 95 % interval over seeds (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "lo": mean, "hi": mean}
    half = T_95.get(len(values), 1.96) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return {"mean": mean, "lo": mean - half, "hi": mean + half}


def summary(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return every loss's means and the paired differences MORE - multitask."""
    mine = {
        loss: sorted((r for r in rows if r["kind"] == kind and r["loss"] == loss), key=lambda r: r["seed"])
        for loss in LOSSES
    }

    def of(row: dict[str, Any], name: str) -> float:
        return float(row[name]["10"] if isinstance(row[name], dict) else row[name])

    names = ("accuracy", "ece", "true_accuracy", "true_ece")
    result: dict[str, Any] = {
        loss: {name: spread([of(r, name) for r in mine[loss]]) for name in names} for loss in LOSSES
    }
    result["difference"] = {
        name: spread([of(b, name) - of(a, name) for a, b in zip(mine["multitask"], mine["more"], strict=True)])
        for name in names
    }
    return result


def markdown(record: dict[str, Any]) -> str:
    """Return the numbers as a page."""

    def cell(interval: dict[str, float], sign: str = "") -> str:
        return f"{interval['mean']:{sign}.4f} [{interval['lo']:{sign}.4f}, {interval['hi']:{sign}.4f}]"

    options = record["asked"]
    lines = [
        "# MORE and multitask reward models on the sandbox's annotators",
        "",
        f"Made by `{record['command']}`: {options['seeds']} seeds, {options['pairs']} labelled pairs per group "
        f"(70 % trained on, 20 % judged on), five groups, {options['steps']} steps of 80 pairs, "
        f"learning rate {options['lr']:g}, "
        f"sharpness {options['sharpness']:g} (1: what is one unit of taste better wins in 73 %), the "
        "sandbox's base (107,000 parameters) as backbone. Means over groups; 95 % intervals over seeds (Student's t). "
        "ECE: 10 bins, both orders; true: against the annotators' known probabilities instead of their labels.",
        "",
        "| annotators | loss | accuracy | ECE | true accuracy | true ECE |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, numbers in record["summary"].items():
        for loss in LOSSES:
            cells = [cell(numbers[loss][name]) for name in ("accuracy", "ece", "true_accuracy", "true_ece")]
            lines.append(f"| {kind} | {loss} | {' | '.join(cells)} |")
        cells = [cell(numbers["difference"][name], "+") for name in ("accuracy", "ece", "true_accuracy", "true_ece")]
        lines.append(f"| {kind} | MORE - multitask | {' | '.join(cells)} |")
    chance = np.mean([row["by_chance"] for row in record["rows"]])
    lines += [
        "",
        f"A calibrated model would get an ECE of about {chance:.4f} on so few pairs by chance.",
        "",
        f"The paper's claim. {CLAIM}",
        "",
        record["verdict"],
        "",
        "![ECE by loss and seed](more.png)",
    ]
    return "\n".join(lines) + "\n"


def verdict(summaries: dict[str, Any]) -> str:
    """Return the result for the diverse groups in a sentence."""
    differences = summaries["diverse"]["difference"]

    def compared(name: str, words: str) -> str:
        low, high = differences[name]["lo"], differences[name]["hi"]
        how = "lower with MORE" if high < 0 else "higher with MORE" if low > 0 else "not told apart"
        return f"{words} {how} ({differences[name]['mean']:+.4f} [{low:+.4f}, {high:+.4f}])"

    named = ("true_ece", "true ECE"), ("accuracy", "accuracy"), ("true_accuracy", "true accuracy")
    return f"Found here with diverse annotators: {', '.join(compared(*pair) for pair in named)}."


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the figure: true and labelled ECE of every seed, one line per seed from multitask to MORE."""
    from moalign.report import style

    kinds = list(record["summary"])
    with style.canvas(7.2, 3.6, "light") as (figure, colours):
        panels = figure.subplots(1, 2, sharey=True)
        for panel, name, title in zip(
            panels, ("ece", "true_ece"), ("against labels", "against the truth"), strict=True
        ):
            for number, kind in enumerate(kinds):
                rows = [r for r in record["rows"] if r["kind"] == kind]
                for seed in sorted({r["seed"] for r in rows}):
                    pair = [next(r for r in rows if r["seed"] == seed and r["loss"] == loss) for loss in LOSSES]
                    panel.plot(
                        [0, 1],
                        [r[name]["10"] for r in pair],
                        color=colours.colours[number],
                        marker="o",
                        markersize=4,
                        linewidth=1.1,
                        label=kind if seed == 0 else None,
                    )
            panel.set(xticks=[0, 1], xticklabels=list(LOSSES), title=title)
            panel.set_xlim(-0.3, 1.3)
            panel.set_ylim(bottom=0)
        panels[0].set_ylabel("ECE, mean over groups")
        panels[0].legend()
        path.write_bytes(style.content(figure, "", ".png"))


def main() -> None:
    """Train and judge all reward models and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3000, help="labelled pairs per group")
    parser.add_argument("--steps", type=int, default=260, help="about two passes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sharpness", type=float, default=3.0, help="how sure annotators are of what they like")
    parser.add_argument("--results", type=Path, help="where the reward models are kept; else a temporary folder")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.results or Path(temporary)
        rows = []
        for kind in ("diverse", "alike"):
            for seed in range(options.seeds):
                for loss in LOSSES:
                    rows.append(judged(kind, loss, seed, options, folder))
                    result = rows[-1]
                    print(
                        f"{kind} {loss} seed {seed}: accuracy {result['accuracy']:.4f}, ECE {result['ece']['10']:.4f}, "
                        f"true ECE {result['true_ece']['10']:.4f}, {result['seconds']:.0f} s",
                        flush=True,
                    )
    summaries = {kind: summary(rows, kind) for kind in ("diverse", "alike")}
    record = {
        "command": "python results/calibration/calibration.py"
        + "".join(f" --{name} {getattr(options, name)}" for name in ("seeds", "pairs", "steps", "lr", "sharpness")),
        "asked": {name: getattr(options, name) for name in ("seeds", "pairs", "steps", "lr", "sharpness")},
        "packages": {name: metadata.version(name) for name in ("moalign", "torch", "transformers", "trl", "numpy")},
        "python": platform.python_version(),
        "rows": rows,
        "summary": summaries,
        "paper": CLAIM,
        "verdict": verdict(summaries),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "more.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.out / "more.md").write_text(markdown(record))
    draw(record, options.out / "more.png")
    print(record["verdict"])


if __name__ == "__main__":
    main()
