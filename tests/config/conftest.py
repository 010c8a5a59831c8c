"""A small recipes folder of its own: the real recipes may change, these tests may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.config import find

CARD = """\
name: demo
kind: text
description: a task for tests
objectives:
  - name: length
    kind: rule
    rule: length
  - name: polite
    kind: hf-classifier
    model: judge
reference_point: [0, 0]
sensitivity_point: [-0.5, -0.5]
model: base
data:
  prompts:
    path: prompts.jsonl
"""

RECIPE = """\
method: ric
task: demo
seed: 7
policy:
  lora: {r: 8}
config:
  lr: 1e-4
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``recipes/demo/{task,ric}.yaml``, the current directory set beside it; returns the folder ``recipes``."""
    root = tmp_path / "recipes"
    demo = root / "demo"
    demo.mkdir(parents=True)
    (demo / "task.yaml").write_text(CARD)
    (demo / "ric.yaml").write_text(RECIPE)
    (demo / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    for folder in ("base", "judge"):
        (demo / folder).mkdir()
    monkeypatch.setattr(find, "recipes_root", lambda: root)
    monkeypatch.chdir(tmp_path)
    return root
