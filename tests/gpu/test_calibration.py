"""Calibration with the model on a GPU. Without one every test here is skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from children import launched
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.demo import texts

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's, in a thread of autograd
]


WITHOUT = {"generated": 0, "token_weights": "uniform", "output_hessian": "identity"}  # what needs the whole model


def quantized(folder: Path, out: Path, windows: list[list[int]], device: str, **fields: Any) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint."""
    config = GPTQConfig(bits=4, group_size=32, dataset=windows, **fields)
    where = {"": device} if config.low_memory else device
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=where, offload_folder=out.with_suffix(".offload")
    )
    model.save_pretrained(out)
    return load_file(out / "model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_every_run_gives_the_same_checkpoint(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path, kind: str, preset: str
) -> None:
    folder = tiny(kind, initializer_range=0.05)
    assert_equal(*(quantized(folder, tmp_path / name, windows, "cuda", preset=preset) for name in ("one", "two")))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_blocks_on_disk_give_what_blocks_in_memory_give(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path, kind: str
) -> None:
    folder = tiny(kind, initializer_range=0.05)
    assert_equal(*(
        quantized(folder, tmp_path / str(low), windows, "cuda", **WITHOUT, low_memory=low) for low in (False, True)
    ))  # fmt: skip


def test_codes_are_those_of_the_cpu(tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path) -> None:
    """But for sums in another order: of 100 weights, 99 get the same code or more, and no code is further than one."""
    folder = tiny("llama", initializer_range=0.05)
    found = [quantized(folder, tmp_path / device, windows, device, preset="fast") for device in ("cpu", "cuda")]
    codes = [torch.cat([t.view(torch.uint8).flatten() for n, t in f.items() if n.endswith("qweight")]) for f in found]
    apart = torch.cat(
        [(codes[0] & 15).int() - (codes[1] & 15).int(), (codes[0] >> 4).int() - (codes[1] >> 4).int()]
    ).abs()
    assert float((apart == 0).float().mean()) > 0.99 and int(apart.max()) <= 1


def test_processes_share_the_text(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Both on one GPU where there is no other."""
    folder = tiny("llama", initializer_range=0.05)
    byte_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text(texts()[0][:20_000], encoding="utf-8")
    told = launched((
        "quantize", folder, tmp_path / "out", "--preset", "fast", "--group-size", 32, "--calibration",
        tmp_path / "text.txt", "--samples", 7, "--seqlen", 32, "--device-map", "cuda",
    ))  # fmt: skip
    assert told.count("Quantized 14 layers") == 1  # the first process alone tells
    lines = (tmp_path / "out" / "calibration.csv").read_text().splitlines()
    column = lines[0].split(",").index("tokens")
    assert {int(line.split(",")[column]) for line in lines[1:]} == {2 * 3 * 32}  # every Hessian, of both
