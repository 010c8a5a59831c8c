"""Scorers of the user's own, in a file beside the card, that do what no scorer should; and names that no objective has.

Also other code that is not ours: methods of other packages.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.cli.main import main
from moalign.config.card import taken
from moalign.methods import registry

CARD = """\
name: own
kind: text
description: a test
model: nobody/nothing
objectives:
  - {name: size, kind: python, function: "scorers.py:size"}
  - {name: brevity, kind: rule, rule: brevity}
data: {prompts: [one, two, three, four]}
normaliser: {size: {mean: 0, sd: 1, lo: 0, hi: 10}, brevity: {mean: 0, sd: 1, lo: 0, hi: 10}}
reference_point: [0, 0]
sensitivity_point: [0, 0]
"""
SCORE = ("score", "--task", "own/task.yaml", "--in", "in.jsonl", "--json")
SIZE = "def size(prompts, responses):\n    {}\n    return [float(len(text)) for text in responses]\n"
PRINTS = """\
import ctypes, os, sys
def chat(when):
    print(f"printed {when}")
    sys.__stdout__.write(f"past the redirection {when}\\n")
    os.write(1, f"written {when}\\n".encode())
    ctypes.CDLL(None).puts(f"put {when}".encode())
chat("at import")
""" + SIZE.format("chat('in scoring')")
SEEDS = """\
import random, numpy, torch
def seed():
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
seed()
""" + SIZE.format("seed()")

Write = Callable[[str], Path]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes ``own/scorers.py`` beside a card that needs no model, and three rows to score; returns the file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "task.yaml").write_text(CARD)
    texts = ("a", "bb", "ccc")
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": "p", "response": text}) + "\n" for text in texts))

    def write(source: str) -> Path:
        (folder / "scorers.py").write_text(source)
        return folder / "scorers.py"

    return write


# -- stdout ----------------------------------------------------------------------------------


def test_what_a_scorer_writes_to_stdout_stands_on_stderr_and_json_is_one_object(
    own: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    """By print, past Python's redirection, straight to the file descriptor, and by a C library that keeps it back."""
    own(PRINTS)
    assert main(SCORE) == 0
    out, err = capfd.readouterr()
    assert [row["raw"]["size"] for row in json.loads(out)["scores"]] == [1.0, 2.0, 3.0]
    for when in ("at import", "in scoring"):
        for how in ("printed", "past the redirection", "written", "put"):
            assert err.count(f"{how} {when}\n") == 1


def test_a_scorer_in_a_program_of_one_s_own_keeps_its_stdout_clean(
    own: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the command line, and with several threads at once: all is as it was when the last is done."""
    import random
    from concurrent.futures import ThreadPoolExecutor

    from moalign.config.objectives import PythonObjective
    from moalign.rewards.python_scorer import PythonScorer

    file = own(f"import random, time\n{PRINTS}".replace("chat('in", "random.seed(1); time.sleep(0.003); chat('in"))
    before = random.getstate()
    scorer = PythonScorer(PythonObjective(name="size", kind="python", function=f"{file}:size"), file.parent)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: scorer.score(["p"], ["a"]), range(40)))
    os.write(1, b"a result\n")
    out, err = capfd.readouterr()
    assert out == "a result\n"
    assert random.getstate() == before
    assert err.count("written in scoring\n") == 40


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_is_no_obstacle(own: Write, closed: str) -> None:
    own(PRINTS)
    command = [sys.executable, "-m", "moalign", *SCORE]
    root = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {closed}>&-', "sh", *command], env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    if closed == "2":
        assert json.loads(ended.stdout)["rows"] == 3
    else:
        assert "printed in scoring" in ended.stderr


# -- how it ends -----------------------------------------------------------------------------

GONE = "class Gone(BaseException):\n    pass\n"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import sys\nsys.exit(0)\n", ["SystemExit: 0 (line 2)"]),
        ("exit()\n", ["SystemExit (line 1)", "SystemExit: None (line 1)"]),
        (f"{GONE}raise Gone('away')\n", ["Gone: away (line 3)"]),
        ("import sys\ndef __getattr__(name):\n    sys.exit(0)\n", ["SystemExit: 0 (line 3)"]),
    ],
)
def test_a_scorer_file_that_ends_the_process_is_a_wrong_request(
    moalign: Any, own: Write, source: str, parts: list[str]
) -> None:
    file = own(source)
    ended = moalign(*SCORE)
    (error,) = ended.errors
    assert (ended.code, ended.out) == (2, "")
    assert "objective 'size'" in error and str(file) in error
    assert any(part in error for part in parts)


@pytest.mark.parametrize(
    ("body", "part"), [("__import__('sys').exit(0)", "SystemExit: 0 (line 4)"), ("raise Gone('away')", "Gone: away")]
)
def test_a_scorer_that_ends_the_process_fails_the_work(moalign: Any, own: Write, body: str, part: str) -> None:
    """The message names objective, file, line and text; the texts scored before keep their scores."""
    file = own(GONE + SIZE.format(f"if 'bb' in responses: {body}"))
    ended = moalign(*SCORE)
    (error,) = ended.errors
    assert (ended.code, ended.out) == (1, "")
    assert f"objective 'size': the scorer {file}:size raised {part}" in error
    assert "response 'bb'" in error and "the 1 of 3 scores made so far are kept" in error


def test_ctrl_c_in_a_scorer_is_an_interruption(moalign: Any, own: Write) -> None:
    own(SIZE.format("raise KeyboardInterrupt"))
    ended = moalign(*SCORE)
    assert (ended.code, ended.errors) == (130, [])


def test_a_method_of_another_package_that_ends_the_process_has_failed(
    moalign: Any, toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At import: a wrong request. In training: a failed run."""
    (tmp_path / "leaving_method.py").write_text("import os, sys\nos.write(1, b'written')\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = importlib.metadata.EntryPoint("leaving", "leaving_method:Method", registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"leaving": point})
    ended = moalign("train", "leaving")
    (error,) = ended.errors
    assert ended.code == 2 and "leaving_method:Method" in error and "SystemExit: 0" in error

    def leave(self: object, job: object) -> None:
        sys.exit(0)

    monkeypatch.setattr(type(registry.get("fixed-toy")), "train", leave)
    ended = moalign("train", "fixed-toy", "--json")
    assert (ended.code, ended.out) == (1, "") and "SystemExit: 0" in ended.err
    assert [run["status"] for run in json.loads(moalign("ls", "runs", "--json").out)["runs"]] == ["failed"]


# -- random numbers --------------------------------------------------------------------------


def test_a_scorer_that_seeds_leaves_all_generators_as_they_stood(moalign: Any, own: Write) -> None:
    import random

    import numpy as np
    import torch

    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]

    own(SEEDS)
    torch.manual_seed(7)
    before = states()
    assert moalign(*SCORE).code == 0
    assert states() == before
    assert torch.initial_seed() == 7


def test_a_method_draws_the_same_numbers_whether_a_scorer_seeds_or_not(
    moalign: Any, own: Write, toys: None, monkeypatch: pytest.MonkeyPatch, random_base: Path
) -> None:
    """Also of a plugin that draws after scoring, and where the store, as after a resume, spares the scorer's calls."""
    import random

    import numpy as np
    import torch

    def train(self: object, job: Any) -> None:
        random.seed(job.seed)
        np.random.seed(job.seed)
        torch.manual_seed(job.seed)
        job.notes["drawn"] = []
        for step in range(3):
            job.panel.score(["p"], ["a" * step])
            job.notes["drawn"].append([random.random(), float(np.random.rand()), float(torch.rand(1))])

    monkeypatch.setattr(type(registry.get("toy")), "train", train)
    Path("own/task.yaml").write_text(CARD.replace("nobody/nothing", str(random_base)))

    def drawn(*options: str) -> list[list[float]]:
        ended = moalign("train", "toy", "--task", "own/task.yaml", "--no-eval", "--json", *options)
        assert ended.code == 0, ended.err
        return list(json.loads((Path(json.loads(ended.out)["run"]) / "run.json").read_text())["notes"]["drawn"])

    own(SIZE.format("pass"))
    plain = drawn("--results", "plain")
    own(SEEDS)
    assert drawn("--results", "seeds") == plain
    assert drawn("--results", "seeds", "--set", "steps=4") == plain


# -- names -----------------------------------------------------------------------------------


def test_no_table_has_a_column_that_an_objective_could_take(moalign: Any, toys: None) -> None:
    """Whatever a table has beside the objectives' own columns is a name that a card may not use."""
    import pandas as pd

    import moalign as package

    run = json.loads(moalign("train", "toy", "--json").out)["run"]
    handle = package.load(run)
    Path("in.jsonl").write_text('{"prompt": "how do i make soup ?", "response": "r"}\n')
    assert moalign("score", "--task", "sandbox", "--in", "in.jsonl", "--out", "scores.parquet").code == 0
    assert handle.evaluation is not None
    tables = [handle.to_frame(), handle.evaluation.to_frame(), pd.read_parquet("scores.parquet")]
    tables += [pd.read_parquet(path) for path in Path(run).glob("*.parquet")]
    columns = {column for table in tables for column in table.columns} - set(handle.objectives)
    names = {f"helpfulness{column.removeprefix('harmlessness')}" if "harm" in column else column for column in columns}
    assert {"prompt", "response", "preference", "finished", "helpfulness_normalised", "helpfulness_raw"} <= names
    card = CARD.replace('kind: python, function: "scorers.py:size"', "kind: rule, rule: length, options: {target: 9}")
    card = card.replace("size", "helpfulness").replace("name: brevity", "name: NAME").replace("brevity:", "NAME:")
    assert set(taken(["helpfulness", *names])) == names
    for name in ("prompt", "helpfulness_raw"):
        Path("card.yaml").write_text(card.replace("NAME", name))
        ended = moalign("score", "--task", "card.yaml", "--in", "in.jsonl")
        (error,) = ended.errors
        assert ended.code == 2
        assert error.startswith(f"card.yaml:7: objectives.1.name: found {name!r}; ") and "choose another" in error


def test_init_refuses_the_name_of_a_column(moalign: Any) -> None:
    ended = moalign("init", "fresh", "--objectives", "brevity,brevity_raw,prompt")
    assert ended.code == 2 and not Path("fresh").exists()
    assert [error.split(";")[0] for error in ended.errors] == [
        "--objectives: found 'brevity_raw'",
        "--objectives: found 'prompt'",
    ]
