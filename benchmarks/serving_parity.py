"""Perplexity of one GPTQ checkpoint in Transformers and in vLLM, on the same windows of a text.

    python benchmarks/serving_parity.py CHECKPOINT --text FILE [--windows 8] [--seqlen 512] [--dtype float32]
        [--adapter FOLDER]

Both run in this process, one after the other, on this package's ops. Beside the two perplexities stands the largest
difference between log-probabilities of the text's tokens: a mean would hide tokens that differ.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from vllm_server import vllm_version

import hf_gptq_plugin  # noqa: F401  (registers the quantizer)
from hf_gptq_plugin.hf.evaluate import text_windows


@torch.no_grad()
def in_transformers(options: Any, windows: list[list[int]]) -> list[torch.Tensor]:
    """Log-probability of every token but each window's first."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=getattr(torch, options.dtype)
    )
    if options.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.adapter)
    model.eval()
    found = []
    for window in windows:
        tokens = torch.tensor([window])
        logs = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(logs.gather(1, tokens[0, 1:, None])[:, 0])
    return found


def in_vllm(options: Any, windows: list[list[int]]) -> tuple[list[torch.Tensor], str]:
    """The same, and the quantization method that served it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm
    from vllm.lora.request import LoRARequest

    adapters: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64} if options.adapter else {}
    llm = vllm.LLM(
        options.checkpoint, dtype=options.dtype, enforce_eager=True, max_model_len=options.seqlen + 1, max_num_seqs=4,
        max_num_batched_tokens=2 * options.seqlen, **adapters,
    )  # fmt: skip
    outputs = llm.generate(
        [{"prompt_token_ids": window} for window in windows],
        vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        lora_request=LoRARequest("adapter", 1, options.adapter) if options.adapter else None,
        use_tqdm=False,
    )
    found = [
        torch.tensor([place[token].logprob for token, place in zip(w[1:], output.prompt_logprobs[1:], strict=True)])
        for w, output in zip(windows, outputs, strict=True)
    ]
    return found, str(llm.llm_engine.model_config.quantization)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--adapter", default="")
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.checkpoint)
    cut = text_windows(tokenizer, options.text.read_text(), options.seqlen, options.windows)
    windows = [window[0].tolist() for window in cut]
    ours = in_transformers(options, windows)
    gc.collect()
    theirs, method = in_vllm(options, windows)
    mine, other = (torch.cat(found).double() for found in (ours, theirs))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, vLLM {vllm_version()} with {method}; {' '.join(sys.argv)}"
    )
    for name, logs in (("Transformers", mine), ("vLLM", other)):
        print(f"{name:>12}: perplexity {math.exp(-float(logs.mean())):.6f} over {len(logs)} tokens")
    apart = (mine - other).abs()
    print(f"log-probabilities differ by at most {float(apart.max()):.1e}, on average by {float(apart.mean()):.1e}")


if __name__ == "__main__":
    main()
