"""ZeRO-2 by DeepSpeed itself, on the CPU in two processes: the curve of one process without it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import free_port, outputs
from pages import DOCS, blocks
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation '.[test-deepspeed]'",
)

(CONFIGURATION,) = [block for block in blocks(DOCS / "training.md") if block.language == "json"]

WORK = """
import json, sys
import torch
from pages import DOCS, blocks
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import hf_gptq_plugin

base, out, config, batch = sys.argv[1:]
arguments = TrainingArguments(
    output_dir=out, deepspeed=config or None, use_cpu=True, bf16=False, max_steps=4, learning_rate=2e-2,
    per_device_train_batch_size=int(batch), lr_scheduler_type="constant", report_to=[], logging_steps=1,
    disable_tqdm=True, save_strategy="no",
)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
rows = [{"input_ids": list(range(3 + i, 35 + i)), "labels": list(range(3 + i, 35 + i))} for i in range(16)]
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
given = dict(model.named_parameters())
print(json.dumps({
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "stage": trainer.model_wrapped.zero_optimization_stage() if config else None,
    "codes": bool(codes) and all(torch.equal(given[n], value) and given[n].grad is None for n, value in codes.items()),
}))
"""


def trained(base: Path, folder: Path, config: Path | None, batch: int, processes: int) -> list[dict[str, object]]:
    """What every process printed last."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    if config is not None:
        environment |= {
            "WORLD_SIZE": str(processes), "LOCAL_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(base), str(folder), str(config or ""), str(batch)],
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if config is not None else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    return [json.loads(out.splitlines()[-1]) for out in outputs(children)]


def test_the_curve_of_one_process(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, config = tmp_path / "base", tmp_path / "zero2.json"
    AutoModelForCausalLM.from_pretrained(
        tiny("llama", initializer_range=0.1), dtype=torch.float32,
        quantization_config=GPTQConfig(bits=4, group_size=32, method="rtn"),
    ).save_pretrained(base)  # fmt: skip
    config.write_text(CONFIGURATION.text)
    (wanted,) = trained(base, tmp_path / "plain", None, 4, 1)
    two = trained(base, tmp_path / "two", config, 2, 2)
    assert wanted["losses"][-1] < wanted["losses"][0] - 0.1  # type: ignore[index]
    for process in two:
        assert process["stage"] == 2 and process["codes"]
        assert process["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
