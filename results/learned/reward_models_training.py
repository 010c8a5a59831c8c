"""What reward_models.py trains and how it is measured: backbones of several sizes, annotators' and people's pairs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from reward_models_frozen import read_once

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.paths import CHECKOUT

if TYPE_CHECKING:
    from moalign.config.objectives import ClassifierObjective
    from moalign.reward_models.pairs import PairSet


# -- backbones ------------------------------------------------------------------------------------------------------


def resized(source: str | Path, layers: int, folder: Path) -> Path:
    """Return a folder with a decoder model of so many layers, made from another by cutting or growing it.

    Cut, the first layers remain, and the final norm. Grown, copies of the last follow whose two output projections are
    zero: the model computes what it did (block expansion, LLaMA Pro, arXiv 2401.02415), with more to train.
    """
    import copy

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from moalign.lm import model_folder
    from moalign.lm.trainers import quiet_libraries
    from moalign.runs import atomic

    origin = model_folder.resolve(str(source), None, "backbone")
    if model_folder.read_config(origin, "backbone").get("num_hidden_layers") == layers:
        return origin
    if (folder / "model.safetensors").is_file():
        return folder
    logging.disable_progress_bar()
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(origin, use_safetensors=True, trust_remote_code=False)
        stack = model.model.layers
        for _ in range(layers - len(stack)):
            stack.append(copy.deepcopy(stack[-1]))
            for projection in (stack[-1].self_attn.o_proj, stack[-1].mlp.down_proj):
                projection.weight.data.zero_()
        model.model.layers = stack[:layers]
        model.config.num_hidden_layers = layers
        with atomic.directory(folder) as place:
            model.save_pretrained(place, safe_serialization=True)
            AutoTokenizer.from_pretrained(origin, trust_remote_code=False).save_pretrained(place)
    return folder


def parameters(folder: Path) -> int:
    """Return how many weights a model's folder holds."""
    from safetensors import safe_open

    from moalign.lm import model_folder

    total = 0
    for path in model_folder.weight_files(folder, "backbone"):
        with safe_open(path, framework="np") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return total


def sandbox_base() -> Path:
    """Return the sandbox's warm base for two objectives."""
    from moalign.tasks.sandbox import base

    return base.ensure(["helpfulness", "harmlessness"], "warm", 0)


def backbone_of(cell: Mapping[str, Any], source: str | Path, results: Path) -> Path:
    """Return the folder of a cell's backbone, named after the weights that it is made of."""
    from moalign.lm import model_folder

    origin = model_folder.resolve(str(source), None, "backbone")
    name = f"{cell['backbone']}-{cell['layers']}-{model_folder.fingerprint(origin, 'backbone')[:8]}"
    return resized(origin, cell["layers"], results / "reward-models" / "backbones" / name)


def states_of(source: str | Path, frozen: int, results: Path) -> Path:
    """Return the folder where states after the first layers of a backbone are kept, named after its weights."""
    from moalign.lm import model_folder

    origin = model_folder.resolve(str(source), None, "backbone")
    return results / "reward-models" / "states" / f"{model_folder.fingerprint(origin, 'backbone')[:8]}-{frozen}"


# -- training and judging -------------------------------------------------------------------------------------------


def differences(objective: ClassifierObjective, sets: Sequence[PairSet]) -> list[Matrix]:
    """Return ``r(chosen) - r(rejected)`` of every data set's pairs, each by its own head where there are several."""
    from moalign.reward_models import evaluation
    from moalign.rewards.ensemble import classifier

    labels = list(classifier(objective.model_copy(update={"label": 0}), Path()).labels.values())
    if len(labels) > 1:
        scorers = [classifier(objective.model_copy(update={"label": pairs.name}), Path()) for pairs in sets]
    else:
        scorers = [classifier(objective, Path())] * len(sets)
    return [evaluation.deltas(scorer, pairs) for scorer, pairs in zip(scorers, sets, strict=True)]


def measures(
    deltas: Sequence[Matrix], sets: Sequence[PairSet], fitting: Sequence[Matrix] = (), pooled: bool = False
) -> dict[str, float]:
    """Return accuracy, ECE (10 bins) and log loss of held-out pairs' differences, means over the data sets.

    ``true_*`` are against the annotators' probabilities, where they are known; ``by_chance`` is the ECE that a
    calibrated model has on so few pairs. ``ece_scaled``: after a temperature, fitted on the differences ``fitting``.
    ``pooled``: of all pairs together instead, where data sets are so small that chance would be most of an ECE.
    """
    from moalign.reward_models import calibration

    chances = [pairs.chance for pairs in sets]
    if pooled:
        deltas, chances = [np.concatenate(deltas)], [[chance for part in chances for chance in part]]
    rows: list[dict[str, float]] = []
    for number, (delta, chance) in enumerate(zip(deltas, chances, strict=True)):
        row = {"by_chance": float(calibration.by_chance(delta, draws=50).mean())}
        for prefix, preferred in (("", 1.0), *((("true_", chance),) if chance else ())):
            row[prefix + "accuracy"] = calibration.accuracy(delta, preferred)
            row[prefix + "ece"] = calibration.ece(delta, preferred)
            row[prefix + "log_loss"] = calibration.log_loss(delta, preferred)
        if fitting:
            row["ece_scaled"] = calibration.ece(delta / calibration.temperature(fitting[number]))
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def trained(
    cell: Mapping[str, Any],
    settings: Mapping[str, Any],
    backbone: Path,
    train: Sequence[PairSet],
    held_out: Sequence[PairSet],
    passes: float,
    results: Path,
) -> list[Matrix]:
    """Train a cell's reward model, or one for each group with ``bt``; returns the held-out pairs' differences.

    The weights go: they take up to half a gigabyte, and there are hundreds.
    """
    from moalign.reward_models import runs
    from moalign.reward_models.settings import RewardSettings
    from moalign.runs import atomic

    steps = max(1, round(passes * cell["pairs"] * len(train) / settings["batch"]))
    parts = [([a], [b]) for a, b in zip(train, held_out, strict=True)] if cell["loss"] == "bt" else [(train, held_out)]
    name = f"scaling-{cell['part']}"
    deltas: list[Matrix] = []
    finished: list[Path] = []
    for mine, judging in parts:
        own: dict[str, Any] = {**settings, "batch": settings["batch"] * len(mine) // len(train), "steps": steps}
        request = runs.RewardRequest(
            name,
            RewardSettings(loss=cell["loss"], **own),
            str(backbone),
            None,
            {"train": list(mine), "calibration": [], "eval": list(judging)},
            cell["seed"],
            results,
        )
        run, _ = runs.obtain(request)
        deltas += differences(runs.objective(run), judging)
        finished.append(run.path)
    for path in finished:
        atomic.remove_directory(path)
    return deltas


@functools.lru_cache(maxsize=2)
def annotated(
    kind: str, sharpness: float, labelled: int, held_out: int, seed: int
) -> tuple[list[PairSet], list[PairSet]]:
    """Return the sandbox's pairs to train on and held out, on other prompts; fewer pairs are the first of more."""
    from moalign.tasks.sandbox import annotators, world

    groups = annotators.groups_of(kind, world.OBJECTIVES[:3], sharpness)
    train = annotators.label(groups, prompts_of("train"), labelled, seed)
    return train, annotators.label(groups, prompts_of("eval"), held_out, 1000 + seed)


def prompts_of(split: str) -> list[str]:
    """Return the sandbox's prompts of a split, as the task sandbox-learned has them."""
    from moalign.config.load import load_card
    from moalign.data import splits
    from moalign.tasks.sandbox import world

    card = load_card("sandbox-learned")
    return [prompt for prompt in world.prompts() if splits.split_of(prompt, card.splits) == split]


def of_sandbox(cell: Mapping[str, Any], spec: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """Train and judge a cell of the sandbox's annotator groups."""
    mine = spec["sandbox"]
    sets, held_out = annotated(mine["groups"], mine["sharpness"], mine["labelled"], mine["held_out"], cell["seed"])
    backbone = backbone_of(cell, sandbox_base(), results)
    train = [pairs.pick(range(cell["pairs"])) for pairs in sets]
    deltas = trained(cell, mine["settings"], backbone, train, held_out, mine["passes"], results)
    return {"parameters": parameters(backbone), **measures(deltas, held_out)}


def by_turns(sets: Sequence[PairSet], most: int) -> list[PairSet]:
    """Return dialogues of 1, 2, ... human turns as data sets; the last has those of ``most`` and more."""
    from moalign.reward_models.pairs import PairSet

    by_length = [PairSet(f"turns-{number}") for number in range(1, most + 1)]
    for pairs in sets:
        for prompt, chosen, rejected in zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True):
            by_length[min(prompt.count("\n\nHuman:"), most) - 1].add(prompt, chosen, rejected)
    return by_length


def model_of(name: str) -> str | None:
    """Return the folder or name of a model; None for a folder that is neither in ``../shared`` nor where
    ``MOALIGN_SHARED`` says.
    """
    place = Path(os.environ.get("MOALIGN_SHARED") or CHECKOUT.parent / "shared") / name
    return str(place) if place.is_dir() else None if "/" in name else name


def of_people(cell: Mapping[str, Any], spec: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """Train and judge a cell of real people's pairs; every seed has held-out prompts of its own."""
    from moalign.config.card import SourceSpec, SplitSpec
    from moalign.reward_models import pairs as pair_files

    mine = spec["hh"]
    how = mine["backbones"][cell["backbone"]]
    sources = [(None, SourceSpec(path=str(CHECKOUT / file))) for file in mine["files"]]
    sets = by_turns(pair_files.read(sources), mine["turns"])
    shares = SplitSpec(train=0.7, calibration=0.1, eval=0.2, salt=f"moalign-{cell['seed']}")
    parts = pair_files.split_all(sets, shares)
    few = [pairs.name for pairs in parts["train"] if len(pairs) < cell["pairs"]]
    if few:
        raise RequestError(f"hh: {cell['pairs']} pairs a group; fewer are there to train on in {', '.join(few)}")
    rng = np.random.default_rng(cell["seed"])
    train = [pairs.pick(rng.permutation(len(pairs))[: cell["pairs"]].tolist()) for pairs in parts["train"]]
    source = model_of(how["model"])
    if source is None:
        raise RequestError(f"{how['model']}: it is not there; set MOALIGN_SHARED to the folder that has it")
    backbone = backbone_of(cell, source, results)
    settings = {**mine["settings"], **how["settings"]}
    with contextlib.ExitStack() as stack:
        if "lora" in how:
            frozen = cell["layers"] - how["adapted"]
            last = "|".join(str(layer) for layer in range(frozen, cell["layers"]))
            settings["lora"] = {**how["lora"], "targets": rf".*\.layers\.({last})\..*_proj"}
            if not torch.cuda.is_available():  # there they would be those of autocast
                stack.enter_context(read_once(frozen, states_of(source, frozen, results)))
        deltas = trained(cell, settings, backbone, train, parts["eval"], mine["passes"], results)
    return {
        "parameters": parameters(backbone),
        "held_out": sum(map(len, parts["eval"])),
        **measures(deltas, parts["eval"], pooled=True),
    }
