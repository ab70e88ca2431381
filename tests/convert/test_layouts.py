"""Layouts of other readers: against compressed-tensors' own packer, and AWQ by its rule, word by word."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hf_gptq_plugin.convert.layouts import Awq, Gptq, PackQuantized, awq_spec, layout, pack_quantized_specs
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec


def weight(n: int, k: int, **fields: Any) -> QuantizedWeight:
    spec = QuantSpec(**{"bits": 4, "group_size": 32, "sym": False, **fields})
    groups = spec.groups(k)
    low, high = spec.zero_range
    zeros = torch.randint(low, high + 1, (groups, n), dtype=torch.int32)
    if spec.sym:
        zeros = torch.full_like(zeros, 2 ** (spec.bits - 1))
    group = natural_groups(k, spec.group_size)
    if spec.desc_act:
        group = group[torch.randperm(k)]
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8)
    return QuantizedWeight(codes, (torch.rand(groups, n) + 0.1).half(), zeros, group, spec)


def same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.zeros, b.zeros)
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.group, b.group)


def test_awq_words() -> None:
    w = weight(16, 64)
    packed = Awq().write("m", w)
    # AutoAWQ's rule, one nibble at a time: nibble i of word j of a row is column 8 j + order[i].
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for k in range(64):
        for j in range(2):
            word = 0
            for i in range(8):
                word |= int(w.codes[8 * j + order[i], k]) << (4 * i)
            assert int(packed["qweight"][k, j]) & 0xFFFFFFFF == word
    for g in range(2):
        nibbles = [(int(packed["qzeros"][g, 1]) >> (4 * i)) & 15 for i in range(8)]
        assert nibbles == [int(w.zeros[g, 8 + order[i]]) for i in range(8)]
    same(Awq().read("m", packed, QuantSpec(4, 32, sym=False)), w)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sym", "desc_act"), [(True, False), (False, False), (True, True), (False, True)])
def test_pack_quantized_is_compressed_tensors_own(bits: int, sym: bool, desc_act: bool) -> None:
    packer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="comes with vLLM")
    w = weight(24, 96, bits=bits, sym=sym, desc_act=desc_act)
    packed = PackQuantized().write("m", w)
    signed = (w.codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed["weight_packed"], packer.pack_to_int32(signed, bits))
    assert packed["weight_shape"].tolist() == [24, 96]
    assert torch.equal(packed["weight_scale"], w.scales.T)
    if sym:
        assert "weight_zero_point" not in packed
    else:
        zeros = (w.zeros.T - 2 ** (bits - 1)).to(torch.int8).contiguous()
        assert torch.equal(packed["weight_zero_point"], packer.pack_to_int32(zeros, bits, packed_dim=0))
    same(PackQuantized().read("m", packed, w.spec), w)


def test_pack_quantized_decompresses_to_the_same_weight() -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base", reason="comes with vLLM")
    from compressed_tensors.quantization import QuantizationScheme

    w = weight(24, 96)
    config = PackQuantized().config({"m": w.spec}, [])
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    back = base.PackedQuantizationCompressor.decompress(PackQuantized().write("m", w), scheme)
    torch.testing.assert_close(back["weight"].float(), w.dequantize(), rtol=1e-3, atol=0)  # fp16 products


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_gptq_both_ways(fmt: str) -> None:
    w = weight(32, 80, bits=3, desc_act=True)
    spec = QuantSpec(3, 32, sym=False, desc_act=True, checkpoint_format=fmt)
    same(Gptq(fmt).read("m", Gptq(fmt).write("m", w), spec), w)


def test_a_zero_without_room() -> None:
    w = weight(32, 64)
    w.zeros[1, 3] = 0
    assert int(Gptq("gptq_v2").write("m", w)["qzeros"].numel())
    with pytest.raises(CheckpointError, match=r"m\.qzeros: zero point 0 .* convert to gptq_v2 instead"):
        Gptq("gptq").write("m", w)
    w.zeros[1, 3] = 16
    with pytest.raises(CheckpointError, match=r"m\.qzeros: zero point 16 .* convert to gptq instead"):
        Gptq("gptq_v2").write("m", w)
    for kind in (Awq(), PackQuantized()):
        with pytest.raises(CheckpointError, match="zero points of 16"):
            kind.write("m", w)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"bits": 8}, "8 bits"), ({"desc_act": True}, "act-order"), ({"group_size": 40}, "whole groups of 40")],
)
def test_what_awq_cannot_hold(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        Awq().write("m", weight(32, 64, **fields))


def test_configs_round() -> None:
    specs = {"a.0": QuantSpec(4, 32), "a.1": QuantSpec(4, 32), "a.2": QuantSpec(8, -1, sym=False)}
    groups = pack_quantized_specs(PackQuantized().config(specs, ["lm_head"]))
    assert groups == {
        "group_0": (["Linear"], QuantSpec(4, 32)),
        "group_1": (["a.2"], QuantSpec(8, -1, sym=False)),
    }
    found = Gptq("gptq").config(specs, ["a.3", "lm_head"])
    assert found["dynamic"] == {r"-:^a\.3$": {}, r"+:^a\.2$": {"bits": 8, "group_size": -1, "sym": False}}
    (rule,) = Gptq("gptq").config({"a": QuantSpec(4, 32)}, ["h_0.a-b(c"])["dynamic"]
    assert rule.startswith("-:") and re.match(rule[2:], "h_0.a-b(c") and not re.match(rule[2:], "h_0xa-b(c")
    assert awq_spec(Awq().config({"a": QuantSpec(4, 32)}, [])) == QuantSpec(4, 32, sym=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "marlin-24"}, "format='marlin-24'"),
        ({"format": "pack-quantized", "config_groups": {}}, "config_groups"),
        ({"format": "pack-quantized", "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (
            {
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}},
            },
            "quantizes activations",
        ),
        ({"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 5}}}}, "bits=5"),
        (
            {"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4}, "targets": [["Linear"]]}}},
            "must be a list of names",
        ),
        (
            {"format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}},
            "type='float'",
        ),
    ],
)
def test_compressed_tensors_that_are_not_gptq(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        pack_quantized_specs(config)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="'exl2' is not supported; use one of gptq"):
        layout("exl2")
    with pytest.raises(ValueError, match=r"'gguf' is one file, .*; call convert\.gguf\.write_gguf"):
        layout("gguf")
    with pytest.raises(CheckpointError, match="version='gemv'"):
        awq_spec({"version": "gemv", "bits": 4})
