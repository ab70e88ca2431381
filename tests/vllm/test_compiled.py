"""With torch.compile, which is vLLM's default: same numbers, and no graph of another checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_layers import finish, load, make, random_weight, tensor_parallel

from hf_gptq_plugin.format.packing import pack_stream, unpack_stream
from hf_gptq_plugin.format.spec import QuantSpec

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


def store_zeros_as_v2(folder: Path, bits: int) -> None:
    """The same weights with zeros stored as v2; config.json still says v1."""
    tensors = load_file(folder / "model.safetensors")
    for name, packed in tensors.items():
        if name.endswith(".qzeros"):
            columns = tensors[name.replace("qzeros", "scales")].shape[1]
            fields = unpack_stream(packed, bits, columns)
            tensors[name] = pack_stream(fields + 1, bits)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_compiled_model_matches_and_is_not_reused_for_another_checkpoint(
    quantized: Callable[..., Path],
    engines: Any,
    parity: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    original = quantized(bits=3, group_size=32, sym=False)
    served = tmp_path / "checkpoint"
    shutil.copytree(original, served)
    parity(served, reference=original, enforce_eager=False)
    assert any((tmp_path / "cache").rglob("*")), "vLLM cached nothing, so this test shows nothing"
    engines.end()
    store_zeros_as_v2(served, bits=3)
    parity(served, reference=original, enforce_eager=False)
    engines.end()


@pytest.mark.usefixtures("vllm_config")
def test_the_key_of_compiled_graphs_depends_on_what_the_tensors_show() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    def key(spec: QuantSpec, stored: QuantSpec) -> str:
        config = VllmConfig()
        before = config.compute_hash()
        with set_current_vllm_config(config), tensor_parallel():
            layer = make(ReplicatedLinear, spec, 80, 64, prefix="layer")
            load(layer, random_weight(64, stored))
            finish(layer)
        assert config.compute_hash() != before
        return config.compute_hash()

    label = QuantSpec(4, 32, sym=False)
    keys = [
        key(label, label),
        key(label, QuantSpec(4, 32, sym=True)),  # every zero the same
        key(label, QuantSpec(4, 32, sym=False, checkpoint_format="gptq_v2")),  # stored in another way than labelled
        key(label, QuantSpec(4, 32, sym=False, desc_act=True)),  # groups out of order
    ]
    assert len(set(keys)) == len(keys)
    assert key(label, label) == keys[0]


def test_a_configuration_that_cannot_hold_it_is_refused() -> None:
    from vllm_plugin.compiled import note

    with pytest.raises(ValueError, match=r"additional_config is SimpleNamespace.*pass a dict"):
        note(SimpleNamespace(additional_config=SimpleNamespace()), "layer")


def test_one_graph_holds_any_number_of_tokens() -> None:
    """What vLLM traces has no branch on the number of tokens."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    spec = QuantSpec(4, 32, sym=False, desc_act=True)
    with set_current_vllm_config(VllmConfig()), tensor_parallel():
        layer = make(ReplicatedLinear, spec, 80, 64, prefix="layer")
        load(layer, random_weight(64, spec))
        finish(layer)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: layer.quant_method.apply(layer, x), backend=backend, fullgraph=True, dynamic=True
    )
    for tokens in (2, 7, 17):
        x = torch.randn(tokens, 80)
        assert torch.equal(compiled(x), layer.quant_method.apply(layer, x))
    assert len(graphs) == 1
