"""The layouts in which quantized weights lie on disk: one module's tensors to a `QuantizedWeight` and back.

All hold the same numbers, `weight[n, k] = (code[n, k] - zero[g, n]) * scale[g, n]`, packed another way:

=================== ============================ =============================== =================== ===============
layout              codes                        zeros                           scales              groups
=================== ============================ =============================== =================== ===============
gptq (v1), gptq_v2  qweight `[K·b/32, N]`        qzeros `[G, N·b/32]`; v1: z - 1 scales `[G, N]`     g_idx `[K]`
awq                 qweight `[K, N/8]`, mixed    qzeros `[G, N/8]`, mixed        scales `[G, N]`     natural
compressed-tensors  weight_packed `[N, K/(32/b)]` weight_zero_point              weight_scale        weight_g_idx
                                                 `[N/(32/b), G]`, or none        `[N, G]`            `[K]`, or none
=================== ============================ =============================== =================== ===============

`b` are bits, quotients are rounded up; GPTQ cuts one bit stream into words (3-bit codes may straddle two), the others
leave a word's unused bits zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..format import packing
from ..format.checkpoint import check_shapes, check_values
from ..format.grid import QuantizedWeight, natural_groups
from ..format.spec import WORD, CheckpointError, QuantSpec

# Column `8 w + i` of a weight is nibble `AWQ_ORDER.index(i)` of word `w` (the order of AutoAWQ's GEMM kernel).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Gptq:
    """GPTQ as AutoGPTQ and GPTQModel write it.

    Args:
        fmt: "gptq" or "gptq_v2".
    """

    leaves = ("qweight", "qzeros", "scales", "g_idx")
    required = ("qweight", "qzeros", "scales")

    def __init__(self, fmt: str) -> None:
        self.name = fmt

    def read(self, module: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
        """The weight of a module. `K` is what g_idx, or else whole words of codes, say."""
        qweight, scales = tensors["qweight"], tensors["scales"]
        g_idx = tensors.get("g_idx")
        in_features = g_idx.numel() if g_idx is not None else qweight.shape[0] * WORD // spec.bits
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items()}
        check_shapes(module, shapes, spec, in_features, scales.shape[-1])
        check_rest(module, qweight[-1], spec, in_features)
        check_values(module, scales, g_idx)
        group = natural_groups(in_features, spec.group_size) if g_idx is None else g_idx
        return QuantizedWeight.unpack(qweight, tensors["qzeros"], scales, group.int(), spec)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """A module's tensors.

        Raises:
            CheckpointError: a zero that this version of the format has no room for.
        """
        try:
            return replace(weight, spec=replace(weight.spec, checkpoint_format=self.name)).pack()
        except ValueError as error:
            other = "gptq" if self.name == "gptq_v2" else "gptq_v2"
            raise CheckpointError(f"{module}.qzeros: {error}; convert to {other} instead") from None

    def config(self, specs: Mapping[str, QuantSpec], dense: list[str]) -> dict[str, Any]:
        """`quantization_config` for quantized modules and linear layers that are not."""
        usual = _usual(specs)
        dynamic: dict[str, dict[str, Any]] = {_rule("-", name): {} for name in dense if name != "lm_head"}
        for name, spec in specs.items():
            differing = {f: v for f, v in _numbers(spec).items() if v != _numbers(usual)[f]}
            if differing:
                dynamic[_rule("+", name)] = differing
        out = {**_numbers(usual), "quant_method": "gptq", "checkpoint_format": self.name}
        out |= {"lm_head": any(name.rpartition(".")[2] == "lm_head" for name in specs)}
        return {**out, "dynamic": dynamic} if dynamic else out


class Awq:
    """AutoAWQ's "gemm" version: 4 bit, natural groups."""

    name = "awq"
    leaves = required = ("qweight", "qzeros", "scales")

    def read(self, module: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
        """The weight of a module."""
        qweight, qzeros, scales = (tensors[leaf] for leaf in self.leaves)
        in_features, out_features = qweight.shape[0], qweight.shape[-1] * 8
        groups = spec.groups(in_features)
        expected = {"qweight": (in_features, out_features // 8), "qzeros": (groups, out_features // 8)}
        expected["scales"] = (groups, out_features)
        for leaf, shape in expected.items():
            if tuple(tensors[leaf].shape) != shape:
                raise CheckpointError(
                    f"{module}.{leaf} has shape {tuple(tensors[leaf].shape)}; an AWQ weight of {in_features} inputs "
                    f"and {out_features} outputs in groups of {spec.group_size} needs {shape}: correct "
                    "quantization_config"
                )
        check_values(module, scales, None)
        group = natural_groups(in_features, spec.group_size)
        return QuantizedWeight(_unmixed(qweight).T.contiguous(), scales, _unmixed(qzeros).int(), group, spec)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """A module's tensors.

        Raises:
            CheckpointError: what AWQ cannot hold.
        """
        spec, (out_features, in_features) = weight.spec, weight.codes.shape
        width = spec.width(in_features)
        reason = ""
        if spec.bits != 4:
            reason = f"it has {spec.bits} bits, and AWQ only 4"
        elif not torch.equal(weight.group, natural_groups(in_features, spec.group_size)):
            reason = "its groups are in act-order (g_idx), and AWQ has only natural ones"
        elif in_features % width or out_features % 8:
            reason = (
                f"AWQ needs in_features={in_features} in whole groups of {width} and out_features={out_features} in "
                "whole eights"
            )
        elif int(weight.zeros.max()) > 15:
            reason = "it has zero points of 16, and AWQ's end at 15"
        elif not bool(torch.isfinite(weight.scales.half()).all()):
            reason = f"it has scales up to {float(weight.scales.abs().max()):.3g}, and AWQ's are float16"
        if reason:
            raise CheckpointError(f"{module} cannot be written as AWQ: {reason}")
        return {
            "qweight": _mixed(weight.codes.T),
            "qzeros": _mixed(weight.zeros),
            "scales": weight.scales.to(torch.float16),
        }

    def config(self, specs: Mapping[str, QuantSpec], dense: list[str]) -> dict[str, Any]:
        """`quantization_config`. Groups must be the same everywhere."""
        sizes = {spec.group_size for spec in specs.values()}
        if len(sizes) > 1:
            raise CheckpointError(f"AWQ has one group_size for all modules, and these have {sorted(sizes)}")
        out: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": sizes.pop(), "zero_point": True}
        if any(name.rpartition(".")[2] == "lm_head" for name in specs):
            out["lm_head"] = True
        return {**out, "version": "gemm", "modules_to_not_convert": dense or None}


class PackQuantized:
    """compressed-tensors' "pack-quantized", as llm-compressor writes it and vLLM serves it."""

    name = "compressed-tensors"
    leaves = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    required = ("weight_packed", "weight_scale", "weight_shape")

    def read(self, module: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
        """The weight of a module."""
        shape = tensors["weight_shape"].tolist()
        if tensors["weight_shape"].dim() != 1 or len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(f"{module}.weight_shape is {shape}; it must hold out_features and in_features")
        out_features, in_features = shape
        each, groups = WORD // spec.bits, spec.groups(in_features)
        expected: dict[str, tuple[int, ...]] = {
            "weight_packed": (out_features, -(-in_features // each)),
            "weight_scale": (out_features, groups),
            "weight_zero_point": (-(-out_features // each), groups),
            "weight_g_idx": (in_features,),
        }
        for leaf, wanted in expected.items():
            if leaf in tensors and tuple(tensors[leaf].shape) != wanted:
                raise CheckpointError(
                    f"{module}.{leaf} has shape {tuple(tensors[leaf].shape)}; weight_shape={shape}, "
                    f"num_bits={spec.bits} and group_size={spec.group_size} need {wanted}"
                )
        scales = tensors["weight_scale"].T.contiguous()
        group = natural_groups(in_features, spec.group_size)
        if "weight_g_idx" in tensors:
            group = tensors["weight_g_idx"]
        check_values(module, scales, group)
        group = group.int()  # only now: more would wrap around
        if spec.sym:
            zeros = torch.full(scales.shape, 2 ** (spec.bits - 1), dtype=torch.int32)
        else:
            zeros = _cells(tensors["weight_zero_point"].T, spec.bits, out_features).int()
        return QuantizedWeight(_cells(tensors["weight_packed"], spec.bits, in_features), scales, zeros, group, spec)

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """A module's tensors.

        Raises:
            CheckpointError: what the layout cannot hold.
        """
        spec, (out_features, in_features) = weight.spec, weight.codes.shape
        if in_features % spec.width(in_features):
            raise CheckpointError(
                f"{module} cannot be written as compressed-tensors: its last group of {spec.group_size} is ragged "
                f"(in_features={in_features})"
            )
        out = {
            "weight_packed": _words(weight.codes, spec.bits),
            "weight_scale": weight.scales.T.contiguous(),
            "weight_shape": torch.tensor([out_features, in_features]),
        }
        if not spec.sym:
            if int(weight.zeros.max()) > spec.maxq:
                raise CheckpointError(
                    f"{module} cannot be written as compressed-tensors: it has zero points of {spec.maxq + 1}, and "
                    f"they end at {spec.maxq}"
                )
            out["weight_zero_point"] = _words(weight.zeros, spec.bits).T.contiguous()
        if spec.desc_act:
            out["weight_g_idx"] = weight.group
        return out

    def config(self, specs: Mapping[str, QuantSpec], dense: list[str]) -> dict[str, Any]:
        """`quantization_config`: one group of modules for each kind of spec, the commonest for every other linear."""
        kinds: dict[QuantSpec, list[str]] = {}
        for name, spec in specs.items():
            kinds.setdefault(spec, []).append(name)
        usual = _usual(specs)
        groups = {}
        for number, (spec, names) in enumerate(sorted(kinds.items(), key=lambda kind: kind[0] != usual)):
            channel = spec.group_size == -1
            weights = {
                "num_bits": spec.bits, "type": "int", "symmetric": spec.sym, "dynamic": False,
                "strategy": "channel" if channel else "group", "group_size": None if channel else spec.group_size,
                "actorder": "group" if spec.desc_act else None, "observer": "minmax", "block_structure": None,
                "observer_kwargs": {},
            }  # fmt: skip
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if spec == usual else names,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": dense,
            "kv_cache_scheme": None,
        }


class Dense:
    """No quantization: the weight in a float dtype.

    Args:
        dtype: of the weights.
    """

    name = "dense"
    leaves = required = ("weight",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The weight `[N, K]`, rounded once."""
        return {"weight": torch.cat([weight.rows(rows).dequantize(self.dtype) for rows in weight.slabs()])}

    def config(self, specs: Mapping[str, QuantSpec], dense: list[str]) -> None:
        """None: a dense checkpoint has none."""


Layout = Gptq | Awq | PackQuantized | Dense
TARGETS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "dense")


def layout(name: str, dtype: torch.dtype = torch.bfloat16) -> Layout:
    """A layout by name.

    Args:
        name: one of `TARGETS`.
        dtype: of dense weights.

    Raises:
        ValueError: another name.
    """
    if name in ("gptq", "gptq_v2"):
        return Gptq(name)
    known: dict[str, Layout] = {"awq": Awq(), "compressed-tensors": PackQuantized(), "dense": Dense(dtype)}
    if name not in known:
        if name == "gguf":
            raise ValueError("layout 'gguf' is one file, not a folder's; call convert.gguf.write_gguf")
        raise ValueError(f"layout {name!r} is not supported; use one of {', '.join((*TARGETS, 'gguf'))}")
    return known[name]


def check_rest(module: str, row: Tensor, spec: QuantSpec, in_features: int) -> None:
    """Check that GPTQ's words hold nothing behind the last input: as many words can hold some inputs more.

    Args:
        row: the last of qweight, int32 `[N]`.
        in_features: `K`, by g_idx.

    Raises:
        CheckpointError: they do, so that g_idx is too short.
    """
    used = (in_features * spec.bits - 1) % WORD + 1
    if WORD - used >= spec.bits and bool((row >> used != 0).any()):
        raise CheckpointError(
            f"{module}.g_idx has {in_features} entries, but {module}.qweight holds codes of more inputs: the "
            "checkpoint is damaged, fetch it again"
        )


def awq_spec(config: Mapping[str, Any]) -> QuantSpec:
    """The spec in an AWQ `quantization_config`.

    Raises:
        CheckpointError: a version or a width that is not read.
    """
    version = str(config.get("version", "gemm")).lower()
    bits = config.get("bits", config.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(f'AWQ version={version!r} with bits={bits!r} is not read; accepted: "gemm" with 4')
    try:
        # `zero_point` says whether zeros were searched; they are stored in either case.
        return QuantSpec(4, config.get("group_size", config.get("q_group_size", 128)), sym=False)
    except ValueError as error:
        raise CheckpointError(f"quantization_config: {error}") from None


def pack_quantized_specs(config: Mapping[str, Any]) -> dict[str, tuple[list[str], QuantSpec]]:
    """The groups of modules in a compressed-tensors `quantization_config`: name to targets and spec.

    Raises:
        CheckpointError: naming the field that is not read as GPTQ.
    """
    fmt = config.get("format")
    if fmt != "pack-quantized":
        raise CheckpointError(f'compressed-tensors format={fmt!r} is not read; accepted: "pack-quantized"')
    for name in ("kv_cache_scheme", "transform_config"):
        if config.get(name):
            raise CheckpointError(f"compressed-tensors {name}={config[name]!r} has no counterpart in GPTQ")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"compressed-tensors sparsity_config={sparsity!r} has no counterpart in GPTQ")
    found: dict[str, tuple[list[str], QuantSpec]] = {}
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"compressed-tensors config_groups={groups!r} must hold at least one group")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"compressed-tensors config_groups.{name}.weights={weights!r} must be a JSON object")
        if group.get("input_activations"):
            raise CheckpointError(f"compressed-tensors config_groups.{name} quantizes activations; GPTQ does not")
        strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise CheckpointError(
                f"compressed-tensors config_groups.{name}.weights has type={weights.get('type')!r} and "
                f"strategy={strategy!r}; accepted: int, and group or channel"
            )
        try:
            spec = QuantSpec(
                bits=weights.get("num_bits"),  # type: ignore[arg-type]
                group_size=-1 if strategy == "channel" else weights.get("group_size"),  # type: ignore[arg-type]
                sym=weights.get("symmetric", True),
                desc_act=weights.get("actorder") in ("group", True),
            )
        except ValueError as error:
            raise CheckpointError(f"compressed-tensors config_groups.{name}.weights: {error}") from None
        targets = group.get("targets") or []
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(
                f"compressed-tensors config_groups.{name}.targets={targets!r} must be a list of names"
            )
        found[name] = (targets, spec)
    return found


def _mixed(values: Tensor) -> Tensor:
    """Integers 0 to 15 `[R, N]` to AWQ's words `[R, N / 8]`."""
    cells = values.to(torch.uint8).unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)]
    return packing.pack_stream(cells.flatten(-2), 4)


def _unmixed(words: Tensor) -> Tensor:
    """Inverse of `_mixed`, uint8."""
    cells = packing.unpack_stream(words, 4, words.shape[-1] * 8).unflatten(-1, (-1, 8))
    back = torch.tensor(AWQ_ORDER).argsort().tolist()
    return cells[..., back].flatten(-2)


def _words(values: Tensor, bits: int) -> Tensor:
    """Codes `[R, L]` to words `[R, ceil(L / (32 // bits))]`: as many whole codes to a word as fit."""
    each = WORD // bits
    cells = torch.nn.functional.pad(values, (0, -values.shape[-1] % each)).unflatten(-1, (-1, each))
    out = torch.zeros(cells.shape[:-1], dtype=torch.int64)
    for i in range(each):
        out |= cells[..., i].to(torch.int64) << i * bits
    return out.to(torch.int32)


def _cells(words: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `_words`, uint8 `[R, length]`."""
    each = WORD // bits
    cells = torch.empty(*words.shape, each, dtype=torch.uint8)
    for i in range(each):
        cells[..., i] = (words >> i * bits) & (2**bits - 1)
    return cells.flatten(-2)[..., :length]


def _numbers(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym, "desc_act": spec.desc_act}


def _usual(specs: Mapping[str, QuantSpec]) -> QuantSpec:
    """The commonest spec; the first of those."""
    found = list(specs.values())
    return max(dict.fromkeys(found), key=found.count)


def _rule(sign: str, module: str) -> str:
    """A key of `dynamic` that matches one module's name."""
    return f"{sign}:^{re.escape(module)}$"
