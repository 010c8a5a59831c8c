"""Training that diverges ends with exit code 1 and one message, whatever trains; nothing goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.cli.main import main
from moalign.runs.run import Run

SMALL = ("batch=4", "log_every=100", "checkpoint_every=100")
PAIRS = (*SMALL, "max_tokens=48", "per_prompt=1")
STAGE = "{steps: 1, batch: 4, max_tokens: 48, checkpoint_every: 100}"
EXPERTS = "experts={steps: 1, batch: 4, max_tokens: 48, per_prompt: 1}"
CASES = {
    "sft": ("lr=1e30", "steps=6", *SMALL, "max_tokens=48"),
    "ric": ("offline.lr=1e30", "offline.steps=6", "offline.batch=4", "offline.max_tokens=48", "online_rounds=0"),
    "modpo": ("lr=1e30", "steps=6", *PAIRS),
    "dpo-lw": ("lr=1e30", "steps=6", *PAIRS),
    "raco": ("lr=1e30", "steps=6", *PAIRS, "prefs=[[0.5, 0.5]]"),
    "bapo": ("lr=1e30", "steps=6", *PAIRS, "anchors=4"),
    "spo": ("lr=1e30", "steps=12", *PAIRS, "prefs=[[0.5, 0.5]]"),
    "mrpo": ("lr=1e30", "steps=6", *PAIRS, "references=[]"),
    "few-shot-steer": ("lr=1e30", "steps=6", *SMALL, "max_tokens=48", "encoder={steps: 2, users: 4, width: 8}"),
    "cpo": ("cdpo.lr=1e30", "cdpo.steps=6", "cdpo.batch=4", "cdpo.max_tokens=48", f"cpsft={STAGE}", "per_prompt=1"),
    "mo-odpo": ("lr=1e30", "steps=6", *SMALL, "warmup=0"),
    "moc": ("lr=1e30", "steps=6", *SMALL, "groups=2"),
    "grpo": ("lr=1e30", "steps=6", *SMALL, "groups=2", "samples=2"),
    "morlhf": ("lr=1e30", "steps=6", *SMALL, "groups=2"),
    "pd-morl": ("lr=1e30", "steps=6", *SMALL, "groups=2"),
    "maxmin-rlhf": ("lr=1e30", "steps=6", *SMALL, "pairs=8", "starts=1"),
    "pcm": ("lr=1e30", "steps=6", *SMALL, "control={width: 16, layers: 1}", EXPERTS),
}
"""Step 1 moves the weights to 1e30, and step 2 is the first that computes with them. Trainers of our own look at the
weights after each step; those of trl meet them in the next loss."""
ONLINE = ("mo-odpo", "moc", "grpo", "morlhf", "pd-morl", "maxmin-rlhf", "pcm")


def diverges(capsys: pytest.CaptureFixture[str], results: Path, method: str, *sets: str) -> str:
    """Train by the command line, with all that must hold of a training that diverges; returns the message."""
    words = [word for text in sets for word in ("--set", text)]
    assert main(["train", method, "--results", str(results), *words]) == 1
    message = [line for line in capsys.readouterr().err.splitlines() if "has diverged" in line]
    (path,) = (results / "runs").glob(f"*/{method}/*")
    run = Run.load(path)
    assert len(message) == 1 and (run.status, run.record.error) == (
        "failed",
        message[0].replace("error: ", "WorkError: "),
    )
    assert not list(path.glob("adapter/*")) and not list(path.glob("checkpoints/*/step-*"))
    return message[0]


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("sft", "mo-odpo") else pytest.mark.slow) for name in CASES]
)
def test_it_stops_at_the_step_that_diverges_and_so_does_the_same_command_again(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    first = diverges(capsys, tmp_path, method, *small_task, *CASES[method])
    found = ", step 1: the norm of the weights is " if method in ONLINE else ", step 2: the "
    assert f"{method}: phase " in first and found in first and (" is inf, " in first or " is nan, " in first)
    assert diverges(capsys, tmp_path, method, *small_task, *CASES[method]) == first


@pytest.mark.slow
def test_weights_of_no_use_are_not_saved_at_the_end(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was computed with the last step's weights yet."""
    settings = ("lr=1e30", "steps=1", "batch=4", "max_tokens=48")
    assert "tensors of weights are not finite" in diverges(capsys, tmp_path, "sft", *small_task, *settings)


def test_weights_of_no_use_are_in_no_checkpoint(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [text for text in CASES["sft"] if not text.startswith("checkpoint_every")]
    message = diverges(capsys, tmp_path, "sft", *small_task, *settings, "checkpoint_every=1")
    assert ", step 1: " in message and "tensors of weights are not finite" in message
