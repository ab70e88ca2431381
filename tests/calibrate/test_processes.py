"""Several processes calibrate one model together and end with the same layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import free_port, outputs
from safetensors.torch import load_file

from hf_gptq_plugin.calibrate import processes
from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import QuantSpec

WORK = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import processes
processes.join()
rank = processes.rank()
config = GPTQConfig(bits=4, group_size=32, dataset=json.loads(sys.argv[2]), samples=8, **json.loads(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=config)
save_file({k: v.clone() for k, v in model.state_dict().items()}, f"{sys.argv[3]}/{rank}.safetensors")
tokens = {report.tokens for report in model.hf_quantizer.reports}
print(json.dumps({"rank": rank, "count": processes.count(), "tokens": sorted(tokens)}))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "fields",
    [
        '{"generated": 0, "output_hessian": "identity"}',
        '{"generated": 0, "token_weights": "loss", "output_hessian": "loss"}',
        '{"preset": "best", "model_epochs": 1, "block_epochs": 1}',
    ],
)
def test_two_processes(fields: str, tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path) -> None:
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tiny("llama")), str(windows), str(tmp_path), fields],
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = outputs(children)
    # 8 windows of 32 tokens: every Hessian has seen those of both processes; and as many that both have written.
    tokens = 256 if "generated" in fields else 512
    assert sorted(printed) == [
        f'{{"rank": {rank}, "count": 2, "tokens": [{tokens}]}}\n' for rank in range(2)
    ]  # fmt: skip
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    if "generated" in fields:
        import transformers

        from hf_gptq_plugin import GPTQConfig

        config = GPTQConfig(bits=4, group_size=32, dataset=windows, samples=8, **json.loads(fields))
        alone = transformers.AutoModelForCausalLM.from_pretrained(
            tiny("llama"), dtype=torch.float32, quantization_config=config
        )
        dense = load_file(tiny("llama") / "model.safetensors")
        for name, layer in alone.named_modules():
            if not hasattr(layer, "qweight"):
                continue
            tensors = {leaf: one[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
            shared = QuantizedWeight.unpack(**tensors, spec=QuantSpec(4, 32))
            own, weight = layer.quantized_weight(), dense[f"{name}.weight"].float()
            # Sums are rounded in another order: a code on the other side takes others with it, and what is quantized
            # after it goes another way. With the Hessians of half the windows a quarter of these codes differ.
            if name.startswith("model.layers.0.self_attn") and not name.endswith("o_proj"):
                assert (own.codes != shared.codes).float().mean() < 0.1, name
            errors = [float((w.dequantize() - weight).norm() / weight.norm()) for w in (own, shared)]
            assert errors[1] == pytest.approx(errors[0], rel=0.1), name


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [torch.tensor([i]) for i in range(7)]
    assert processes.share(windows) == windows
    monkeypatch.setattr(processes, "count", lambda: 3)
    for rank, expected in enumerate(([0, 3], [1, 4], [2, 5])):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        assert [int(w) for w in processes.share(windows)] == expected
    with pytest.raises(ValueError, match="2 calibration windows are too few for 3 processes"):
        processes.share(windows[:2])
