"""Put a way of learning onto a quantized model, and take a plain quantized model off again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn.linear import QuantLinear
from .layers import LearnedCodes, LearnedGrid, LowRankCodes, PooledLora, require_rank

Made = LearnedGrid | LearnedCodes | LowRankCodes | PooledLora


@dataclass(frozen=True)
class Method:
    """A way of learning.

    Args:
        make: the layer that stands in for a `QuantLinear`, from it and options.
        options: names of the options it takes.
        rate: learning rate that suits what it learns: factors of scales, steps of codes, or an adapter's matrices.
        exported: "checkpoint" or "adapter".
    """

    make: Callable[..., Made]
    options: tuple[str, ...]
    rate: float
    exported: str = "checkpoint"


METHODS = {
    "affine": Method(LearnedGrid, (), 1e-3),
    "eetq": Method(lambda layer: LearnedGrid(layer, zeros=True), (), 1e-3),
    "ste": Method(LearnedCodes, (), 1e-3),
    "shadow": Method(
        # What a latent gains between two roundings, every * rate, must be more than decay takes of half a code, or
        # no code would ever change.
        lambda layer, every=4, cap=0.05, decay=0.01: LearnedCodes(layer, every, cap, decay),
        ("every", "cap", "decay"),
        2e-3,
    ),
    "l4q": Method(LowRankCodes, ("rank", "gamma"), 2e-4),
    "qa-lora": Method(PooledLora, ("rank", "gamma"), 2e-4, "adapter"),
}
# Steps of a zero are counted in codes: with a scale's rate it would never reach the next integer.
ZERO_RATE = 20.0


def attach(
    model: nn.Module, method: str, target_modules: Sequence[str] | str | None = None, **options: Any
) -> list[str]:
    """Replace quantized layers by ones that learn; everything else is frozen.

    Args:
        model: with `QuantLinear` layers. Changed in place.
        method: one of `METHODS`.
        target_modules: last parts of layers' names, or one regex for whole names; None for all quantized layers.
        **options: the method's.

    Returns:
        Names of the layers that learn.

    Raises:
        ValueError: an unknown method, option or target, naming what there is; or a model that already learns.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    for name in options:
        if name not in chosen.options:
            accepted = ", ".join(chosen.options) or "none"
            raise ValueError(f"method {method!r} has no option {name!r}; its options: {accepted}")
    if trained(model):
        raise ValueError(f"{next(iter(trained(model)))} already learns; export the model before attaching again")
    targets = targeted(model, target_modules)
    if "rank" in options:  # before anything is changed
        require_rank(options["rank"], narrowest(targets))
    for name, layer in targets.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(f"{name} is offloaded; training needs the layers that learn in memory")
    made = {name: chosen.make(layer, **options).train(model.training) for name, layer in targets.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _replace(model, {targets[name]: learning for name, learning in made.items()})
    return list(targets)


def _replace(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Put others in modules' places, under all names that a module has."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in others:
            model.set_submodule(name, others[module])


def targeted(model: nn.Module, wanted: Sequence[str] | str | None) -> dict[str, QuantLinear]:
    """The quantized layers that are meant, by their first name that is; arguments and errors as `attach`."""
    every = model.named_modules(remove_duplicate=False)
    found = {name: module for name, module in every if isinstance(module, QuantLinear)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no quantized layer; quantize it first")
    if wanted is None:
        return _once(found)
    suffixes = sorted({name.rpartition(".")[2] for name in found})
    if isinstance(wanted, str):
        try:
            chosen = {name: layer for name, layer in found.items() if re.fullmatch(wanted, name)}
        except re.error as error:
            raise ValueError(f"target_modules={wanted!r} is not a regex ({error})") from None
        if not chosen:
            raise ValueError(f"target_modules={wanted!r} matches no quantized layer; there are {', '.join(suffixes)}")
        return _once(chosen)
    for part in wanted:
        if not any(name == part or name.endswith(f".{part}") for name in found):
            raise ValueError(f"target_modules names {part!r}; the quantized layers are {', '.join(suffixes)}")
    return _once({n: m for n, m in found.items() if any(n == part or n.endswith(f".{part}") for part in wanted)})


def _once(layers: Mapping[str, QuantLinear]) -> dict[str, QuantLinear]:
    """Layers that have several names, by their first."""
    names: dict[QuantLinear, str] = {}
    for name, layer in layers.items():
        names.setdefault(layer, name)
    return {name: layer for layer, name in names.items()}


def narrowest(layers: Mapping[str, QuantLinear]) -> QuantLinear:
    """The layer that leaves least room for a rank."""
    return min(layers.values(), key=lambda layer: min(layer.in_features, layer.out_features))


def trained(model: nn.Module) -> dict[str, Made]:
    """The layers that learn, by name."""
    kinds = (LearnedGrid, LearnedCodes, LowRankCodes, PooledLora)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """What learns, for an optimizer of torch: zeros in a group of their own, nothing with weight decay (it would pull
    factors of scales and codes to 0).

    Args:
        model: after `attach`, or any with trainable parameters (a PEFT model).
        rate: learning rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    shifts = [p for name, p in named if name.rpartition(".")[2] == "shift"]
    rest = [p for name, p in named if name.rpartition(".")[2] != "shift"]
    groups = [{"params": rest, "lr": rate, "weight_decay": 0.0}] if rest else []
    return groups + ([{"params": shifts, "lr": rate * ZERO_RATE, "weight_decay": 0.0}] if shifts else [])


def advance(model: nn.Module) -> int:
    """Tell the layers that an optimizer has stepped. Returns how many codes changed by it."""
    return sum(layer.advance() for layer in trained(model).values() if isinstance(layer, LearnedCodes))


@torch.no_grad()
def export(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Put quantized layers back, as they were learned.

    Returns:
        Adapters by layer's name (`PooledLora.adapter`); empty for methods whose result is in the layers.
    """
    adapters = {}
    others: dict[nn.Module, nn.Module] = {}
    for name, layer in trained(model).items():
        if isinstance(layer, PooledLora):
            adapters[name] = layer.adapter()
            made = layer.layer
        elif isinstance(layer, LearnedCodes | LowRankCodes | LearnedGrid):
            made = QuantLinear.from_quantized(layer.quantized(), layer.layer.bias, layer.layer.dtype)
        others[layer] = made.train(model.training)
    _replace(model, others)
    return adapters
