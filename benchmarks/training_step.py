"""One LoRA step on a 4-bit base beside the same step on the dense model: time, and memory against the plan.

    python benchmarks/training_step.py DENSE BASE [--seqlen 128] [--windows 1] [--steps 5]
    python benchmarks/training_step.py DENSE BASE --rows dense:float32 4bit:float32 --seqlen 512

All models get the same adapter on every quantized layer and the same tokens. Steps take turns: all see the same
machine. The first of each is not timed: in it memory is counted, what PyTorch's allocator gives out beside parameters,
their gradients and optimizer states. The plan is the activations of `hf-gptq plan`. Where there are no instructions for
bfloat16, PyTorch's dense backward in it takes minutes: `--rows` names what to run.
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
ROWS = ("dense:bfloat16", "dense:float32", "4bit:bfloat16", "4bit:float32")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("base")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time")
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    names = sorted(targeted(AutoModelForCausalLM.from_pretrained(arguments.base), None))
    models = {row: adapted(arguments, row, names) for row in arguments.rows}
    ids = torch.randint(0, 1000, (arguments.windows, arguments.seqlen), generator=torch.Generator().manual_seed(0))
    optimizers = {
        row: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for row, model in models.items()
    }
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; LoRA of rank {RANK} on {len(names)} layers, {arguments.windows} windows of "
        f"{arguments.seqlen} tokens, median of {arguments.steps} steps, {arguments.clock} time",
        flush=True,
    )
    found: dict[str, dict[str, float]] = {}
    for row, model in models.items():
        peak, loss = allocated(model, ids)
        found[row] = {"allocated": peak, "loss": loss}
        optimizers[row].step()
    losses = [values["loss"] for values in found.values()]
    if max(losses) - min(losses) > 0.1 * min(losses):
        raise SystemExit(f"the models do not agree on the first loss: {found}")
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    times: dict[str, list[float]] = {row: [] for row in models}
    for _ in range(arguments.steps):
        for row, model in models.items():
            start = clock()
            optimizers[row].zero_grad(set_to_none=False)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizers[row].step()
            times[row].append(clock() - start)
    for row in models:
        found[row]["seconds"] = statistics.median(times[row])
    print("| | first loss | s per step | activations | planned |")
    print("|---|---|---|---|---|")
    for row, values in found.items():
        kind, dtype = row.split(":")
        text = ""
        if kind == "4bit":
            plan = tune_memory_budget(
                arguments.base, 10**12, dtype=getattr(torch, dtype), methods=["lora"], seqlen=arguments.seqlen,
                windows=arguments.windows, rank=RANK,
            ).plans[0]  # fmt: skip
            values["planned"] = plan.activations
            text = f"{values['planned'] / 1e6:.1f} MB"
        print(
            f"| {row} | {values['loss']:.4f} | {values['seconds']:.3f} | {values['allocated'] / 1e6:.1f} MB | {text} |"
        )
    for row in found:
        for other in found:
            if row.startswith("4bit") and other.startswith("dense"):
                print(f"{row} takes {found[row]['seconds'] / found[other]['seconds']:.2f} times as long as {other}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found, file)


def adapted(arguments: Any, row: str, names: list[str]) -> Any:
    """The row's model with an adapter, in training."""
    kind, dtype = row.split(":")
    model = AutoModelForCausalLM.from_pretrained(
        arguments.dense if kind == "dense" else arguments.base, dtype=getattr(torch, dtype)
    )
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=names, task_type="CAUSAL_LM")).train()


def allocated(model: Any, ids: torch.Tensor) -> tuple[int, float]:
    """Most bytes that PyTorch gives out at a time during a step, and the step's loss. Gradients are there before."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    events: Any = profiler.profiler
    now = peak = 0
    memory = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, float(loss)


if __name__ == "__main__":
    main()
