"""Throughput and latency of `vllm serve` under a bounded load on loopback, one served model after another.

    python benchmarks/serving_load.py dense=MODEL ours=QUANTIZED:hf_gptq [theirs=QUANTIZED:gptq]
        [--requests 24] [--concurrency 1,8] [--prompt 64] [--tokens 32] [--dtype bfloat16] [--eager] [--json FILE]

NAME=FOLDER[:METHOD], METHOD as in --quantization. Every request streams `--tokens` greedy tokens after `--prompt`
random ones; all servers get the same prompts. Before anything is timed, each must answer one prompt twice alike, with
as many tokens as were asked for. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_server import serving, vllm_version


@dataclass
class Answer:
    """One request: its tokens, and seconds until the first and until the last of them."""

    tokens: list[str]
    first: float
    last: float


@dataclass
class Figures:
    """What a server did at one concurrency; milliseconds but for the rate."""

    tokens_per_second: float
    first_token_p50: float
    first_token_p95: float
    per_token_p50: float
    whole_p50: float
    whole_p95: float


def ask(address: str, prompt: list[int], tokens: int) -> Answer:
    """One streamed request."""
    body = {
        "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "logprobs": 0, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    said: list[str] = []
    start, first = time.perf_counter(), 0.0
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            first = first or time.perf_counter() - start
            said += json.loads(data)["choices"][0]["logprobs"]["tokens"]
    return Answer(said, first, time.perf_counter() - start)


def measure(address: str, prompts: list[list[int]], tokens: int, concurrency: int) -> Figures:
    """All prompts, `concurrency` of them at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda prompt: ask(address, prompt, tokens), prompts))
    seconds = time.perf_counter() - start
    whole = [answer.last * 1e3 for answer in answers]
    first = [answer.first * 1e3 for answer in answers]
    between = [(answer.last - answer.first) * 1e3 / max(1, tokens - 1) for answer in answers]
    return Figures(
        sum(len(answer.tokens) for answer in answers) / seconds,
        statistics.median(first), _p95(first), statistics.median(between), statistics.median(whole), _p95(whole),
    )  # fmt: skip


def _p95(values: list[float]) -> float:
    return sorted(values)[round(0.95 * (len(values) - 1))]


def check(address: str, prompt: list[int], tokens: int) -> None:
    """The server answers, and answers alike.

    Raises:
        RuntimeError: it does not.
    """
    first, second = (ask(address, prompt, tokens).tokens for _ in range(2))
    if len(first) != tokens or first != second:
        raise RuntimeError(f"the server said {first}, then {second}, to the same prompt; asked for {tokens} tokens")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("served", nargs="+", metavar="NAME=FOLDER[:METHOD]")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    levels = [int(level) for level in options.concurrency.split(",")]
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 5000) for _ in range(options.prompt)] for _ in range(options.requests)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, vLLM {vllm_version()}; {' '.join(sys.argv)}")
    columns = ("tokens/s", "first p50", "first p95", "per token", "whole p50", "whole p95")
    print(f"{'':>10} {'at once':>8} " + " ".join(f"{column:>10}" for column in columns) + "  (ms)")
    found = {}
    for served in options.served:
        name, _, rest = served.partition("=")
        folder, _, method = rest.partition(":")
        arguments = [
            "--served-model-name", "model", "--dtype", options.dtype, "--max-num-seqs", str(max(levels)),
            "--max-model-len", str(options.prompt + options.tokens), "--no-enable-prefix-caching",
            *(("--quantization", method) if method else ()), *(("--enforce-eager",) if options.eager else ()),
        ]  # fmt: skip
        with serving(folder, *arguments) as address:
            check(address, prompts[0], options.tokens)
            for level in levels:
                figures = measure(address, prompts, options.tokens, level)
                found[f"{name}, {level} at once"] = asdict(figures)
                print(f"{name:>10} {level:>8} " + " ".join(f"{value:>10.1f}" for value in asdict(figures).values()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
