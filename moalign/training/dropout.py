"""Dropout switched off in training on ratios of probabilities."""

from __future__ import annotations

from typing import Any


def without_dropout(model: Any) -> None:
    """Make ``model`` ready to train on ratios of probabilities: dropout off, gradients as ever.

    DPO and PPO compare the policy with an earlier one (the reference, the one that sampled). Dropout on
    either side draws a random policy there: before any update the ratio would not be 1, and PPO would clip noise.
    Eval mode turns all of it off, the adapter's and what a model's own layers do by themselves, and keeps the graph.
    Only layers that store no activations but compute them again do so in training mode alone: they stay in it, as long
    as they drop nothing themselves. Call it before each forward pass of a trainer that sets the mode itself; it holds
    until the mode is set again, over the backward pass, too, in which such layers run a second time.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for layer in model.modules():
        again = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
        if again and not isinstance(getattr(layer, "dropout", None), float):
            layer.training = True  # itself, not what is inside it
