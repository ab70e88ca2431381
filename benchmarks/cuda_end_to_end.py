"""A model on an NVIDIA GPU from dense weights to an adapter: quantize, evaluate, generate, one LoRA step.

    python -m benchmarks.cuda_end_to_end MODEL --calibration FILE --text FILE [--new-tokens 256] [--json FILE]
    python -m benchmarks.cuda_end_to_end --random 32,4096,11008

Everything is measured twice in the same run, on the dense bf16 model and on the quantized one: perplexity, tokens per
second of greedy generation at each batch size, as Transformers generates and as a CUDA graph of one step replays it
(behind 128 tokens), tokens per second of a prefill, microseconds for which a linear layer keeps the host, seconds of a
LoRA step, peak memory. `--random LAYERS,HIDDEN,INTERMEDIATE` takes a random Llama made on the GPU and rounds it: no
file, no perplexity. Exits with an error where the quantized model's loss is not finite, or its perplexity is more than
1.5 times the dense one's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_kernels import graph_us

Figures = dict[str, float]


def numbers(text: str) -> list[int]:
    """`1,16` as a list."""
    return [int(part) for part in text.split(",")]


def generation(model: Any, prompt: torch.Tensor, batch: int, new_tokens: int) -> float:
    """New tokens per second, all sequences together; the second of two runs."""
    ids = prompt.expand(batch, -1).contiguous()
    seconds = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return float(batch * (out.shape[1] - ids.shape[1]) / seconds)


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


@torch.no_grad()
def host(model: Any, calls: int = 200) -> float:
    """Microseconds for which one linear layer keeps the host on one row, the least of five: what Python costs.

    So few calls that the GPU's queue, of 1024 launches, never fills.
    """
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.zeros(1, layer.in_features, dtype=model.dtype, device=model.device)
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            layer(x)
        best = min(best, time.perf_counter() - start)
        torch.cuda.synchronize()
    return best / calls * 1e6


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


def measure(model: Any, prompt: torch.Tensor, windows: list[Any], text: torch.Tensor | None, options: Any) -> Figures:
    """All figures of one model; without `text` on random tokens, and no perplexity."""
    from hf_gptq_plugin.hf.evaluate import perplexity

    torch.cuda.reset_peak_memory_stats()
    model.eval()
    figures: Figures = {}
    if text is not None:
        figures["perplexity"] = float(perplexity(model, windows))
    for batch in options.batches:
        figures[f"tokens_per_second_{batch}"] = generation(model, prompt, batch, options.new_tokens)
        figures[f"graph_tokens_per_second_{batch}"] = replayed(model, batch)
    figures["prefill_tokens_per_second"] = prefill(model, windows[0].reshape(1, -1).to(model.device))
    figures["host_microseconds_per_layer"] = host(model)
    figures["generation_bytes"] = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = windows[0].reshape(1, -1) if text is None else text
    figures["lora_step_seconds"], figures["lora_loss"] = lora_step(
        model, ids[:, : options.train_tokens].to(model.device)
    )
    figures["training_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def random_pair(shape: list[int], bits: int, group_size: int) -> Iterator[Any]:
    """A random Llama on the GPU, in bf16, then the same one rounded, in its place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_gptq_plugin import GPTQConfig
    from hf_gptq_plugin.calibrate.datafree import quantize_without_data
    from hf_gptq_plugin.calibrate.plan import Plan

    layers, hidden, intermediate = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=hidden // 128,
        vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    yield model
    chosen = GPTQConfig(bits=bits, group_size=group_size, method="rtn", scale_search="minmax")
    quantize_without_data(model, Plan(checkpoint=chosen.checkpoint, settings=chosen.settings), "rtn")
    yield model


def real_pair(tokenizer: Any, options: argparse.Namespace) -> Iterator[Any]:
    """The dense model, then the quantized one."""
    from transformers import AutoModelForCausalLM

    from hf_gptq_plugin import GPTQConfig

    yield AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, device_map="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    yield AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        device_map="cuda",
        quantization_config=GPTQConfig(
            bits=options.bits, group_size=options.group_size, samples=options.samples, tokenizer=tokenizer,
            preset=options.preset, method=options.method,
            dataset=options.calibration if options.method == "gptq" else None,
        ),
    )  # fmt: skip


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--random", type=numbers, help="layers, hidden size, intermediate size, in place of MODEL")
    parser.add_argument("--calibration", help="text file")
    parser.add_argument("--text", help="held-out text file")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--method", default="gptq", help="gptq, or rtn and hqq, which read no text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--train-tokens", type=int, default=1024)
    parser.add_argument("--batches", type=numbers, default=[1, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if bool(options.model) == bool(options.random) or (options.random and len(options.random) != 3):
        parser.error("give either MODEL or --random LAYERS,HIDDEN,INTERMEDIATE")
    if (options.model and not options.text) or (options.model and options.method == "gptq" and not options.calibration):
        parser.error("MODEL needs --text, and --calibration but for --method rtn and hqq")
    if not torch.cuda.is_available():
        raise SystemExit("cuda_end_to_end: there is no CUDA device here (or this torch was built without CUDA)")

    from transformers import AutoTokenizer

    from hf_gptq_plugin import native_cuda
    from hf_gptq_plugin.hf.evaluate import text_windows

    problem = native_cuda.problem(torch.device("cuda", torch.cuda.current_device()))
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "kernels": problem or "in use",
        "command": "python -m benchmarks.cuda_end_to_end " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    if options.random:
        generator = torch.Generator().manual_seed(0)
        windows, train_text = [torch.randint(10, 30000, (1, 2048), generator=generator)], None
        prompt, pair = windows[0][:, :8].cuda(), random_pair(options.random, options.bits, options.group_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = Path(options.text).read_text(encoding="utf-8")
        windows = text_windows(tokenizer, text, 2048, options.windows)
        train_text = tokenizer(" ".join(text.split()[: 4 * options.train_tokens]), return_tensors="pt").input_ids
        prompt = tokenizer("The history of the city begins with", return_tensors="pt").input_ids.cuda()
        pair = real_pair(tokenizer, options)
    report["dense"] = measure(next(pair), prompt, windows, train_text, options)
    start = time.perf_counter()
    model = next(pair)
    report["quantize_seconds"] = time.perf_counter() - start
    report["quantized"] = measure(model, prompt, windows, train_text, options)
    print(", ".join(f"{k} {report[k]}" for k in ("gpu", "torch", "kernels", "command")))
    print(f"quantized in {report['quantize_seconds']:.0f} s")
    print(f"{'':>28} {'dense bf16':>12} {'quantized':>12} {'×':>6}")
    for name, dense in report["dense"].items():
        ours = report["quantized"][name]
        print(f"{name:>28} {dense:12.5g} {ours:12.5g} {ours / dense:6.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    ratio = 1.0 if options.random else report["quantized"]["perplexity"] / report["dense"]["perplexity"]
    if not math.isfinite(report["quantized"]["lora_loss"]) or not ratio < 1.5:
        raise SystemExit(f"the quantized model is wrong: perplexity × {ratio:.2f}, LoRA loss {report['quantized']}")


if __name__ == "__main__":
    main()
