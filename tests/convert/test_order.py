"""Out of act-order: what can change places does, the model computes what it did, and the rest is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, MIXTURES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.convert.order import FEEDS, natural_order, renumbered
from hf_gptq_plugin.convert.source import open_source
from hf_gptq_plugin.convert.stream import convert, read_module
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec

IDS = torch.arange(3, 35)[None]
_PLAIN = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=256, max_position_embeddings=128,
)  # fmt: skip
# Architecture to model type, config, and how many modules can leave act-order.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "LlamaForCausalLM": ("llama", _PLAIN | {"mlp_bias": True, "attention_bias": True}, 2),
    "MistralForCausalLM": ("mistral", _PLAIN, 2),
    "Qwen2ForCausalLM": ("qwen2", _PLAIN, 2),
    "Qwen3ForCausalLM": ("qwen3", _PLAIN, 2),
    "Gemma2ForCausalLM": ("gemma2", _PLAIN, 2),
    "Gemma3ForCausalLM": ("gemma3_text", _PLAIN, 2),
    "Phi3ForCausalLM": ("phi3", _PLAIN | {"pad_token_id": 0}, 2),
    "OPTForCausalLM": ("opt", dict(ARCHITECTURES["opt"].config), 2),
    "GPT2LMHeadModel": ("gpt2", dict(ARCHITECTURES["gpt2"].config), 2),
    "MixtralForCausalLM": ("mixtral", dict(MIXTURES["mixtral"]), 2 * 4),
    "Qwen3MoeForCausalLM": ("qwen3_moe", dict(MIXTURES["qwen3_moe"]), 2 * 4),
}


def quantized(folder: Path, architecture: str, **settings: Any) -> Path:
    """A tiny checkpoint with random weights and biases in natural order."""
    kind, config, _ = MODELS[architecture]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    assert type(model).__name__ == architecture
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "dense")
    settings = {"bits": 4, "group_size": 16, "sym": False, "method": "rtn", **settings}
    made = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=GPTQConfig(**settings), dtype=torch.float32
    )
    made.save_pretrained(folder / "q")
    return folder / "q"


def with_groups(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """Every module's g_idx changed: as good a checkpoint, of other weights."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith(".g_idx"):
            tensors[name] = change(name.removesuffix(".g_idx"), value).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shuffled(module: str, group: Tensor) -> Tensor:
    return group[torch.randperm(group.numel())]


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=IDS).logits.detach()


def same(one: Path, other: Path) -> None:
    """The same sums in another order."""
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-4)


def test_every_known_architecture_is_tried() -> None:
    assert MODELS.keys() == FEEDS.keys()


@pytest.mark.parametrize("architecture", FEEDS)
def test_the_model_computes_what_it_did(architecture: str, tmp_path: Path) -> None:
    source = with_groups(quantized(tmp_path, architecture), shuffled)
    found = natural_order(open_source(source))
    assert len(found.natural) == MODELS[architecture][2]
    assert len(found.natural) + len(found.kept) == len(found.source.modules)
    assert all(outcome.exact for outcome in convert(found.source, tmp_path / "out", "gptq_v2"))
    same(tmp_path / "out", source)
    again = open_source(tmp_path / "out")
    for module in again.modules:
        assert read_module(again, module).spec.desc_act == (module in found.kept)


def test_dense_producers_move_too(tmp_path: Path) -> None:
    for architecture, dense in (("LlamaForCausalLM", "gate_proj|v_proj"), ("GPT2LMHeadModel", "c_fc|c_attn")):
        folder = tmp_path / architecture
        source = with_groups(quantized(folder, architecture, dynamic={f"-:.*({dense})": {}}), shuffled)
        found = natural_order(open_source(source))
        assert len(found.natural) == 2
        convert(found.source, folder / "out", "gptq")
        same(folder / "out", source)


def test_output_projections_move_within_heads(tmp_path: Path) -> None:
    orders = torch.stack([torch.randperm(16), torch.randperm(16)])  # one for each value head of two heads

    def change(module: str, group: Tensor) -> Tensor:
        if not module.endswith("o_proj"):
            return group
        # Groups of 8 within heads of 16, in any order of the numbers.
        numbers = torch.randperm(8, dtype=torch.int32)
        return torch.cat([numbers[group[head * 16 : (head + 1) * 16]][orders[head // 2]] for head in range(4)])

    source = with_groups(quantized(tmp_path, "LlamaForCausalLM", group_size=8), change)
    found = natural_order(open_source(source))
    assert found.natural == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert not found.kept
    # Then it is what AWQ can hold.
    with pytest.raises(CheckpointError, match="act-order"):
        convert(open_source(source), tmp_path / "awq", "awq")
    convert(found.source, tmp_path / "awq", "awq")
    convert(open_source(tmp_path / "awq"), tmp_path / "back", "gptq_v2")
    same(tmp_path / "back", source)


def test_heads_that_share_values_must_share_the_order(tmp_path: Path) -> None:
    def change(module: str, group: Tensor) -> Tensor:
        if not module.endswith("o_proj"):
            return group
        return torch.cat([group[head * 16 : (head + 1) * 16][torch.randperm(16)] for head in range(4)])

    found = natural_order(open_source(with_groups(quantized(tmp_path, "LlamaForCausalLM", group_size=8), change)))
    assert not found.natural
    assert len(found.kept) == 2
    assert all("several attention heads" in reason for reason in found.kept.values())


def test_groups_that_are_only_numbered_otherwise_need_no_architecture(tmp_path: Path) -> None:
    def change(module: str, group: Tensor) -> Tensor:
        return torch.randperm(int(group.max()) + 1, dtype=torch.int32)[group]

    source = with_groups(quantized(tmp_path, "LlamaForCausalLM"), change)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["OtherForCausalLM"]}))
    found = natural_order(open_source(source))
    assert len(found.natural) == 14
    convert(found.source, tmp_path / "out", "gptq")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-5, atol=1e-5)


def test_a_last_group_that_is_not_full(tmp_path: Path) -> None:
    source = with_groups(quantized(tmp_path, "LlamaForCausalLM", group_size=40), shuffled)  # 96 = 40 + 40 + 16
    found = natural_order(open_source(source))
    assert [name for name in found.natural if "down" in name] == found.natural
    assert len(found.natural) == 2
    convert(found.source, tmp_path / "out", "gptq")
    same(tmp_path / "out", source)


def test_compressed_tensors_with_an_order(tmp_path: Path) -> None:
    source = with_groups(quantized(tmp_path, "LlamaForCausalLM"), shuffled)
    convert(open_source(source), tmp_path / "ct", "compressed-tensors")
    found = natural_order(open_source(tmp_path / "ct"))
    assert len(found.natural) == 2
    convert(found.source, tmp_path / "out", "gptq_v2")
    same(tmp_path / "out", source)


def test_groups_of_other_sizes_stay(tmp_path: Path) -> None:
    def change(module: str, group: Tensor) -> Tensor:
        return torch.randint(0, int(group.max()) + 1, group.shape, dtype=torch.int32)

    found = natural_order(open_source(with_groups(quantized(tmp_path, "LlamaForCausalLM"), change)))
    assert not found.natural
    assert "other sizes" in found.kept["model.layers.0.mlp.down_proj"]


def test_errors(tmp_path: Path) -> None:
    source = with_groups(quantized(tmp_path, "LlamaForCausalLM"), shuffled)
    config = json.loads((source / "config.json").read_text())

    def tried(**fields: Any) -> None:
        (source / "config.json").write_text(json.dumps(config | fields))
        natural_order(open_source(source))

    with pytest.raises(CheckpointError, match=r"channels of OtherForCausalLM may change places is not known; known"):
        tried(architectures=["OtherForCausalLM"])
    with pytest.raises(CheckpointError, match="this model may change places"):
        tried(architectures=None)
    with pytest.raises(CheckpointError, match=r"num_attention_heads=3, .* an output projection of 64 inputs"):
        tried(num_attention_heads=3, num_key_value_heads=1)
    tried()
    with_groups(source, lambda module, group: group + 1)
    with pytest.raises(CheckpointError, match="holds group"):
        natural_order(open_source(source))


def test_renumbered() -> None:
    spec = QuantSpec(4, 4)
    assert renumbered(torch.tensor([2, 2, 2, 2, 0, 0, 0, 0, 1, 1]), spec).tolist() == [2, 0, 1]
    assert renumbered(torch.tensor([2, 2, 2, 0, 2, 0, 0, 0, 1, 1]), spec) is None
    assert renumbered(natural_groups(10, 4), spec).tolist() == [0, 1, 2]
