"""Activation checkpointing by either of its names: Transformers renamed the methods in 5.24."""

from __future__ import annotations

from typing import Any


def enable_checkpointing(model: Any, **options: Any) -> None:
    """Let a model's blocks compute their activations again in the backward pass.

    Args:
        model: a Transformers model, or a PEFT model around one.
        **options: of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ValueError: a model that cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no activation checkpointing; train without --checkpointing")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def disable_checkpointing(model: Any) -> None:
    """The opposite of `enable_checkpointing`."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
