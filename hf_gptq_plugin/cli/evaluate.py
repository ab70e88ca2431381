"""`hf-gptq eval` and `verify`: a model on a text, and two of them side by side."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..calibrate.sources import read_text
from .app import CHECK_FAILED, Dtype, Json, console, torch_dtype


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

    from ..hf.evaluate import perplexity, text_windows

    content = read_text(text)
    pieces = text_windows(AutoTokenizer.from_pretrained(model), content, seqlen, windows or None)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype(dtype), device_map=device_map)
    start = time.perf_counter()
    value = perplexity(loaded, pieces)
    seconds = time.perf_counter() - start
    tokens = sum(p.shape[1] for p in pieces)
    if as_json:
        result = {"model": model, "perplexity": value, "windows": len(pieces), "seqlen": seqlen, "tokens": tokens}
        print(json.dumps(result))
        return
    console.print(f"perplexity {value:.4f}  ({len(pieces)} windows, {tokens} tokens, {seconds:.0f} s)")


def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub name.")],
    reference: Annotated[str, typer.Argument(help="Folder or Hub name of what it should be like.")],
    text: Annotated[Path, typer.Option(help="Text file.")],
    windows: Annotated[int, typer.Option(help="Windows, from the beginning; 0 for all.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_divergence: Annotated[
        float | None, typer.Option(help="Exit code 3 where the mean KL divergence per token is larger.")
    ] = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Two models side by side on a text: perplexity, KL divergence and agreement on the likeliest next token.

    Example: hf-gptq verify ./smollm2-4bit ./smollm2 --text held-out.txt
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..hf.evaluate import compared, text_windows

    pieces = text_windows(AutoTokenizer.from_pretrained(reference), read_text(text), seqlen, windows or None)
    first, second = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype(dtype)) for name in (model, reference)
    )
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
    raise typer.Exit(CHECK_FAILED if failed else 0)
