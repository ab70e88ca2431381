"""Layers of vLLM loaded tensor by tensor, as its model loader does, on one rank or a simulated one of two.

A layer is compared with the weight that slow loops decode in float64. Fed with the identity, its output is
the weight itself: code minus zero, times a scale of 11 bits, fits a float32, so the comparison is exact.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm_layers import K, decoded, dense, finish, load, make, random_weight, tensor_parallel

from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec

pytest.importorskip("vllm.version", reason="these tests need vLLM")

pytestmark = [
    # vLLM, and what it imports, warn about themselves.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("vllm_config"),
]

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
SPECS = [
    QuantSpec(bits, 32, sym, desc_act, fmt)
    for bits, sym, desc_act, fmt in product((2, 3, 4, 8), (True, False), (False, True), ("gptq", "gptq_v2"))
]


def make_qkv(spec: QuantSpec, kv_heads: int = 1, **options: Any) -> Any:
    """A fused layer of 2 query heads and `kv_heads` key-value heads of 32."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    return make(QKVParallelLinear, spec, K, 32, 2, kv_heads, prefix="attn.qkv_proj", **options)


def qkv_weights(spec: QuantSpec, kv_heads: int = 1) -> dict[str, QuantizedWeight]:
    q = random_weight(64, spec)
    return {
        "q": q,
        "k": random_weight(32 * kv_heads, spec, group=q.group, seed=1),
        "v": random_weight(32 * kv_heads, spec, group=q.group, seed=2),
    }


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fused_layer_decodes_exactly(spec: QuantSpec) -> None:
    weights = qkv_weights(spec)
    with tensor_parallel():
        layer = make_qkv(spec)
        for shard, weight in weights.items():
            load(layer, weight, shard)
        finish(layer)
    expected = dense(list(weights.values()))
    assert torch.equal(decoded(layer), expected)
    x = torch.randn(2, 3, K)
    out = layer.quant_method.apply(layer, x, torch.ones(128))
    # A sum of K products, each rounded once, in any order.
    bound = (x.abs().double() @ expected.abs().T) * K * torch.finfo(torch.float32).eps + 1e-6
    assert ((out.double() - (x.double() @ expected.T + 1)).abs() <= bound).all()


@pytest.mark.parametrize("group_size", [-1, 16, 24, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_group_sizes_and_widths_that_vllm_lacks(bits: int, group_size: int) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    spec = QuantSpec(bits, group_size, sym=False)
    weight = random_weight(38, spec)
    with tensor_parallel():
        layer = make(ReplicatedLinear, spec, K, 38, prefix="layer")
        load(layer, weight)
        finish(layer)
    assert torch.equal(decoded(layer), dense([weight]))


def test_layer_that_is_fused_on_disk() -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    spec = QuantSpec(4, 32, sym=False)
    weight = random_weight(96, spec)
    with tensor_parallel():
        layer = make(MergedColumnParallelLinear, spec, K, [64, 32], prefix="mlp.gate_up_proj")
        load(layer, weight)
        finish(layer)
    assert torch.equal(decoded(layer), dense([weight]))


@pytest.mark.parametrize("vocabulary", [50, 64])
def test_output_embedding_with_and_without_padding(vocabulary: int) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    spec = QuantSpec(3, 32)
    weight = random_weight(vocabulary, spec)
    with tensor_parallel():
        layer = make(ParallelLMHead, spec, vocabulary, K, prefix="lm_head")
        load(layer, weight)
        finish(layer)
    logits = decoded(layer)
    assert logits.shape == (64, K)
    assert torch.equal(logits[:vocabulary], dense([weight]))
    assert not logits[vocabulary:].any()
    assert layer.weight.dtype == torch.float32


def test_tied_output_embedding_is_refused() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    with tensor_parallel():
        layer = make(ParallelLMHead, QuantSpec(), 64, K, prefix="lm_head")
        with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
            layer.tie_weights(VocabParallelEmbedding(64, K))


def test_checkpoint_without_g_idx() -> None:
    spec = QuantSpec(4, 32)
    weights = qkv_weights(spec)
    with tensor_parallel():
        layer = make_qkv(spec)
        for shard, weight in weights.items():
            load(layer, weight, shard, leave_out=("g_idx",))
        finish(layer)
    assert torch.equal(decoded(layer), dense(list(weights.values())))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_column_parallel_ranks_make_up_the_layer(kv_heads: int) -> None:
    spec = QuantSpec(3, 32, sym=False, desc_act=True)
    weights = qkv_weights(spec, kv_heads)
    ranks = []
    for rank in range(2):
        with tensor_parallel(rank, 2):
            layer = make_qkv(spec, kv_heads)
            for shard, weight in weights.items():
                load(layer, weight, shard)
            ranks.append(decoded(finish(layer)).split(32))
    for part, weight in enumerate(weights.values()):
        heads = [rank[part] for rank in ranks]
        assert torch.equal(torch.cat(heads[: len(weight.codes) // 32]), dense([weight]))
        assert torch.equal(heads[-1], dense([weight])[-32:])  # a single head lies on both ranks


@pytest.mark.parametrize(
    ("in_features", "spec"),
    [
        (128, QuantSpec(3, 32, sym=False)),
        (128, QuantSpec(3, -1, sym=False)),
        pytest.param(256, QuantSpec(4, 96), id="the second rank begins inside a group"),
        pytest.param(80, QuantSpec(3, 16, sym=False), id="inside a group and a word"),
        pytest.param(80, QuantSpec(3, -1), id="inside a word"),
        *(
            pytest.param(80, QuantSpec(bits, 32, bits != 4, desc_act=True), id=f"act-order, {bits} bit")
            for bits in (2, 3, 4, 8)
        ),
    ],
)
def test_row_parallel_ranks_make_up_the_layer(in_features: int, spec: QuantSpec) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    weight = random_weight(38, spec, in_features=in_features)
    parts = []
    for rank in range(2):
        with tensor_parallel(rank, 2):
            layer = make(RowParallelLinear, spec, in_features, 38, prefix="layer")
            load(layer, weight)
            parts.append(decoded(finish(layer)))
    assert torch.equal(torch.cat(parts, dim=1), dense([weight]))


def test_a_rank_keeps_the_groups_that_it_uses() -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    spec = QuantSpec(4, 96)
    with tensor_parallel(1, 2):
        layer = make(RowParallelLinear, spec, 256, 38, prefix="layer")
        load(layer, random_weight(38, spec, in_features=256))
        finish(layer)
    assert layer.g_idx.tolist() == [0] * 64 + [1] * 64  # inputs 128 to 255 lie in groups 1 and 2
    assert len(layer.scales) == len(layer.qzeros) == 2


def test_row_parallel_rank_without_g_idx() -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    spec = QuantSpec(4, 48, sym=False)
    weight = random_weight(38, spec, in_features=128)
    with tensor_parallel(1, 2):
        layer = make(RowParallelLinear, spec, 128, 38, prefix="layer")
        load(layer, weight, leave_out=("g_idx",))
        assert torch.equal(decoded(finish(layer)), dense([weight])[:, 64:])


@pytest.mark.parametrize("size", [1, 2])
def test_fused_zeros_that_fill_no_whole_words(size: int) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    spec = QuantSpec(3, 32, sym=False)
    weights = [random_weight(64, spec), random_weight(80, spec, seed=1)]
    ranks = []
    for rank in range(size):
        with tensor_parallel(rank, size):
            layer = make(MergedColumnParallelLinear, spec, K, [64, 80], prefix="mlp.gate_up_proj")
            for shard, weight in enumerate(weights):
                load(layer, weight, shard)
            ranks.append(decoded(finish(layer)).split([64 // size, 80 // size]))
    for part, weight in enumerate(weights):
        assert torch.equal(torch.cat([rank[part] for rank in ranks]), dense([weight]))


def test_shards_of_different_act_order_are_refused() -> None:
    spec = QuantSpec(4, 32, desc_act=True)
    with tensor_parallel():
        layer = make_qkv(spec)
        load(layer, random_weight(64, spec, seed=0), "q")
        with pytest.raises(CheckpointError, match=r"attn\.k_proj\.g_idx differs from attn\.q_proj\.g_idx"):
            load(layer, random_weight(32, spec, seed=1), "k")


@pytest.mark.parametrize("leaf", TENSORS)
@pytest.mark.parametrize("shard", ["q", "k", "v"])
def test_missing_tensor_is_named(leaf: str, shard: str) -> None:
    spec = QuantSpec(4, 32, desc_act=True)
    with tensor_parallel():
        layer = make_qkv(spec)
        for other, weight in qkv_weights(spec).items():
            load(layer, weight, other, leave_out=(leaf,) if other == shard else ())
        with pytest.raises(CheckpointError, match=rf"no attn\.{shard}_proj\.{leaf}, so attn\.qkv_proj cannot"):
            finish(layer)


def test_module_that_is_missing_whole_is_named() -> None:
    spec = QuantSpec(4, 32)
    with tensor_parallel():
        layer = make_qkv(spec)
        for shard, weight in list(qkv_weights(spec).items())[:2]:
            load(layer, weight, shard)
        with pytest.raises(CheckpointError, match=r"no attn\.v_proj\.qweight, attn\.v_proj\.qzeros, attn\.v_proj"):
            finish(layer)


def test_g_idx_of_some_shards_only_is_refused() -> None:
    spec = QuantSpec(4, 32)
    with tensor_parallel():
        layer = make_qkv(spec)
        for shard, weight in qkv_weights(spec).items():
            load(layer, weight, shard, leave_out=("g_idx",) if shard == "k" else ())
        with pytest.raises(CheckpointError, match=r"no attn\.k_proj\.g_idx, so"):
            finish(layer)


def test_missing_biases_are_named() -> None:
    """Of all parts or of one: whatever does not come would be served as memory happened to be."""
    spec = QuantSpec(4, 32)
    with tensor_parallel():
        layer = make_qkv(spec, bias=True)
        for shard, weight in qkv_weights(spec).items():
            load(layer, weight, shard)
        with pytest.raises(CheckpointError, match=r"no attn\.q_proj\.bias, attn\.k_proj\.bias, attn\.v_proj\.bias, so"):
            finish(layer)
        for shard in "qk":
            layer.bias.weight_loader(layer.bias, torch.ones(64 if shard == "q" else 32), shard)
        with pytest.raises(CheckpointError, match=r"no attn\.v_proj\.bias, so"):
            finish(layer)
        layer.bias.weight_loader(layer.bias, torch.ones(32), "v")
        finish(layer)
        assert torch.equal(layer.bias, torch.ones(128))


@pytest.mark.parametrize(("model", "served"), [("whisper", True), ("qwen2", False)])
def test_keys_without_a_bias(model: str, served: bool, tmp_path: Path) -> None:
    """Whisper has none on its keys, vLLM's layer has, and its loader makes zeros up beside dense weights only."""
    from transformers import PreTrainedConfig
    from vllm.model_executor.layers.linear import QKVParallelLinear

    from vllm_plugin.config import HfGptqConfig

    spec = QuantSpec(4, 32)
    weights = qkv_weights(spec)
    tensors = {f"attn.{shard}_proj.{leaf}": t.clone() for shard, w in weights.items() for leaf, t in w.pack().items()}
    save_file(
        {**tensors, "attn.q_proj.bias": torch.ones(64), "attn.v_proj.bias": torch.ones(32)}, tmp_path / "m.safetensors"
    )
    config = HfGptqConfig.from_config(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    described = PreTrainedConfig()
    described.model_type = model
    config.maybe_update_config(str(tmp_path), hf_config=described)
    with tensor_parallel():
        layer = QKVParallelLinear(
            K, 32, 2, 1, bias=True, params_dtype=torch.float32, quant_config=config, prefix="attn.qkv_proj"
        )
        layer.bias.data.fill_(float("nan"))
        for shard, weight in weights.items():
            load(layer, weight, shard)
            if shard != "k":
                layer.bias.weight_loader(layer.bias, torch.ones(len(weight.codes)), shard)
        if served:
            finish(layer)
            assert layer.bias.tolist() == [1] * 64 + [0] * 32 + [1] * 32
        else:
            with pytest.raises(CheckpointError, match=r"no attn\.k_proj\.bias, so attn\.qkv_proj cannot be served"):
                finish(layer)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (QuantSpec(8, 32), r"attn\.v_proj\.qweight has shape \(20, 32\).*bits=8 would fit"),
        (QuantSpec(4, 40), r"attn\.v_proj\.scales has shape \(2, 32\).*group_size=40 would fit"),
    ],
)
def test_mismatched_shapes_are_named(stored: QuantSpec, message: str) -> None:
    spec = QuantSpec(4, 32)
    with tensor_parallel():
        layer = make_qkv(spec)
        with pytest.raises(CheckpointError, match=message):
            load(layer, random_weight(32, stored), "v", leave_out=("qzeros",))


def test_wider_tensor_is_refused_and_not_cut() -> None:
    spec = QuantSpec(4, 32)
    with tensor_parallel():
        layer = make_qkv(spec)
        with pytest.raises(CheckpointError, match=r"attn\.v_proj\.qweight has shape \(10, 64\)"):
            load(layer, random_weight(64, spec), "v")


def test_values_that_cannot_be_are_refused() -> None:
    spec = QuantSpec(4, 32)
    weights = qkv_weights(spec)
    weights["k"].scales[1, 2] = float("nan")
    with tensor_parallel():
        layer = make_qkv(spec)
        for shard, weight in weights.items():
            load(layer, weight, shard)
        with pytest.raises(CheckpointError, match=r"attn\.qkv_proj\.scales\[1, 66\] is nan"):
            finish(layer)


@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
def test_group_index_out_of_range_is_refused(group: int) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    spec = QuantSpec(4, 32, desc_act=True)
    weight = random_weight(64, spec)
    weight.group[70] = group
    for rank, size in ((0, 1), (1, 2)):
        with tensor_parallel(rank, size):
            layer = make(RowParallelLinear, spec, K, 64, prefix="layer")
            load(layer, weight)
            with pytest.raises(CheckpointError, match=rf"layer\.g_idx holds group {group}; with 3 groups the accepted"):
                finish(layer)


def test_bits_beyond_the_last_zero_say_nothing() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    spec = QuantSpec(3, 32, sym=False)
    weight = random_weight(38, spec)  # 114 bits of 128
    with tensor_parallel():
        layer = make(ReplicatedLinear, spec, K, 38, prefix="layer")
        load(layer, weight, leave_out=("qzeros",))
        stray = weight.pack()["qzeros"]
        stray[:, -1] |= torch.tensor(0x7FFC0000, dtype=torch.int32)
        layer.qzeros.weight_loader(layer.qzeros, stray)
        finish(layer)
    assert torch.equal(decoded(layer), dense([weight]))


def test_mislabelled_zeros_are_read_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """A layer that shows no evidence follows one that does, also when it was loaded first."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    label = QuantSpec(4, 32, sym=False, checkpoint_format="gptq")
    stored = replace(label, checkpoint_format="gptq_v2")
    clear = random_weight(64, stored)
    # Every zero is one too low, so codes lie half way between what v1 and v2 would imply.
    unclear = random_weight(64, stored)
    unclear.codes[:, ::2] += 1
    with tensor_parallel():
        layers = [make(ReplicatedLinear, label, K, 64, prefix=f"layer{i}") for i in range(3)]
        for layer in layers[1:]:
            layer.quant_method._zeros = layers[0].quant_method._zeros
        for layer, weight in zip(layers, (unclear, clear, clear), strict=True):
            load(layer, weight)
            finish(layer)
    assert torch.equal(decoded(layers[0]), dense([unclear]))
    assert torch.equal(decoded(layers[1]), dense([clear]))
    assert caplog.text.count("stored as gptq_v2") == 1


def test_layers_that_contradict_each_other_in_their_zeros() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    specs = [QuantSpec(4, 32, checkpoint_format=fmt) for fmt in ("gptq", "gptq_v2")]
    with tensor_parallel():
        first, second = (make(ReplicatedLinear, specs[0], K, 64, prefix=f"layer{i}") for i in range(2))
        second.quant_method._zeros = first.quant_method._zeros
        load(first, random_weight(64, specs[0]))
        load(second, random_weight(64, specs[1]))
        finish(first)
        with pytest.raises(CheckpointError, match="layer0 are stored as v1 and those of layer1 as v2"):
            finish(second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_is_new_contiguous_and_of_the_input_dtype(dtype: torch.dtype) -> None:
    spec = QuantSpec(4, 32)
    weights = qkv_weights(spec)
    with tensor_parallel():
        layer = make_qkv(spec)
        for shard, weight in weights.items():
            load(layer, weight, shard)
        finish(layer)
    x = torch.randn(K, 5, dtype=dtype).T  # not contiguous
    before = x.clone()
    out = layer.quant_method.apply(layer, x)
    assert out.dtype == dtype and out.is_contiguous() and torch.equal(x, before)
    expected = x.double() @ dense(list(weights.values())).T
    torch.testing.assert_close(out.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.05)
