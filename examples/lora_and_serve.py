"""Train a LoRA adapter on a GPTQ checkpoint with PEFT and the Trainer, then serve base and adapter with vLLM.

    python lora_and_serve.py SmolLM2-4bit adapter --data corpus.txt --prompt "In Python, a list is"

Training needs the extra `peft`; serving needs vLLM in the same environment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_gptq_plugin  # noqa: F401  (lets Transformers load the checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub name of a GPTQ checkpoint")
    parser.add_argument("adapter", type=Path, help="folder to write the adapter to")
    parser.add_argument("--data", type=Path, required=True, help="text file to train on")
    parser.add_argument("--prompt", default="The meaning of it is", help="what to ask base and adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    parser.add_argument("--serve-only", action="store_true", help="the adapter is there already")
    arguments = parser.parse_args()
    if arguments.serve_only:
        serve(arguments.base, arguments.adapter, arguments.prompt, arguments.rank)
        return
    train(arguments)
    # vLLM in a process of its own: it claims memory and threads that training still holds in this one.
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--serve-only"], check=True)


def train(arguments: argparse.Namespace) -> None:
    """Train the adapter and write it."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype="auto")
    config = LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    text = arguments.data.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // arguments.seqlen * arguments.seqlen].view(-1, arguments.seqlen)
    data: Any = [{"input_ids": window, "labels": window} for window in windows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            train_dataset=data,
            args=TrainingArguments(
                output_dir=folder, max_steps=arguments.steps, per_device_train_batch_size=arguments.batch,
                learning_rate=2e-4, logging_steps=max(1, arguments.steps // 5), save_strategy="no", report_to=[],
            ),
        )  # fmt: skip
        trainer.train()
    model.save_pretrained(str(arguments.adapter))
    print(f"Adapter written to {arguments.adapter}.")


def serve(base: str, adapter: Path, prompt: str, rank: int) -> None:
    """Ask the base and the adapter, in one engine."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError:
        print("vLLM is not installed in this environment; that is where serving would begin.")
        return
    # One slot more than adapters: on a CPU, vLLM 0.32 gives requests without an adapter the last slot's weights.
    engine: Any = LLM(
        base, quantization="hf_gptq", max_model_len=512, enforce_eager=not torch.cuda.is_available(),
        enable_lora=True, max_loras=2, max_lora_rank=max(8, rank),
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=24)
    for name, request in (("base", None), ("adapter", LoRARequest("mine", 1, str(adapter)))):
        (answer,) = engine.generate([prompt], settings, lora_request=request, use_tqdm=False)
        print(f"{name}: {prompt + answer.outputs[0].text!r}")
    print(
        f"As a server: vllm serve {base} --quantization hf_gptq --enable-lora --max-loras 2 "
        f"--max-lora-rank {max(8, rank)} --lora-modules mine={adapter}"
    )


if __name__ == "__main__":
    main()
