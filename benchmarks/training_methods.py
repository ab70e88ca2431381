"""Every way of training on one quantized base, on the same windows: held-out loss before and after.

    hf-gptq quantize MODEL BASE --bits 4 --group-size 64 --preset fast --calibration TEXT --samples 16 --seqlen 256
    python benchmarks/training_methods.py BASE
    python benchmarks/training_methods.py BASE --methods ste+q-galore,lora+int8-block

A method's name may be followed by an optimizer's and by a way of rounding gradients, which begins after a sixth of the
steps. The text is Python's help topics, three quarters to train on and a quarter held out, so that nothing is
downloaded. The adapter that `lora` makes is folded into the base, too. Prints the README's table and writes its rows as
JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gptq_plugin.calibrate.data import calibration_windows
from hf_gptq_plugin.demo import texts
from hf_gptq_plugin.hf import folding
from hf_gptq_plugin.hf.training import TRAINABLE, Data, run, usual_rate
from hf_gptq_plugin.train.loop import GRADIENTS, OPTIMIZERS, TrainSettings, mean_loss


def main() -> None:
    """Parse arguments, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a GPTQ checkpoint")
    parser.add_argument("--methods", default=",".join(TRAINABLE))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--samples", type=int, default=90, help="windows to train on")
    parser.add_argument("--target-modules", help="layers that learn: last parts of names, with commas; all by default")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--rate", type=float, default=None, help="instead of the method's own")
    parser.add_argument("--every", type=int, help="steps between two roundings of shadow")
    parser.add_argument("--out", type=Path, default=Path("training-methods"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train_text, held_out_text = texts()
    files = [arguments.out / name for name in ("train.txt", "held-out.txt")]
    for file, text in zip(files, (train_text, held_out_text), strict=True):
        file.write_text(text, encoding="utf-8")
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {arguments.steps} steps of {arguments.batch} windows of "
        f"{arguments.seqlen} tokens, float32"
    )
    print("| method | numbers that learn | held-out loss | after | largest difference of the export | s per step |")
    print("|---|---|---|---|---|---|")
    rows = []
    for method in arguments.methods.split(","):
        rows.append(trained(arguments, method, files))
        show(rows[-1])
        if method == "lora":
            rows.append(folded(arguments, files, rows[-1]))
            show(rows[-1])
        (arguments.out / f"{method}.json").write_text(json.dumps(rows[-2:] if method == "lora" else rows[-1:]))


def trained(arguments: Any, method: str, files: list[Path]) -> dict[str, Any]:
    """One method's row."""
    label, (method, *extras) = method, method.split("+")
    unknown = sorted(set(extras) - {*OPTIMIZERS, *GRADIENTS})
    if method not in TRAINABLE or unknown:
        raise SystemExit(f"{label} is not known: methods {TRAINABLE}, after a plus {OPTIMIZERS} and {GRADIENTS}")
    optimizer = next((extra for extra in extras if extra in OPTIMIZERS), "adamw")
    gradients = next((extra for extra in extras if extra in GRADIENTS), "float")
    settings = TrainSettings(
        steps=arguments.steps,
        batch=arguments.batch,
        rate=arguments.rate or usual_rate(method, optimizer),
        save_every=8,
        optimizer=optimizer,
        gradients=gradients,
        gradient_warmup=arguments.steps // 6,
    )
    options = {"every": arguments.every} if method == "shadow" and arguments.every else {}
    targets = None if arguments.target_modules is None else arguments.target_modules.split(",")
    data = Data(str(files[0]), str(files[1]), arguments.samples, arguments.seqlen)
    moments: list[float] = []
    found = run(
        arguments.base, arguments.out / label, method, data, settings, {}, targets, options,
        progress=lambda done, loss: moments.append(time.perf_counter()),
    )  # fmt: skip
    per_step = (moments[-1] - moments[0]) / max(1, len(moments) - 1)
    return {
        "method": label, "rate": settings.rate, "parameters": found.parameters, "before": found.before,
        "after": found.after, "difference": found.difference, "seconds": per_step,
        "losses": found.losses,
    }  # fmt: skip


def folded(arguments: Any, files: list[Path], adapter: dict[str, Any]) -> dict[str, Any]:
    """The row of the adapter folded into the base; the same held-out windows."""
    start = time.perf_counter()
    out = arguments.out / "folded"
    found = folding.run(arguments.base, str(arguments.out / "lora/adapter"), out, str(files[0]), 32, arguments.seqlen)
    tokenizer = AutoTokenizer.from_pretrained(out)
    count = max(1, arguments.samples // 8)
    windows = calibration_windows(str(files[1]), tokenizer, count, arguments.seqlen, 0, len(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return {
        "method": "lora, folded", "parameters": adapter["parameters"], "before": adapter["before"],
        "after": mean_loss(model, windows), "difference": 0.0, "seconds": time.perf_counter() - start,
        "recommendation": found.recommendation, "reason": found.reason,
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    last = f"{row['seconds']:.1f}" if "losses" in row else f"({row['recommendation']})"
    print(
        f"| {row['method']} | {row['parameters']:,} | {row['before']:.3f} | {row['after']:.3f} | "
        f"{row['difference']:.0e} | {last} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
