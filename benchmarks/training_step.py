"""One LoRA step on a 4-bit base beside the same step on the dense model in bfloat16: time, and memory against the plan.

    python benchmarks/training_step.py DENSE BASE [--seqlen 128] [--windows 1] [--steps 5] [--dtype float32]

Both models get the same adapter on every quantized layer and the same tokens. Steps take turns, so that both see the
same machine; the first of each is not counted. Memory is what PyTorch's allocator gives out during a step, beside
parameters, gradients and optimizer states; the plan is `hf-gptq plan`'s.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from hf_gptq_plugin.hf.planning import tune_memory_budget
from hf_gptq_plugin.train.methods import targeted

RANK = 16


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("base")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="of the arithmetic on the 4-bit base")
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    quantized: Any = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype)
    names = sorted(targeted(quantized, None))
    models = {
        "dense, bfloat16": adapted(AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.bfloat16), names),
        f"4 bit, {arguments.dtype}": adapted(quantized, names),
    }
    ids = torch.randint(0, 1000, (arguments.windows, arguments.seqlen), generator=torch.Generator().manual_seed(0))
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.steps + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=False)
            times[name].append(time.perf_counter() - start)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; LoRA of rank {RANK} on {len(names)} layers, {arguments.windows} windows of "
        f"{arguments.seqlen} tokens, median of {arguments.steps} steps"
    )
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        found[name] = {"seconds": statistics.median(times[name][1:]), "allocated": allocated(model, ids)}
    dense, ours = found.values()
    plan = tune_memory_budget(
        arguments.base, 10**12, dtype=dtype, methods=["lora"], seqlen=arguments.seqlen, windows=arguments.windows,
        rank=RANK,
    ).plans[0]  # fmt: skip
    print("| | s per step | x | activations | planned |")
    print("|---|---|---|---|---|")
    for name, row in found.items():
        planned = f"{plan.activations / 1e6:.1f} MB" if row is ours else ""
        print(
            f"| {name} | {row['seconds']:.3f} | {row['seconds'] / dense['seconds']:.2f} | "
            f"{row['allocated'] / 1e6:.1f} MB | {planned} |"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"rows": found, "plan": plan.to_dict()}, file)


def adapted(model: Any, names: list[str]) -> Any:
    """With an adapter, in training."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=names, task_type="CAUSAL_LM")).train()


def allocated(model: Any, ids: torch.Tensor) -> int:
    """Most bytes that PyTorch gives out at a time during a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    events: Any = profiler.profiler
    now = peak = 0
    memory = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


if __name__ == "__main__":
    main()
