"""Peak memory of a calibration that streams, against what it may take: embeddings, head, two blocks and 1 GiB.

    python benchmarks/low_memory.py WORK TEXT [--layers 32] [--hidden 4096] [--intermediate 11008] [--vocabulary 49152]
        [--samples 8] [--seqlen 512] [--preset fast] [--json FILE]

Writes a random Llama in bf16 to WORK (14 GB by default; one that is there is used again) and quantizes it to 4 bit, by
the command line with `--low-memory` and by `from_pretrained` with `low_memory=True`, each in a process of its own. To
see that it keeps a limit of the system's, file cache included, start it in a control group or with
`systemd-run --scope -p MemoryMax=2690M`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

PYTHON = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_gptq_plugin import GPTQConfig
model, out, text, samples, seqlen, preset = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
config = GPTQConfig(
    bits=4, group_size=128, preset=preset, dataset=text, tokenizer=tokenizer, samples=int(samples), seqlen=int(seqlen),
    seed=0, low_memory=True,
)
quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=config)
quantized.save_pretrained(out)
"""


def write_model(folder: Path, config: LlamaConfig) -> None:
    """A random checkpoint, a file for each block, and a tokenizer of single bytes."""
    generator = torch.Generator().manual_seed(0)
    hidden, wide, names = config.hidden_size, config.intermediate_size, {}

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(tensors, file))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    files = [
        f"model-{i + 1:05d}-of-{config.num_hidden_layers + 2:05d}.safetensors"
        for i in range(config.num_hidden_layers + 2)
    ]
    write(files[0], {"model.embed_tokens.weight": matrix(config.vocab_size, hidden)})
    for i, file in enumerate(files[1:-1]):
        block = f"model.layers.{i}."
        write(file, {
            **{f"{block}self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"},
            **{f"{block}mlp.{name}_proj.weight": matrix(wide, hidden) for name in ("gate", "up")},
            f"{block}mlp.down_proj.weight": matrix(hidden, wide), f"{block}input_layernorm.weight": ones,
            f"{block}post_attention_layernorm.weight": ones.clone(),
        })  # fmt: skip
    write(files[-1], {"model.norm.weight": ones, "lm_head.weight": matrix(config.vocab_size, hidden)})
    size = sum((folder / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)  # last: a folder without it is not whole


def run(name: str, command: list[str]) -> dict[str, float | str]:
    """Run a command; what it took.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command, env={**os.environ, "TQDM_DISABLE": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{name} ended with status {status}")
    return {
        "name": name, "peak_bytes": usage.ru_maxrss * 1024, "processor_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("text", type=Path, help="calibration text")
    for name, value in (
        ("layers", 32), ("hidden", 4096), ("intermediate", 11008), ("vocabulary", 49152), ("samples", 8),
        ("seqlen", 512),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128 or 1, vocab_size=options.vocabulary, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = options.work / "dense"
    if not (model / "config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        write_model(model, config)
    block = 4 * options.hidden**2 + 3 * options.hidden * options.intermediate
    kept = options.samples * options.seqlen * options.hidden
    allowed = 2 * (2 * options.vocabulary * options.hidden + 2 * block + kept) + 2**30
    numbers = [str(options.samples), str(options.seqlen)]
    rows = []
    for name in ("command", "from_pretrained"):
        out = options.work / name
        shutil.rmtree(out, ignore_errors=True)
        if name == "command":
            command = [
                "-m", "hf_gptq_cli", "quantize", str(model), str(out), "--group-size", "128", "--preset",
                options.preset,
                "--calibration", str(options.text), "--samples", numbers[0], "--seqlen", numbers[1], "--seed", "0",
                "--low-memory",
            ]  # fmt: skip
        else:
            command = ["-c", PYTHON, str(model), str(out), str(options.text), *numbers, options.preset]
        row = run(name, [sys.executable, *command])
        rows.append(row)
        print(
            f"{name:16} {float(row['peak_bytes']) / 1e9:6.2f} GB of {allowed / 1e9:.2f} allowed, "
            f"{row['processor_seconds']:8.0f} s of processor time", flush=True,
        )  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps({"allowed_bytes": allowed, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
