"""Where things are broken: a work folder with a tiny base and finished runs, and a fresh folder for each case."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import warm

CHECKOUT = Path(__file__).resolve().parents[2]
TRAINED = ("sft", "ric", "modpo", "pcm", "best-of-n")
"""Methods of the finished runs: one adapter, one with stages, one for each preference, a control model, none."""


class Bench:
    """The work folder of one session; what it holds is made once."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work.resolve(), seed
        self.work.mkdir(parents=True, exist_ok=True)
        self.base = self.work / "base"

    def rng(self, part: str, number: int) -> random.Random:
        """Return the generator of one case: the same for the same seed, part and number."""
        return random.Random(f"{self.seed}/{part}/{number}")

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield an empty folder, removed afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.work))
        place = folder / "here"
        place.mkdir()
        try:
            yield place
        finally:
            for path in folder.rglob("*"):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
            shutil.rmtree(folder)

    @property
    def small(self) -> list[str]:
        """Options that make the sandbox a task of seconds, on the tiny base."""
        if not self.base.exists():
            assert warm.call(lambda: make_base(self.base), (), self.work).code == 0
        return _sets(
            f"task.model={self.base}",
            "task.grid=3",
            "task.evaluation.prompts=8",
            "task.evaluation.samples=1",
            "task.evaluation.bootstrap=100",
            "task.splits={train: 0.1, calibration: 0.1, eval: 0.8}",
            "task.pool.prompts=24",
            "task.pool.per_prompt=2",
            "task.pool.calibration_per_prompt=2",
            "task.generation.max_new_tokens=12",
        )

    def train(self, method: str) -> list[str]:
        """Return the command that trains a method in seconds."""
        from moalign.methods import registry

        quick = registry.get(method).quick
        return ["train", method, *self.small, *_sets(*(f"{key}={json.dumps(value)}" for key, value in quick.items()))]

    def compare(self) -> list[str]:
        """Return the command of a comparison of seconds."""
        return [
            "compare",
            "--methods",
            "sft,best-of-n",
            *self.small,
            *_sets("sft.steps=2", "sft.batch=4", "best-of-n.n=2"),
        ]

    def reward(self) -> list[str]:
        """Return the command that trains a reward model in seconds."""
        more = _sets("steps=4", "batch=12", "checkpoint_every=1", "max_tokens=48")
        return ["reward", "train", "--task", "sandbox", "--loss", "more", *self.small, *more]

    def finished(self) -> Path:
        """Return a folder whose ``results`` hold finished runs, a comparison and a reward model."""
        ready = self.work / "ready"
        if not (ready / "whole").exists():
            shutil.rmtree(ready, ignore_errors=True)
            ready.mkdir()
            for command in (*map(self.train, TRAINED), self.compare(), self.reward()):
                ended = warm.run(command, ready, seconds=300)
                assert ended.code == 0, f"{command}: {ended.err}"
            (ready / "whole").touch()
        return ready


def _sets(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


def make_base(folder: Path) -> int:
    """Make a tiny model with random weights and the sandbox's vocabulary; returns 0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moalign.tasks.sandbox.base import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.25,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return 0


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by its path; a folder's is empty."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }
