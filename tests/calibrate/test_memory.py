"""What calibration in low memory keeps out of memory."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import blocks, memory
from hf_gptq_plugin.nn.linear import QuantLinear

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collection: what is in a cycle stays in memory, as it does for a while without this."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def in_memory() -> int:
    """Bytes of all tensors there are, garbage included."""
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.usefixtures("uncollected")
def test_nothing_that_has_served_stays_in_memory(
    tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks when they are done; a block's dense weights when its last layer is solved, which takes most."""
    solve, seen, dense = blocks.solve_layer, [], []

    def watched(name: str, layer: nn.Module, *args: Any) -> Any:
        if name.endswith("q_proj"):
            dense.append(weakref.ref(layer.weight))
        if name.endswith("down_proj"):
            seen.append(in_memory())
            assert dense[-1]() is None
        return solve(name, layer, *args)

    monkeypatch.setattr(blocks, "solve_layer", watched)
    path = tiny("llama", num_hidden_layers=5, dtype=torch.bfloat16)
    config = GPTQConfig(bits=4, group_size=32, dataset=windows, samples=len(windows), low_memory=True)
    assert config.propagation > 0  # with what the dense model computes
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    weights = sum(2 * report.in_features * report.out_features for report in model.hf_quantizer.reports)
    assert len(seen) == len(dense) == 5
    assert max(seen) - seen[0] < weights / 5 / 10


def test_a_bf16_model_calibrates_on_codes(
    tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer meets is computed from the codes before it, nothing stands in for them afterwards."""
    ran: set[str] = set()
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: ran.add(id(self)) or forward(self, x))
    config = GPTQConfig(bits=4, group_size=32, dataset=windows, samples=len(windows))
    path = tiny("llama", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14 and {id(layer) for layer in layers} <= ran
    assert not any("forward" in vars(layer) for layer in layers)


@on_linux
def test_large_parameters_are_mapped(tmp_path: Path) -> None:
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]

    model = nn.Sequential(nn.Embedding(600, 1024), nn.Linear(1024, 600, bias=False), nn.LayerNorm(8)).to(torch.bfloat16)
    model[1].weight = model[0].weight
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    small = model[2].weight.data_ptr()
    memory.map_parameters(model, tmp_path)
    assert len(mapped()) == 1 and "rw-p" in mapped()[0]  # private: what is written stays in memory
    assert model[1].weight is model[0].weight and model[2].weight.data_ptr() == small
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model[0].weight += 1
    assert torch.equal(model[1].weight, wanted["0.weight"] + 1)
    assert not list(tmp_path.iterdir())
    del model
    assert not mapped()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="missing cannot be written"):
        memory.map_parameters(nn.Linear(1024, 1024), tmp_path / "missing")
    if Path("/dev/full").exists():
        monkeypatch.setattr(memory, "TemporaryFile", lambda dir: open("/dev/full", "w+b", buffering=0))
        with pytest.raises(RuntimeError, match="is on a disk that is full"):
            memory.map_parameters(nn.Linear(1024, 1024), tmp_path)


@on_linux
@pytest.mark.skipif(sys.platform == "linux" and memory._glibc() is None, reason="the C library is not glibc")
def test_free_memory_goes_back_to_the_system() -> None:
    def anonymous() -> int:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def given_back() -> int:
        kept = [torch.ones(1 << 19) for _ in range(64)]  # 2 MiB each
        full = anonymous()
        del kept[::2]
        return full - anonymous()

    with memory.freed_at_once():
        assert given_back() > 0.9 * 32 * (2 << 20)
    assert given_back() < 0.1 * 32 * (2 << 20)  # as usual, once glibc has seen large tensors
