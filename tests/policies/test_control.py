"""The control model of PCM: what it reads."""

from __future__ import annotations

from pathlib import Path

import torch

from moalign.config.recipe import LoraSpec
from moalign.lm import adapters, language_model
from moalign.lm.log_probs import positions
from moalign.policies.control import Control
from moalign.policies.control_spec import ControlSpec


def test_a_small_control_model_reads_the_base_s_embeddings_whichever_expert_answers(random_base: Path) -> None:
    lm = language_model.load(str(random_base), device="cpu")
    adapters.attach(lm, LoraSpec(r=2, targets=["embed_tokens"]), 0, "expert")
    control = Control(ControlSpec(form="small", width=8), lm, 2, seed=0)
    ids = torch.tensor([[1, 9, 4, 7]])
    one = torch.ones_like(ids)
    with torch.no_grad():
        before = control.hidden(ids, one, positions(one))
        moved = {name: value + 1.0 for name, value in adapters.tensors(lm, "expert").items()}
        adapters.set_tensors(lm, moved, "expert")
        torch.testing.assert_close(control.hidden(ids, one, positions(one)), before)
