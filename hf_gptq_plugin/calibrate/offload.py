"""Bring a block into memory and send it away again, where accelerate keeps a model's weights on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from .walk import linears


def is_offloaded(model: nn.Module) -> bool:
    """Whether a part of a model is not in memory."""
    return any(parameter.is_meta for parameter in model.parameters())


class Offloaded:
    """A block whose weights accelerate has offloaded; nothing happens to one that is in memory.

    `bring` reads all of it, so that a block is read once however often it runs; `send` gives it back, with the layers
    that were quantized meanwhile read from the file that now holds them.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._hooks: dict[str, Any] = {}

    def bring(self) -> None:
        """Read the block into memory, to where its hooks would run it."""
        from accelerate.hooks import remove_hook_from_module
        from accelerate.utils import named_module_tensors, set_module_tensor_to_device

        for name, module in self.block.named_modules():
            hook = getattr(module, "_hf_hook", None)
            if not getattr(hook, "offload", False):
                continue
            assert hook is not None
            tensors = [n for n, t in named_module_tensors(module, recurse=hook.place_submodules) if t.is_meta]
            values = {n: hook.weights_map[n] for n in tensors}
            remove_hook_from_module(module)
            if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                # accelerate leaves the method on the module itself: a cycle that would outlive its replacement.
                del module.forward
            for tensor, value in values.items():
                # A copy: what safetensors returns may be a view of the whole mapped file.
                set_module_tensor_to_device(module, tensor, hook.execution_device, value=value.clone())
            self._hooks[name] = hook

    def send(self, file: Path, quantized: Mapping[str, QuantLinear], prefix: str) -> None:
        """Give the block's weights back to the disk.

        Args:
            file: safetensors with the quantized layers' tensors.
            quantized: layers that were replaced since `bring`, by name in the block.
            prefix: what stands before a layer's name in the file, e.g. "model.layers.0.".
        """
        for name in self._hooks.keys() & quantized.keys():
            device = self._hooks.pop(name).execution_device
            attach(self.block, name, quantized[name], file, prefix + name, device)
        self.back()

    def back(self) -> None:
        """Give the block's weights back as they came."""
        from accelerate.hooks import add_hook_to_module

        for name, hook in self._hooks.items():
            add_hook_to_module(self.block.get_submodule(name), hook)
        self._hooks.clear()

    @property
    def active(self) -> bool:
        """Whether anything was brought, or would be."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.block.modules())
        return bool(self._hooks) or any(getattr(hook, "offload", False) for hook in hooks)


def attach(root: nn.Module, name: str, layer: QuantLinear, file: Path, full: str, device: Any) -> None:
    """Replace a module by a QuantLinear whose tensors stay in a file and are read when it runs.

    Args:
        root, name: where it goes.
        layer: its shape and kind; its tensors may be on the meta device.
        file: safetensors.
        full: the layer's name in the file.
        device: where it runs.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    names = set(FileTensors(file, full))
    new = QuantLinear(
        layer.in_features, layer.out_features, layer.spec, "bias" in names, layer.scales.dtype, layer.dtype,
        has_g_idx="g_idx" in names,
    )  # fmt: skip
    new.train(layer.training)
    add_hook_to_module(new, AlignDevicesHook(device, offload=True, weights_map=FileTensors(file, full)))
    new.finalize(name=full)
    root.set_submodule(name, new)


class FileTensors(Mapping[str, Tensor]):
    """The tensors of one module in a safetensors file, read at each access.

    Args:
        file: safetensors.
        module: the module's name in it.
    """

    def __init__(self, file: Path, module: str) -> None:
        self._file = file
        self._prefix = f"{module}."

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file, framework="pt") as tensors:
            return tensors.get_tensor(self._prefix + name).clone()

    def __iter__(self) -> Iterator[str]:
        with safe_open(self._file, framework="pt") as tensors:
            names = [key.removeprefix(self._prefix) for key in tensors.keys() if key.startswith(self._prefix)]
        return iter(names)

    def __len__(self) -> int:
        return len(list(iter(self)))


def execution_device(module: nn.Module) -> torch.device:
    """Where a block runs: where its hooks put it, or where its weights are."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def blocks_on_disk(model: nn.Module, device: Any) -> dict[str, Any]:
    """A device map that leaves the model's blocks on disk and puts everything else on a device.

    Args:
        model: may be on the meta device.
        device: for what is no block.
    """
    blocks = {
        f"{name}.{i}"
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        for i, block in enumerate(modules)
        if linears(block)
    }
    outermost = {b for b in blocks if not any(b.startswith(f"{other}.") for other in blocks)}
    found: dict[str, Any] = {}

    def place(name: str, module: nn.Module) -> None:
        if name in outermost:
            found[name] = "disk"
        elif not name or any(b.startswith(f"{name}.") for b in outermost):
            buffers = set(dict(module.named_buffers(recurse=False))) - module._non_persistent_buffers_set
            for leaf in (*dict(module.named_parameters(recurse=False)), *sorted(buffers)):
                found[f"{name}.{leaf}" if name else leaf] = device
            for child_name, child in module.named_children():
                place(f"{name}.{child_name}" if name else child_name, child)
        else:
            found[name] = device

    place("", model)
    return found
