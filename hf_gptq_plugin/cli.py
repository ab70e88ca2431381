"""The command `hf-gptq`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .calibrate import processes
from .calibrate.journal import JournalError
from .calibrate.sources import NAMED, CalibrationError, read_text
from .calibrate.walk import WalkError
from .config import METHODS as QUANTIZERS
from .config import PRESETS, GPTQConfig
from .convert.layouts import TARGETS as LAYOUTS
from .native import NativeError
from .solve.gptq import ORDERS
from .solve.hessian import SolveError
from .solve.scales import METHODS as SEARCHES
from .train.loop import TrainingError

app = typer.Typer(
    name="hf-gptq",
    help="GPTQ for Transformers and vLLM: quantize, evaluate, check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=False)

# What a user can mend; everything else is a defect of ours and shows its traceback.
USER_ERRORS = (
    CalibrationError, JournalError, WalkError, SolveError, NativeError, TrainingError, ValueError, OSError, ImportError,
)  # fmt: skip

_DEFAULT = {name: field.default for name, field in signature(GPTQConfig).parameters.items()}
_PRESETS = "Steps of the preset, one by one"
_SOLVER = "Solver"

Dtype = Annotated[
    str, typer.Option(help="dtype of the unquantized parts and of the arithmetic: float32, bfloat16, float16, auto.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def main() -> None:
    """Entry point: errors a user can mend are one line on stderr and exit code 1."""
    try:
        app(standalone_mode=True)
    except USER_ERRORS as error:
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.")],
    bits: Annotated[int, typer.Option(help="Width of a code: 2, 3, 4 or 8.")] = _DEFAULT["bits"],
    group_size: Annotated[int, typer.Option(help="Input features per scale; -1 for one group.")] = _DEFAULT[
        "group_size"
    ],
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric or asymmetric grid.")] = _DEFAULT["sym"],
    desc_act: Annotated[bool, typer.Option(help="Let groups follow the solve order (g_idx).")] = _DEFAULT["desc_act"],
    calibration: Annotated[
        str,
        typer.Option(help=f"File (.txt, .json, .jsonl, .csv, .parquet), or name of a data set: {', '.join(NAMED)}."),
    ] = "wikitext2",
    method: Annotated[
        str, typer.Option(help=f"One of {', '.join(QUANTIZERS)}; all but gptq use no calibration data.")
    ] = _DEFAULT["method"],
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = _DEFAULT["samples"],
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration window.")] = _DEFAULT["seqlen"],
    seed: Annotated[int, typer.Option(help="Which windows are drawn from a longer text.")] = _DEFAULT["seed"],
    preset: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(PRESETS)}. fast: less time, higher perplexity; best: lower perplexity, more time."
        ),
    ] = _DEFAULT["preset"],
    generated: Annotated[
        float | None,
        typer.Option(
            help="Windows that the model writes itself, as a multiple of the samples; 0 with --low-memory.",
            rich_help_panel=_PRESETS,
        ),
    ] = None,
    propagation: Annotated[
        float | None,
        typer.Option(help="How much of earlier layers' error a layer takes over, 0 to 1.", rich_help_panel=_PRESETS),
    ] = None,
    descent: Annotated[
        int | None, typer.Option(help="Rounds of coordinate descent on the codes.", rich_help_panel=_PRESETS)
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Fit scales to the codes.", rich_help_panel=_PRESETS)
    ] = None,
    block_epochs: Annotated[
        int | None,
        typer.Option(help="Passes in which a block's rounding and scales learn.", rich_help_panel=_PRESETS),
    ] = None,
    model_epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes in which the whole model's scales, norms and biases learn; 0 with --low-memory.",
            rich_help_panel=_PRESETS,
        ),
    ] = None,
    order: Annotated[
        str, typer.Option(help=f"Of the columns: {' or '.join(ORDERS)}.", rich_help_panel=_SOLVER)
    ] = _DEFAULT["order"],
    scale_search: Annotated[
        str, typer.Option(help=f"How scales are chosen: {', '.join(SEARCHES)}.", rich_help_panel=_SOLVER)
    ] = _DEFAULT["scale_search"],
    damp_percent: Annotated[
        float, typer.Option(help="Damping, as a fraction of the Hessian diagonal's mean.", rich_help_panel=_SOLVER)
    ] = _DEFAULT["damp_percent"],
    checkpoint_format: Annotated[str, typer.Option("--format", help="gptq (v1) or gptq_v2.")] = "gptq",
    lm_head: Annotated[bool, typer.Option(help="Quantize the output embedding too.")] = _DEFAULT["lm_head"],
    dtype: Dtype = "auto",
    device_map: Annotated[str, typer.Option(help="Where the model is loaded, e.g. cpu, cuda, auto.")] = "cpu",
    low_memory: Annotated[
        bool, typer.Option(help="Keep on disk what is not worked on: for models larger than memory.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write calibration.html, .json and .csv into OUT.")] = True,
    eval_text: Annotated[
        Path | None, typer.Option(help="Text file: measure perplexity before and after, for the report.")
    ] = None,
    eval_windows: Annotated[int, typer.Option(help="Windows of --eval-text, from the beginning; 0 for all.")] = 8,
    eval_seqlen: Annotated[int, typer.Option(help="Tokens per window of --eval-text.")] = 2048,
) -> None:
    """Quantize MODEL and write a GPTQ checkpoint to OUT.

    While it works, what is finished lies in OUT.journal; interrupted, the same command goes on from there. Under
    torchrun or accelerate launch, the processes share the calibration text.

    Example: hf-gptq quantize ./smollm2 ./smollm2-4bit --group-size 64 --calibration corpus.txt --samples 64
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .calibrate.report import Perplexity
    from .hf.evaluate import perplexity, text_windows
    from .hf.report import write_report
    from .hf.saving import save_checkpoint

    start = time.perf_counter()
    processes.join()
    dataset = calibration if method == "gptq" else None
    config = GPTQConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, dataset=dataset, samples=samples, seqlen=seqlen,
        seed=seed, method=method, preset=preset, generated=generated, propagation=propagation, descent=descent,
        refit=refit,        block_epochs=block_epochs, model_epochs=model_epochs, order=order,
        scale_search=scale_search, damp_percent=damp_percent, format=checkpoint_format, lm_head=lm_head,
        low_memory=low_memory,
    )  # fmt: skip
    journal = out.with_name(f"{out.name}.journal")
    if method == "gptq":
        config.journal = str(journal)
    if out.is_file():
        raise ValueError(f"OUT={str(out)!r} is a file; name a folder")
    tokenizer = AutoTokenizer.from_pretrained(model)
    config.tokenizer = tokenizer
    where = {"": device_map} if low_memory else device_map
    loading = {"dtype": _dtype(dtype), "device_map": where}
    pieces, before = [], None
    if eval_text is not None:
        pieces = text_windows(tokenizer, read_text(eval_text), eval_seqlen, eval_windows or None)
        before = perplexity(AutoModelForCausalLM.from_pretrained(model, **loading), pieces)
    quantized: Any = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, **loading)
    if processes.rank():
        return  # all processes hold the same model; the first one writes it
    save_checkpoint(quantized, out, tokenizer=tokenizer)
    quality = None
    if eval_text is not None:
        tokens = sum(p.shape[1] for p in pieces)
        quality = Perplexity(eval_text.name, len(pieces), eval_seqlen, tokens, before, perplexity(quantized, pieces))
        console.print(f"Perplexity {quality.dense:.4f} before, {quality.quantized:.4f} after.")
    page = write_report(out, quantized, quality) if report else None
    shutil.rmtree(journal, ignore_errors=True)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    layers = len(quantized.hf_quantizer.reports)
    console.print(
        f"Quantized {layers} layers to {bits} bit in {time.perf_counter() - start:.0f} s; "
        f"{out} holds {size / 1e6:.1f} MB of weights."
    )
    if page is not None:
        console.print(f"What the calibration did: {page}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name, quantized or not.")],
    text: Annotated[Path, typer.Option(help="Text file.")],
    windows: Annotated[int, typer.Option(help="Windows, from the beginning; 0 for all.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    dtype: Dtype = "float32",
    device_map: Annotated[str, typer.Option(help="Where the model is loaded.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL on a text.

    Example: hf-gptq eval ./smollm2-4bit --text held-out.txt --windows 8 --seqlen 2048
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .hf.evaluate import perplexity, text_windows

    content = read_text(text)
    pieces = text_windows(AutoTokenizer.from_pretrained(model), content, seqlen, windows or None)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=_dtype(dtype), device_map=device_map)
    start = time.perf_counter()
    value = perplexity(loaded, pieces)
    seconds = time.perf_counter() - start
    tokens = sum(p.shape[1] for p in pieces)
    if as_json:
        result = {"model": model, "perplexity": value, "windows": len(pieces), "seqlen": seqlen, "tokens": tokens}
        print(json.dumps(result))
        return
    console.print(f"perplexity {value:.4f}  ({len(pieces)} windows, {tokens} tokens, {seconds:.0f} s)")


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Folder or Hub name: GPTQ, AWQ, compressed-tensors, or dense.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; adapters go to OUT/adapter.")],
    data: Annotated[str, typer.Option(help="Text or chats: a file, or the name of a data set.")],
    method: Annotated[str, typer.Option(help="lora, qa-lora, affine, eetq, ste, shadow or l4q.")] = "lora",
    held_out: Annotated[
        str | None, typer.Option(help="What to evaluate on; a tenth of --data is kept back otherwise.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Which layers learn: last parts of names, with commas; all by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Most windows of --data.")] = 256,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    rate: Annotated[float | None, typer.Option(help="Learning rate; the method's own by default.")] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of windows and their order.")] = 0,
    rank: Annotated[int | None, typer.Option(help="Of lora, qa-lora and l4q.", rich_help_panel="Method")] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Factor of lora, qa-lora and l4q (lora_alpha / r).", rich_help_panel="Method")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Steps between roundings.", rich_help_panel="shadow")] = None,
    cap: Annotated[
        float | None, typer.Option(help="Largest share of codes that change at once.", rich_help_panel="shadow")
    ] = None,
    decay: Annotated[float | None, typer.Option(help="How much a rounding forgets.", rich_help_panel="shadow")] = None,
    bits: Annotated[int, typer.Option(help="Width of a code.", rich_help_panel="Dense models")] = _DEFAULT["bits"],
    group_size: Annotated[
        int, typer.Option(help="Input features per scale.", rich_help_panel="Dense models")
    ] = _DEFAULT["group_size"],
    preset: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRESETS)}.", rich_help_panel="Dense models")
    ] = _DEFAULT["preset"],
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Train on a quantized base and write what vLLM serves: a GPTQ checkpoint, or an adapter for one.

    A dense MODEL is quantized first, on --data. Interrupted, the same command goes on (OUT.training).

    Example: hf-gptq train ./smollm2-4bit ./tuned --method affine --data corpus.txt --steps 50
    """
    from tqdm.auto import tqdm

    from .hf.training import LORA_RATE, TRAINABLE, Data, run
    from .train.loop import TrainSettings
    from .train.methods import METHODS

    if method not in TRAINABLE:
        raise ValueError(f"--method={method!r} is not known; use one of {', '.join(TRAINABLE)}")
    usual = LORA_RATE if method == "lora" else METHODS[method].rate
    settings = TrainSettings(steps=steps, batch=batch, rate=usual if rate is None else rate, warmup=warmup, seed=seed)
    asked = {"rank": rank, "gamma": gamma, "every": every, "cap": cap, "decay": decay}
    options = {name: value for name, value in asked.items() if value is not None}
    names = None if target_modules is None else [name.strip() for name in target_modules.split(",")]
    quantization = {"bits": bits, "group_size": group_size, "preset": preset, "dataset": data, "seed": seed}
    with tqdm(total=steps, desc="Training", unit="step", disable=as_json) as bar:

        def progress(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"loss {loss:.4f}")

        found = run(
            model, out, method, Data(data, held_out, samples, seqlen), settings, quantization, names, options,
            _dtype(dtype), progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(vars(found)))
        return
    console.print(
        f"{found.method}: {found.parameters / 1e6:.2f} M numbers in {found.layers} layers; held-out loss "
        f"{found.before:.4f} before, {found.after:.4f} after."
    )
    console.print(f"Loaded again, logits are the trained model's to {found.difference:.1e} of the largest.")
    lora = "" if found.adapter is None else f" --enable-lora --lora-modules tuned={found.adapter}"
    console.print(f"vllm serve {found.folder} --quantization hf_gptq{lora}", soft_wrap=True, highlight=False)


@app.command()
def fold(
    base: Annotated[str, typer.Argument(help="Folder or Hub name of a GPTQ checkpoint.")],
    adapter: Annotated[str, typer.Argument(help="Folder or Hub name of a LoRA adapter trained on it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    calibration: Annotated[str, typer.Option(help="Text or chats: a file, or the name of a data set.")],
    samples: Annotated[int, typer.Option(help="Windows; an eighth is kept back to compare.")] = 32,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(help="Which windows are drawn from a longer text.")] = 0,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Fold a LoRA adapter into the codes and scales of its GPTQ base, and say whether that is a good idea.

    Example: hf-gptq fold ./smollm2-4bit ./tuned/adapter ./folded --calibration corpus.txt
    """
    from .hf.folding import run

    found = run(base, adapter, out, calibration, samples, seqlen, seed, _dtype(dtype))
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    table = Table(header_style="bold")
    for column in ("layer", "residual", "codes changed", "by"):
        table.add_column(column)
    for name, layer in found.layers.items():
        table.add_row(name, f"{layer.residual:.3f}", f"{100 * layer.codes:.2f} %", layer.chosen)
    console.print(table)
    console.print(
        f"Perplexity {found.folded.reference_perplexity:.4f} with the adapter, {found.folded.perplexity:.4f} folded, "
        f"{found.base.perplexity:.4f} without."
    )
    console.print(f"[bold]{found.recommendation}[/]: {found.reason}.")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file, or Hub name.")],
    values: Annotated[bool, typer.Option(help="Read scales and group indices too, not only headers.")] = True,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, how large it is, what runs it, and what is wrong with it. Exit code 1 for problems.

    Example: hf-gptq inspect ./smollm2-4bit
    """
    from .convert.inspect import inspect as look

    found = look(_folder(model), values)
    if as_json:
        print(json.dumps(found.to_dict()))
        raise typer.Exit(1 if found.problems else 0)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("format", found.layout + ("" if found.layout == found.label else f" (labelled {found.label})"))
    table.add_row("architecture", found.architecture)
    for kind in found.modules:
        rest = ", ".join(f"{name} {value}" for name, value in kind.items() if name != "modules")
        table.add_row("modules", f"{kind['modules']}: {rest}")
    size = found.quantized_bytes + found.dense_bytes
    table.add_row("weights", f"{found.parameters / 1e6:.1f} M in {size / 1e6:.1f} MB")
    if found.bf16_bytes:
        ratio = found.bf16_bytes / max(found.quantized_bytes, 1)
        table.add_row("quantized part", f"{found.quantized_bytes / 1e6:.1f} MB, {ratio:.2f} times less than in bf16")
    for stack, answer in found.runs.items():
        table.add_row(stack, answer)
    for problem in found.problems:
        table.add_row("[red]problem[/]", problem)
    console.print(table)
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder or Hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")],
    shard: Annotated[float, typer.Option(help="Largest file, in GB.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of dense weights: bfloat16, float16, float32.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in another reader's layout, or its weights dense; what is lost is said.

    Every module is read back from what was written and compared with its source.

    Example: hf-gptq convert ./model-awq ./model-gptq --to gptq_v2
    """
    from tqdm.auto import tqdm

    from .convert.source import open_source
    from .convert.stream import convert as rewrite

    kept = _dtype(dtype)
    if kept == "auto":
        raise ValueError("--dtype='auto' is not supported here; use bfloat16, float16 or float32")
    source = open_source(_folder(model))
    with tqdm(total=len(source.modules), desc="Converting", unit="layer", disable=as_json) as bar:
        done = rewrite(source, out, to, max(int(shard * 1e9), 1), kept, lambda outcome: bar.update() and None)
    lossy = [outcome for outcome in done if not outcome.exact]
    if as_json:
        print(json.dumps({"from": source.layout, "to": to, "modules": [vars(outcome) for outcome in done]}))
        return
    if source.layout != source.label:
        console.print(f"The source is labelled {source.label}, and its zero points are {source.layout}: read as such.")
    if lossy:
        worst = max(lossy, key=lambda outcome: outcome.error)
        console.print(
            f"{len(lossy)} of {len(done)} modules changed: {worst.note}; at most {worst.error:.2e} relative to the "
            f"weight, in {worst.module}."
        )
    else:
        console.print(f"All {len(done)} modules are what they were, bit for bit in float32.")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    console.print(f"{out} holds {size / 1e6:.1f} MB as {to}.")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub name.")],
    reference: Annotated[str, typer.Argument(help="Folder or Hub name of what it should be like.")],
    text: Annotated[Path, typer.Option(help="Text file.")],
    windows: Annotated[int, typer.Option(help="Windows, from the beginning; 0 for all.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_divergence: Annotated[
        float | None, typer.Option(help="Exit code 1 where the mean KL divergence per token is larger.")
    ] = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Two models side by side on a text: perplexity, KL divergence and agreement on the likeliest next token.

    Example: hf-gptq verify ./smollm2-4bit ./smollm2 --text held-out.txt
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .hf.evaluate import compared, text_windows

    pieces = text_windows(AutoTokenizer.from_pretrained(reference), read_text(text), seqlen, windows or None)
    first, second = (AutoModelForCausalLM.from_pretrained(name, dtype=_dtype(dtype)) for name in (model, reference))
    found = compared(first, second, pieces)
    failed = max_divergence is not None and not found.divergence <= max_divergence
    if as_json:
        print(json.dumps({"model": model, "reference": reference, **vars(found)}))
    else:
        table = Table(show_header=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row("perplexity", f"{found.perplexity:.4f}, reference {found.reference_perplexity:.4f}")
        table.add_row("KL divergence", f"{found.divergence:.3e} per token on average, {found.largest:.3e} at most")
        table.add_row("same likeliest token", f"{100 * found.agreement:.2f} % of {found.tokens} tokens")
        console.print(table)
    raise typer.Exit(1 if failed else 0)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, what works, and what to do about what does not. Exit code 1 where something is broken."""
    from . import native
    from .diagnose import findings

    rows = findings()
    broken = any(row.state == "broken" for row in rows)
    if as_json:
        print(json.dumps({"native": vars(native.status()), "checks": [vars(row) for row in rows]}))
    else:
        table = Table(show_header=True, header_style="bold")
        for column in ("", "part", "what was found"):
            table.add_column(column, overflow="fold")
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
        for row in rows:
            table.add_row(marks[row.state], row.part, row.detail)
        console.print(table)
    raise typer.Exit(1 if broken else 0)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for what is made.")] = Path("hf-gptq-demo"),
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 32,
    windows: Annotated[int, typer.Option(help="Held-out windows of 1024 tokens.")] = 6,
    steps: Annotated[int, typer.Option(help="Training steps of the adapter.")] = 8,
) -> None:
    """Quantize SmolLM2-135M-Instruct, evaluate, save, reload, train a LoRA adapter, and serve both in vLLM."""
    from .demo import run

    run(folder, samples, windows, steps, console)


def _folder(model: str) -> Path:
    """A folder or file as it is; a Hub name as the folder of its snapshot, without anything that is not read."""
    path = Path(model)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack"]))
    except HFValidationError:
        raise ValueError(f"{model!r} is neither a folder nor a Hub name") from None


def _dtype(name: str) -> Any:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
    if name not in names:
        raise ValueError(f"--dtype={name!r} is not supported; use one of {', '.join(names)}")
    return names[name]


if __name__ == "__main__":
    main()
