"""Train the scales of a GPTQ checkpoint in a loop of your own, and write a GPTQ checkpoint again.

    python train_scales.py SmolLM2-4bit tuned --data corpus.txt

Codes and zeros stay, so the result has the size and the speed of what went in. `eetq` (zeros too) and `l4q` are
attached in the same place. Of the others, `ste` and `shadow` also need `train.methods.advance(model)` after every step,
and of `qa-lora` `export` returns an adapter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gptq_plugin  # noqa: F401  (lets Transformers load the checkpoint)
from hf_gptq_plugin.train.methods import attach, export, parameter_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub name of a GPTQ checkpoint")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--data", type=Path, required=True, help="text file; its last tenth is kept back to evaluate on"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    parser.add_argument("--rate", type=float, default=1e-3, help="of the scales, relative to their size")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    ids = torch.tensor(tokenizer(arguments.data.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    windows = ids[: len(ids) // arguments.seqlen * arguments.seqlen].view(-1, arguments.seqlen)
    windows, held_out = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :][:16]

    names = attach(model, "affine")  # from here on scales learn, and nothing else
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments.rate))
    print(f"{len(names)} layers, {sum(p.numel() for p in model.parameters() if p.requires_grad)} scales")
    print(f"held-out loss {loss_of(model, held_out):.4f} before")
    model.train()
    for step in range(arguments.steps):
        batch = windows[torch.randint(len(windows), (arguments.batch,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    print(f"held-out loss {loss_of(model, held_out):.4f} after")

    export(model)  # plain quantized layers again, with the learned scales
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"Written to {arguments.out}. Serve it: vllm serve {arguments.out} --quantization hf_gptq")


@torch.no_grad()
def loss_of(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Mean loss per token."""
    model.eval()
    return float(torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in windows]).mean())


if __name__ == "__main__":
    main()
