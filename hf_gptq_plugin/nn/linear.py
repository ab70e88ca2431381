"""QuantLinear: a quantized linear layer that is an `nn.Linear` to everyone else."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import native, native_cuda
from ..format.checkpoint import check_values, zero_format
from ..format.grid import QuantizedWeight, natural_groups
from ..format.spec import QuantSpec
from .ops import KernelWeight, PreparedWeight, dequantize, linear


class _Dequantized(Tensor):
    """What `QuantLinear.weight` returns: a tensor that is gone after use, so that replacing its data, as merges and
    some initialisations of adapters do, would silently change nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(
            "the weight of a quantized layer cannot be replaced: it is made from codes at every use. Adapters that "
            "begin by changing the base (PiSSA, OLoRA, CorDA, LoftQ) need a dense base: begin from "
            "init_lora_weights=True. To merge an adapter, dequantize() the base first, or fold it into the codes with "
            "hf-gptq fold"
        )


class QuantLinear(nn.Linear):
    """A linear layer `[N, K]` on GPTQ codes.

    Its parameters carry the names of the checkpoint: `qweight`, `qzeros`, `scales`, `g_idx` (absent where the
    checkpoint has none) and `bias`. After `finalize` their memory may hold the kernels' layout; whatever saves
    the module still sees canonical tensors. `weight` is a property that returns the dequantized matrix, so PEFT and
    other code written for `nn.Linear` works unchanged; replacing its data raises.

    Args:
        in_features, out_features: `K` and `N`.
        spec: how the weight is quantized.
        bias: whether there is a bias.
        scales_dtype: dtype of the stored scales.
        dtype: dtype of the bias and of `weight`.
        has_g_idx: whether the checkpoint stores g_idx.
        device: where the empty parameters are made.
    """

    qweight: nn.Parameter
    qzeros: nn.Parameter
    scales: nn.Parameter
    g_idx: nn.Parameter | None
    perm: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        bias: bool = False,
        scales_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype = torch.float32,
        has_g_idx: bool = True,
        device: torch.device | str = "meta",
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.dtype = dtype
        self.finalized = False
        self._symmetric = False
        self._natural = False
        shapes = spec.shapes(in_features, out_features)
        dtypes = {"scales": scales_dtype}
        for name, shape in shapes.items():
            value = None
            if name != "g_idx" or has_g_idx:
                value = _frozen(torch.zeros(shape, dtype=dtypes.get(name, torch.int32), device=device))
            self.register_parameter(name, value)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )
        self.register_buffer("perm", None, persistent=False)
        # Transformers initialises whatever is not marked so.
        self._is_hf_initialized = True

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> QuantLinear:
        """A finalized layer from codes that were just solved."""
        out_features, in_features = quantized.codes.shape
        layer = cls(
            in_features, out_features, quantized.spec, bias is not None, quantized.scales.dtype, dtype,
            device=quantized.codes.device,
        )  # fmt: skip
        for name, tensor in quantized.pack().items():
            setattr(layer, name, _frozen(tensor.contiguous()))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        layer.finalize()
        return layer

    def zero_format(self) -> str | None:
        """The format that the loaded zeros show, or None; see `format.checkpoint.zero_format`."""
        with _materialized(self):
            qweight = self.kernel_weight.canonical_qweight() if self.finalized else self.qweight
            return zero_format(qweight, self.qzeros, self.spec, self.out_features, self._stored_g_idx())

    def finalize(self, spec: QuantSpec | None = None, name: str = "layer") -> None:
        """Check the loaded tensors and lay them out for the kernels.

        Args:
            spec: replaces the layer's spec, where the values showed another zero format than the label.
            name: the module's name, for messages.

        Raises:
            CheckpointError: values that cannot be.
        """
        self.spec = spec or self.spec
        for parameter in self.parameters(recurse=False):
            if parameter is not self.bias:
                parameter.requires_grad_(False)  # loaders make floats trainable
        with _materialized(self) as offloaded:
            if self.finalized and not offloaded:
                self.qweight.data, self.perm = self.kernel_weight.canonical_qweight(), None
            check_values(name, self.scales, self.g_idx)
            weight = KernelWeight.from_canonical(
                self.qweight, self.qzeros, self.scales, self.g_idx, self.spec, self.in_features
            )
            self._symmetric = weight.qzeros is None
            self._natural = weight.g_idx is None
            if not offloaded:
                packed = weight.packed()
                self.qweight.data = packed.qweight
                self.perm = packed.perm
        self.finalized = True
        self.__dict__.pop("_prepared", None)

    @property
    def kernel_weight(self) -> KernelWeight:
        """The weight as the ops take it."""
        return KernelWeight(
            qweight=self.qweight,
            scales=self.scales,
            qzeros=None if self._symmetric else self.qzeros,
            g_idx=None if self._natural else self.g_idx,
            perm=self.perm,
            bits=self.spec.bits,
            group_size=self.spec.width(self.in_features),
            zero_offset=self.spec.zero_offset,
            in_features=self.in_features,
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight `[N, K]`, a new tensor in `dtype` at each call."""
        if self.qweight.device.type == "meta" and not hasattr(self, "_hf_hook"):
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        with _materialized(self):
            return dequantize(self.kernel_weight, self.in_features, self.dtype).as_subclass(_Dequantized)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`; x `[..., K]` in fp32, bf16 or fp16."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        prepared = self._prepare()
        y = None if prepared is None else prepared.multiply(x, bias)
        return linear(x, self.kernel_weight, bias) if y is None else y

    def _prepare(self) -> PreparedWeight | None:
        """What is kept for calls outside of training and tracing, or None where it cannot be."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self.finalized:
            return None
        own = self._parameters
        tensors = (*map(own.get, ("qweight", "scales", "qzeros", "g_idx")), self._buffers.get("perm"))
        kept = self.__dict__.get("_prepared")
        if kept is None or any(map(operator.is_not, tensors, kept[0])):
            self.__dict__.pop("_prepared", None)
            if not self._can_be_kept(tensors):
                return None
            kept = self.__dict__["_prepared"] = (tensors, PreparedWeight(self.kernel_weight))
        return kept[1]

    def _can_be_kept(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether tensors are the layer's own, and a kernel's: not those that are here for one call, of an offloaded
        layer or of a replica."""
        qweight, scales = tensors[:2]
        if qweight is None or scales is None or scales.dtype not in native.DTYPES:
            return False
        device, hook = qweight.device, self.__dict__.get("_hf_hook")
        if qweight.dim() == 4:
            known = native_cuda.library(device) is not None
        else:
            known = device.type == "cpu" and native.library() is not None
        return (
            known
            and not any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))
            and all(t is None or (type(t) in (Tensor, nn.Parameter) and t.device == device) for t in tensors)
        )

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense `nn.Linear` with the dequantized weight."""
        dtype = dtype or self.dtype
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        with _materialized(self):
            weight = dequantize(self.kernel_weight, self.in_features, dtype)
            dense.weight = nn.Parameter(weight)
            if self.bias is not None:
                dense.bias = nn.Parameter(self.bias.detach().to(dtype).clone())
        return dense

    def quantized_weight(self) -> QuantizedWeight:
        """Codes, scales, zeros and groups, unpacked."""
        with _materialized(self):
            tensors = {name: getattr(self, name) for name in ("qzeros", "scales")}
            return QuantizedWeight.unpack(
                qweight=self.kernel_weight.canonical_qweight(), g_idx=self._stored_g_idx(), spec=self.spec, **tensors
            )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Moves and casts; on another kind of device the codes are laid out for its kernels."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype  # as a bias goes
        self.__dict__.pop("_prepared", None)
        if self.finalized and all(p.device.type != "meta" for p in self.parameters(recurse=False)):
            packed = self.kernel_weight.packed()
            if packed.qweight is not self.qweight:
                self.qweight.data, self.perm = packed.qweight, packed.perm
        return self

    def _stored_g_idx(self) -> Tensor:
        if self.g_idx is not None:
            return self.g_idx
        return natural_groups(self.in_features, self.spec.group_size, self.scales.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.finalized:
            return
        if self.qweight.device.type != "meta":
            destination[prefix + "qweight"] = self.kernel_weight.canonical_qweight()
        if self.g_idx is None:
            # Readers of the format expect it even where it says nothing.
            destination[prefix + "g_idx"] = natural_groups(self.in_features, self.spec.group_size)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Writers may leave g_idx out where it says nothing, or not.
        given = f"{prefix}g_idx" in state_dict
        if given and self.g_idx is None:
            self.g_idx = _frozen(self._stored_g_idx())
        elif not given and self.g_idx is not None and not self.spec.desc_act:
            state_dict[f"{prefix}g_idx"] = natural_groups(self.in_features, self.spec.group_size)
        if self.finalized:
            self.qweight.data, self.perm = self.kernel_weight.canonical_qweight(), None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.finalized:
            self.finalize(name=prefix.rstrip("."))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.spec.bits}, group_size={self.spec.group_size}, sym={self.spec.sym}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _materialized(layer: nn.Module) -> Iterator[bool]:
    """Bring parameters that accelerate offloaded back for the length of the block; yields whether it had to."""
    offloaded = any(p.device.type == "meta" for p in layer.parameters(recurse=False))
    if not offloaded:
        yield False
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield True
