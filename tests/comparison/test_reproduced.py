"""The command of a row makes the same record again, and evaluating disturbs nobody's random numbers."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moalign.cli import main as cli
from moalign.comparison.compare import CompareRequest, compare
from moalign.evaluation.evaluate import evaluate
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.report import figures

SHORT = ("steps=2", "batch=4", "max_tokens=48")


@pytest.mark.slow
def test_a_rows_command_gives_the_same_record_bit_for_bit(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "ALL", {"fronts": lambda record, suffix: b"a figure"})
    request = CompareRequest(methods=["sft"], overrides=(*small_task, *SHORT), results=tmp_path / "first")
    row = compare(request).content["rows"][0]
    words = shlex.split(row["runs"][0]["command"])
    place = words.index("--results") + 1
    assert words[0] == "moalign" and words[place] == str(tmp_path / "first")
    words[place] = str(tmp_path / "second")
    assert cli.main([*words[1:], "--json"]) == 0
    again = Path(json.loads(capsys.readouterr().out)["run"])
    first = Path(row["runs"][0]["run"])
    assert again != first and again.name == first.name
    results = [json.loads((folder / "eval.json").read_text()) for folder in (first, again)]
    for key in ("points", "hypervolume", "hypervolume_ci", "optimal_share", "indicators", "quality", "optimum"):
        assert results[0][key] == results[1][key], key
    tables = [pd.read_parquet(folder / "responses.parquet") for folder in (first, again)]
    assert tables[0].equals(tables[1])


def state() -> list[Any]:
    import torch

    numpy_state = np.random.get_state(legacy=False)
    return [
        random.getstate(),
        {key: value for key, value in numpy_state.items() if key != "state"},
        [np.asarray(part).tolist() for part in numpy_state["state"].values()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.slow
def test_evaluation_neither_moves_nor_reads_a_global_generator(small_task: tuple[str, ...], tmp_path: Path) -> None:
    import torch

    run, _ = train(plan(TrainRequest("sft", overrides=(*small_task, *SHORT), results=tmp_path)))
    evaluations = []
    for seed in (1, 2):
        method, context = context_of(run, tmp_path)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = state()
        for file in run.path.glob("eval*.json"):
            file.unlink()
        evaluations.append(evaluate(method, context))
        assert state() == before
    assert np.array_equal(evaluations[0].scores, evaluations[1].scores)
    assert evaluations[0].result.content["hypervolume_ci"] == evaluations[1].result.content["hypervolume_ci"]
