"""A model on an NVIDIA GPU from dense weights to an adapter: quantize, evaluate, generate, one LoRA step.

    python -m benchmarks.cuda_end_to_end MODEL --calibration FILE --text FILE [--new-tokens 256] [--json FILE]

Everything is measured twice in the same run, on the dense bf16 model and on the quantized one: perplexity, tokens per
second of greedy generation at each batch size, as Transformers generates and as a CUDA graph of one step replays it
(behind 128 tokens), tokens per second of a prefill, seconds of a LoRA step, peak memory. Exits with an error where the
quantized model's loss is not finite, or its perplexity is more than 1.5 times the dense one's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_kernels import graph_us


def generation(model: Any, tokenizer: Any, batch: int, new_tokens: int) -> float:
    """New tokens per second, all sequences together; the second of two runs."""
    prompt = tokenizer(["The history of the city begins with"] * batch, return_tensors="pt").to(model.device)
    seconds = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            **prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return float(batch * (out.shape[1] - prompt["input_ids"].shape[1]) / seconds)


@torch.no_grad()
def replayed(model: Any, batch: int, replays: int = 50) -> float:
    """New tokens per second, all sequences together, of one step of generation behind 128 tokens, in a CUDA graph."""
    from transformers import StaticCache

    behind, room = 128, 128 + replays + 8  # every step takes a place of the cache
    cache = StaticCache(config=model.config, max_cache_len=room)
    ids = torch.randint(10, 200, (batch, behind), device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    token, position = ids[:, :1].clone(), torch.full((batch, 1), behind, device=model.device)
    seen = (torch.arange(room, device=model.device) <= behind).expand(batch, 1, 1, room)

    def step() -> None:
        model(input_ids=token, position_ids=position, attention_mask=seen, past_key_values=cache, use_cache=True)

    torch.cuda.synchronize()  # the graph is warmed up on another stream
    return batch / graph_us([step], replays) * 1e6


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> float:
    """Tokens per second of reading a prompt, the best of three."""
    best = math.inf
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return ids.numel() / best


def lora_step(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a training step with LoRA on every linear layer, the last of three, and its loss."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    peft.train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-4)
    seconds = loss = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = peft(input_ids=ids, labels=ids).loss
        result.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds, loss = time.perf_counter() - start, float(result.detach())
    peft.unload()
    return seconds, loss


def measure(model: Any, tokenizer: Any, windows: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    from hf_gptq_plugin.hf.evaluate import perplexity

    torch.cuda.reset_peak_memory_stats()
    model.eval()
    figures: dict[str, Any] = {"perplexity": float(perplexity(model, windows))}
    for batch in options.batches:
        figures[f"tokens_per_second_{batch}"] = generation(model, tokenizer, batch, options.new_tokens)
        figures[f"graph_tokens_per_second_{batch}"] = replayed(model, batch)
    figures["prefill_tokens_per_second"] = prefill(model, windows[0].reshape(1, -1).to(model.device))
    figures["generation_bytes"] = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    text = " ".join(Path(options.text).read_text(encoding="utf-8").split()[: 4 * options.train_tokens])
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.train_tokens].to(model.device)
    figures["lora_step_seconds"], figures["lora_loss"] = lora_step(model, ids)
    figures["training_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--text", required=True, help="held-out text file")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--method", default="gptq", help="gptq, or rtn and hqq, which read no text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--train-tokens", type=int, default=1024)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("cuda_end_to_end: there is no CUDA device here (or this torch was built without CUDA)")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_gptq_plugin import GPTQConfig, native_cuda
    from hf_gptq_plugin.hf.evaluate import text_windows

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = text_windows(tokenizer, Path(options.text).read_text(encoding="utf-8"), 2048, options.windows)
    problem = native_cuda.problem(torch.device("cuda", torch.cuda.current_device()))
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "kernels": problem or "in use",
        "command": "python -m benchmarks.cuda_end_to_end " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, device_map="cuda")
    report["dense"] = measure(model, tokenizer, windows, options)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        device_map="cuda",
        quantization_config=GPTQConfig(
            bits=options.bits, group_size=options.group_size, samples=options.samples, tokenizer=tokenizer,
            preset=options.preset, method=options.method,
            dataset=options.calibration if options.method == "gptq" else None,
        ),
    )  # fmt: skip
    report["quantize_seconds"] = time.perf_counter() - start
    report["quantized"] = measure(model, tokenizer, windows, options)
    print(", ".join(f"{k} {report[k]}" for k in ("gpu", "torch", "kernels", "command")))
    print(f"quantized in {report['quantize_seconds']:.0f} s")
    print(f"{'':>24} {'dense bf16':>12} {'quantized':>12} {'×':>6}")
    for name, dense in report["dense"].items():
        ours = report["quantized"][name]
        print(f"{name:>24} {dense:12.5g} {ours:12.5g} {ours / dense:6.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    ratio = report["quantized"]["perplexity"] / report["dense"]["perplexity"]
    if not math.isfinite(report["quantized"]["lora_loss"]) or not ratio < 1.5:
        raise SystemExit(f"the quantized model is wrong: perplexity × {ratio:.2f}, LoRA loss {report['quantized']}")


if __name__ == "__main__":
    main()
