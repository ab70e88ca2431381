"""A device for tensors on a machine that has none: memory of the CPU that refuses to meet it.

`Elsewhere` tensors report the device "elsewhere". An operation that gets tensors of both devices raises, as CUDA's do,
but for copies between them, numbers (tensors without a dimension) and indices. So does NumPy's view of one. What code
written for the CPU forgets to move shows here. Import it first and in a process of its own: it registers a backend with
torch, and `torch.tensor` and safetensors learn of it.
"""

from __future__ import annotations

import types
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class _Module(types.ModuleType):
    """What torch asks a backend's module for."""

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None: ...


_setup_privateuseone_for_python_backend(NAME, _Module(NAME))


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class Elsewhere(Tensor):
    """A tensor of that device, held by one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {NAME} to numpy")

    def data_ptr(self) -> int:
        raise RuntimeError(f"native code asks for the address of a tensor on {NAME}")

    def tolist(self) -> Any:
        return self.inner.tolist()

    def as_subclass(self, cls: Any) -> Elsewhere:
        return self

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Elsewhere({self.inner!r})"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    elsewhere = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    checked = [args[0], *args[2:3]] if name in INDEXING else [] if name in COPIES else tensors
    kinds = {
        isinstance(t, Elsewhere) for t in checked if isinstance(t, Tensor) and (t.dim() or isinstance(t, Elsewhere))
    }
    if len(kinds) > 1:
        raise RuntimeError(
            f"{name} gets tensors on the CPU and {NAME}: {[(type(t).__name__, *t.shape) for t in tensors]}"
        )
    to = elsewhere
    if kwargs.get("device") is not None:
        to = _is_elsewhere(kwargs["device"])
        if to and kwargs.get("generator") is not None:
            raise RuntimeError(f"{name} on {NAME} gets a generator of the CPU")
        kwargs = {**kwargs, "device": torch.device("cpu")} if to else kwargs

    def held(value: Any) -> Any:
        return value.inner if isinstance(value, Elsewhere) else value

    with _disable_current_modes():
        out = func(*tree_map(held, args), **tree_map(held, kwargs))
    if func._schema.is_mutable and args and isinstance(out, Tensor):
        return kwargs.get("out", args[0])
    if name == "aten::equal" or not to:
        return out
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) and not isinstance(x, Elsewhere) else x, out)


class OtherDevice(TorchDispatchMode):
    """While it is entered, tensors are made on the device where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_elsewhere(kwargs.get("device")) or any(issubclass(t, Elsewhere) for t in types):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    if _is_elsewhere(device):
        return Elsewhere(_made(data, *args, **kwargs))
    return _made(data, *args, device=device, **kwargs)


def _save_file(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    with _disable_current_modes():
        plain = {k: (t.inner if isinstance(t, Elsewhere) else t).detach().clone() for k, t in tensors.items()}
        return _saved(plain, *args, **kwargs)


_made, torch.tensor = torch.tensor, _tensor
_saved, safetensors.torch.save_file = safetensors.torch.save_file, _save_file
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)
_aten = torch.library.Library("aten", "IMPL")
_aten.impl(
    "empty_strided",
    lambda size, stride, dtype=None, layout=None, device=None, pin_memory=None: Elsewhere(
        torch.empty_strided(size, stride, dtype=dtype, device="cpu")
    ),
    "PrivateUse1",
)
_aten.impl(
    "empty.memory_format",
    lambda size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None: Elsewhere(
        torch.empty(size, dtype=dtype, device="cpu")
    ),
    "PrivateUse1",
)


def move(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers on the device; in place, as `Module.to`."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Elsewhere(parameter.data), parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Elsewhere(buffer)
    return model
