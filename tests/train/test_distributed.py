"""Two processes: the gradients and the result of one, nothing on integers, codes that come back as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import outputs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.train.loop import TrainSettings, train
from hf_gptq_plugin.train.methods import attach

WORK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
import hf_gptq_plugin
from hf_gptq_plugin.train.loop import TrainSettings, train
from hf_gptq_plugin.train.methods import attach

base, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def load():
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(load(), config)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def learn(model):
    ids = torch.arange(3, 27)[None] + 30 * rank
    model(input_ids=ids, labels=ids).loss.backward()


found = {}
model = adapted()
wrapped = DistributedDataParallel(model)
learn(wrapped)
found |= {f"ddp.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
del wrapped

model = adapted()
codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
for block in model.base_model.model.model.layers:
    fully_shard(block)
fully_shard(model)
assert codes and all(isinstance(p, DTensor) for p in model.parameters())
learn(model)
found |= {f"fsdp.{n}": whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
for name, p in model.named_parameters():
    assert p.requires_grad or p.grad is None, name
    assert name not in codes or torch.equal(whole(p), codes[name]), name

windows = [torch.tensor(row) for row in json.loads(sys.argv[4])]
for exchange in ("float", "int8-block"):
    model = load()
    attach(model, "affine", ["q_proj", "down_proj"])
    settings = TrainSettings(steps=4, batch=3, rate=1e-2, exchange=exchange)
    losses = train(model, windows, settings)
    found[f"{exchange}.losses"] = torch.tensor(losses, dtype=torch.float64)
    found |= {f"{exchange}.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
save_file({n: t.contiguous() for n, t in found.items()}, f"{folder}/{rank}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""

# PEFT 0.21 uses names that Transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "q"
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    AutoModelForCausalLM.from_pretrained(
        tiny("llama", initializer_range=0.1), quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(base: Path, windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the two processes ended with."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(base), str(folder), str(rank), json.dumps(windows)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs(children)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(base: Path, found: list[Any], kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for rank in range(2):
        ids = torch.arange(3, 27)[None] + 30 * rank
        (model(input_ids=ids, labels=ids).loss / 2).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(wanted) == 8
    for name, gradient in wanted.items():
        for process in found:
            torch.testing.assert_close(process[f"{kind}.{name}"], gradient, rtol=1e-4, atol=1e-6)


def test_our_loop_shares_windows(base: Path, found: list[Any], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attach(model, "affine", ["q_proj", "down_proj"])
    losses = train(model, [torch.tensor(row) for row in windows], TrainSettings(steps=4, batch=3, rate=1e-2))
    for process in found:
        assert process["float.losses"].tolist() == pytest.approx(losses, rel=1e-5)
        assert process["int8-block.losses"].tolist() == pytest.approx(losses, rel=1e-2)
        for name, p in model.named_parameters():
            if p.requires_grad:
                # Adam's first steps are of the rate's size whatever the gradient: small ones may turn in rounding.
                torch.testing.assert_close(process[f"float.{name}"], p.detach(), rtol=0, atol=1e-3)
                assert torch.equal(process[f"int8-block.{name}"], found[0][f"int8-block.{name}"])
