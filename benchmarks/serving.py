"""Tokens per second of a whole model: decoding one and eight sequences, and prefill, in Transformers and in vLLM.

    python -m benchmarks.serving MODEL [--quantized FOLDER] [--engines transformers vllm] [--threads 2] [--json FILE]
    python -m benchmarks.serving --random-1b [...]

MODEL is dense. Without `--quantized`, a copy quantized to 4 bit by rounding is made in a temporary folder: speed does
not depend on how codes were found. `--random-1b` takes a random Llama of TinyLlama-1.1B's shape instead of MODEL. Each
measurement is a process of its own; what an engine cannot run here is listed with its reason. On a machine that others
use too, `--clock cpu` takes the process's own time on the processor in place of wall time (one thread).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_gptq_plugin import native

PROMPT, STEPS = 448, 32
# engine, method, dtype: what is loaded and how; "ours int8" with activations rounded to 8 bits. The first of an
# engine is what the others are compared with.
VARIANTS = (
    ("transformers", "dense", "bfloat16"),
    ("transformers", "dense", "float32"),
    ("transformers", "ours", "bfloat16"),
    ("transformers", "ours", "float32"),
    ("transformers", "ours int8", "bfloat16"),
    ("transformers", "gptqmodel", "bfloat16"),
    ("vllm", "dense", "bfloat16"),
    ("vllm", "ours", "bfloat16"),
    ("vllm", "ours int8", "bfloat16"),
    ("vllm", "vllm gptq", "bfloat16"),
)
RATES = ("batch 1", "batch 8", "prefill")
clock = time.perf_counter  # or process_time, see --clock


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Least wall time of a call, after one to warm up."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def load(path: str, method: str, dtype: torch.dtype) -> Any:
    """The model in Transformers."""
    if method == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(path, device="cpu", dtype=dtype).model.eval()
    from transformers import AutoModelForCausalLM

    import hf_gptq_plugin  # noqa: F401  # registers the quantizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def in_transformers(path: str, method: str, dtype: torch.dtype) -> dict[str, float]:
    """Rates of the checkpoint in Transformers."""
    model = load(path, method, dtype)
    ids = torch.randint(10, model.config.vocab_size - 10, (8, PROMPT))
    rates = {}
    with torch.no_grad():  # as generate() does
        rates["prefill"] = PROMPT / seconds(lambda: model(ids[:1], logits_to_keep=1))
        for batch in (1, 8):

            def decode(batch: int = batch) -> float:
                out = model(ids[:batch, :16], use_cache=True, logits_to_keep=1)
                start = clock()
                for _ in range(STEPS):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                return batch * STEPS / (clock() - start)

            decode()
            rates[f"batch {batch}"] = max(decode() for _ in range(3))
    return rates


def in_vllm(path: str, method: str, dtype: str) -> dict[str, float]:
    """Rates of the checkpoint in vLLM's CPU build."""
    from vllm import LLM, SamplingParams

    quantization = {"dense": None, "ours": "hf_gptq", "ours int8": "hf_gptq"}.get(method, "gptq")
    engine = LLM(
        path, quantization=quantization, dtype=dtype, max_model_len=1024, max_num_seqs=8, seed=0,
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


def measure(variant: tuple[str, str, str], path: str, threads: int, timer: str) -> dict[str, Any]:
    """One variant in a process of its own: its rates, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.serving", path, "--only", "/".join(variant)]
    command += ["--threads", str(threads), "--clock", timer]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_GPTQ_ACTIVATIONS": "int8" if variant[1] == "ours int8" else "exact",
    }  # fmt: skip
    if timer == "cpu":
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that it is this process's time
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()
        errors = [line for line in lines if "Error" in line] or lines
        return {"reason": errors[-1][-300:]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def compare(source: str, quantized: str, engines: list[str], threads: int, timer: str) -> list[dict[str, Any]]:
    """Measure every variant; prints a line for each, with its rates over those of the engine's dense model."""
    heads = "".join(f"{name:>10} {'×':>5}" for name in RATES)
    print(f"{'engine':>12} {'method':>12} {'dtype':>9}{heads}   tokens per second, and times dense bf16")
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        engine, method, dtype = variant
        if engine not in engines:
            continue
        rates = measure(variant, source if method == "dense" else quantized, threads, timer)
        rows.append({"engine": engine, "method": method, "dtype": dtype, **rates})
        base = next(row for row in rows if row["engine"] == engine)
        cells = "".join(
            f"{rates[name]:10.1f} {rates[name] / base[name]:5.2f}" if name in rates and name in base else " " * 16
            for name in RATES
        )
        print(f"{engine:>12} {method:>12} {dtype:>9}{cells}", rates.get("reason", ""), flush=True)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--quantized", default="", help="a 4 bit checkpoint of MODEL")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: with one thread only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clock == "cpu":
        if options.threads != 1:
            parser.error("--clock cpu adds up the time of all threads; it needs --threads 1")
        global clock
        clock = time.process_time
    torch.set_num_threads(options.threads)
    if options.only:
        engine, method, dtype = options.only.split("/")
        if method == "ours int8" and native.status().activations != "int8":
            raise SystemExit(f"Error: {native.status().detail}")
        if engine == "transformers":
            rates = in_transformers(options.model, method, getattr(torch, dtype))
        else:
            rates = in_vllm(options.model, method, dtype)
        print(json.dumps(rates))
        return
    if bool(options.model) == options.random_1b:
        parser.error("give either MODEL or --random-1b")
    print("python -m benchmarks.serving", *sys.argv[1:])
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s), "
          f"torch {torch.__version__}, kernels: {native.status().isa or native.status().state}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source, quantized = options.model, options.quantized
        if options.random_1b:
            source = str(Path(folder) / "dense")
            make_random(Path(source))
        if not quantized:
            quantized = str(Path(folder) / "gptq")
            quantize(source, Path(quantized))
        rows = compare(source, quantized, options.engines, options.threads, options.clock)
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv[1:], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
