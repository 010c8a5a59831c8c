"""Settings of the preference control model (PCM); importing them imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moalign.config.recipe import LoraSpec
from moalign.config.strict import Strict


class ControlSpec(Strict):
    """The preference control model: a causal model with one output for each expert."""

    form: Literal["small", "folder", "adapter"] = "small"
    """``small``: a fresh transformer that reads the base's own token embeddings, frozen, through a projection;
    ``folder``: a causal language model with the experts' tokenizer (the paper's has 160 million parameters);
    ``adapter``: a LoRA adapter on the experts' base, which needs no second model."""
    model: str | None = None
    """Folder or hub id; for ``form: folder``."""
    width: int = Field(default=64, ge=8, multiple_of=8)
    layers: int = Field(default=2, ge=1)
    """Size of ``form: small``; four heads of attention."""
    lora: LoraSpec = LoraSpec()
    """For ``form: adapter``."""
    start: Literal["preference", "uniform"] = "preference"
    """The weights at the first step: the preference's own, or equal ones for all experts that it names."""

    @model_validator(mode="after")
    def _form_fits(self) -> ControlSpec:
        if (self.form == "folder") != (self.model is not None):
            raise ValueError(f"model names the folder of form: folder, and nothing else; found form: {self.form}")
        return self
