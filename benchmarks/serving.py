"""Tokens per second of a whole model: decoding one and eight sequences, and prefill, in Transformers and in vLLM.

    python -m benchmarks.serving MODEL [--engines transformers vllm] [--random-1b] [--threads 2] [--json FILE]

MODEL is dense; a copy quantized to 4 bit by rounding is made beside it in a temporary folder (speed does not depend
on the codes). `--random-1b` takes a random Llama of TinyLlama-1.1B's shape instead of MODEL. Each measurement is a
process of its own; what an engine cannot run here is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT, STEPS = 448, 32
# engine, method: what is loaded and how
VARIANTS = (
    ("transformers", "dense"),
    ("transformers", "ours"),
    ("vllm", "dense"),
    ("vllm", "ours"),
    ("vllm", "vllm's own gptq"),
)


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Least wall time of a call, after one to warm up."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def in_transformers(path: str) -> dict[str, float]:
    """Rates of the checkpoint in Transformers, bf16."""
    from transformers import AutoModelForCausalLM

    import hf_gptq_plugin  # noqa: F401  # registers the quantizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ids = torch.randint(10, model.config.vocab_size - 10, (8, PROMPT))
    rates = {}
    with torch.inference_mode():
        rates["prefill"] = PROMPT / seconds(lambda: model(ids[:1], logits_to_keep=1))
        for batch in (1, 8):

            def decode(batch: int = batch) -> float:
                out = model(ids[:batch, :16], use_cache=True, logits_to_keep=1)
                start = time.perf_counter()
                for _ in range(STEPS):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                return batch * STEPS / (time.perf_counter() - start)

            decode()
            rates[f"batch {batch}"] = max(decode() for _ in range(3))
    return rates


def in_vllm(path: str, method: str) -> dict[str, float]:
    """Rates of the checkpoint in vLLM's CPU build, bf16."""
    from vllm import LLM, SamplingParams

    quantization = {"dense": None, "ours": "hf_gptq"}.get(method, "gptq")
    engine = LLM(
        path, quantization=quantization, dtype="bfloat16", max_model_len=1024, max_num_seqs=8, seed=0,
        skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 1000, (8, PROMPT), generator=draw).tolist()

    def run(batch: int, length: int, tokens: int) -> None:
        asked = [{"prompt_token_ids": prompt[:length]} for prompt in prompts[:batch]]
        sampling = SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0, detokenize=False)
        engine.generate(asked, sampling, use_tqdm=False)

    rates = {"prefill": PROMPT / seconds(lambda: run(1, PROMPT, 1))}
    for batch in (1, 8):
        first = seconds(lambda b=batch: run(b, 16, 1))
        rates[f"batch {batch}"] = batch * STEPS / (seconds(lambda b=batch: run(b, 16, STEPS + 1)) - first)
    return rates


def make_random(path: Path) -> None:
    """A random Llama of TinyLlama-1.1B's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def quantize(source: str, out: Path) -> None:
    """A 4 bit copy, groups of 64, by rounding."""
    from transformers import AutoModelForCausalLM

    import hf_gptq_plugin

    config = hf_gptq_plugin.GPTQConfig(bits=4, group_size=64, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(out)


def measure(engine: str, method: str, path: str, threads: int) -> dict[str, Any]:
    """One variant in a process of its own: its rates, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.serving", path, "--only", f"{engine}/{method}"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    done = subprocess.run([*command, "--threads", str(threads)], env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()
        errors = [line for line in lines if "Error" in line] or lines
        return {"reason": errors[-1][-300:]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        engine, _, method = options.only.partition("/")
        print(
            json.dumps(in_transformers(options.model) if engine == "transformers" else in_vllm(options.model, method))
        )
        return
    if bool(options.model) == options.random_1b:
        parser.error("give either MODEL or --random-1b")
    with tempfile.TemporaryDirectory() as folder:
        source, quantized = options.model, Path(folder) / "gptq"
        if options.random_1b:
            source = str(Path(folder) / "dense")
            make_random(Path(source))
        quantize(source, quantized)
        print("python -m benchmarks.serving", *sys.argv[1:])
        print(f"{'engine':>12} {'method':>16} {'batch 1':>9} {'batch 8':>9} {'prefill':>9}  tokens per second")
        rows = []
        for engine, method in VARIANTS:
            if engine not in options.engines:
                continue
            rates = measure(engine, method, source if method == "dense" else str(quantized), options.threads)
            cells = [f"{rates[key]:9.1f}" if key in rates else f"{'-':>9}" for key in ("batch 1", "batch 8", "prefill")]
            print(f"{engine:>12} {method:>16}", *cells, rates.get("reason", ""), flush=True)
            rows.append({"engine": engine, "method": method, **rates})
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv[1:], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
