"""Quantized layers are saved under names that they are loaded from, whatever Transformers renames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.format.spec import CheckpointError
from hf_gptq_plugin.nn.linear import QuantLinear

IDS = torch.arange(3, 23)[None]


@pytest.fixture
def llamas_as(tiny: Callable[..., Path]) -> Iterator[Callable[..., None]]:
    """Llamas whose checkpoints are written in another way from now on: `llamas_as(step, ...)`."""
    tiny("llama")

    def register(*steps: Any) -> None:
        conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", list(steps))

    yield register
    conversion_mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("LlamaForCausalLM")


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def quantize_and_reload(tiny: Callable[..., Path], windows: list[list[int]], folder: Path, **fields: Any) -> Any:
    """A Llama that was saved dense (to `dense`), quantized, saved (`quantized`), loaded and saved (`again`)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(AutoConfig.from_pretrained(tiny("llama"))).save_pretrained(folder / "dense")
    config = GPTQConfig(bits=4, group_size=32, dataset=windows, preset="fast", **fields)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "quantized")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(folder / "again")
    assert names(folder / "again") == names(folder / "quantized")
    return loaded


def test_weights_without_a_suffix(
    llamas_as: Callable[..., None], tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    """Weights that are called by the layer's name alone, as some of Inkling 2's."""
    llamas_as(
        WeightRenaming(r"\.attn\.", r".self_attn."),  # what is found under its own name is not renamed
        WeightRenaming(r"(self_attn)\.o_proj", r"\1.o_proj.weight"),
    )
    loaded = quantize_and_reload(tiny, windows, tmp_path)
    assert "model.layers.0.attn.o_proj" in names(tmp_path / "dense")
    assert "model.layers.0.attn.o_proj.qweight" in names(tmp_path / "quantized")
    assert isinstance(loaded.get_submodule("model.layers.0.self_attn.o_proj"), QuantLinear)


@pytest.mark.parametrize("dense", [True, False])
def test_matrices_that_are_one_on_disk(
    dense: bool, llamas_as: Callable[..., None], tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    """Two layers of the model are one matrix in its checkpoints, as in many vision towers; quantized or left dense."""
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    llamas_as(WeightConverter("mlp.both.weight", targets, [Chunk(dim=0)]))
    rules: dict[str, dict[str, Any]] = {"-:.*mlp": {}} if dense else {}
    loaded = quantize_and_reload(tiny, windows, tmp_path, dynamic=rules)
    assert "model.layers.0.mlp.both.weight" in names(tmp_path / "dense")
    assert ("model.layers.0.mlp.both.weight" in names(tmp_path / "quantized")) == dense
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear) != dense


def test_a_part_of_such_a_matrix_is_missed(
    llamas_as: Callable[..., None], tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    llamas_as(WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]))
    quantize_and_reload(tiny, windows, tmp_path, dynamic={"-:.*mlp": {}})
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.both.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight is missing .*\(2 tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
