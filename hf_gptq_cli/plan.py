"""`hf-gptq plan`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .app import Dtype, Json, console, torch_dtype
from .choices import DEFAULT

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def plan(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder: GPTQ, or dense (to be quantized). Its weights are not read."),
    ],
    budget: Annotated[str, typer.Option(help="Memory that there is: 24GB, 16GiB, 800MB.")],
    methods: Annotated[
        str | None, typer.Option(help="lora, qa-lora, affine, eetq, l4q, shadow, ste, with commas; all by default.")
    ] = None,
    optimizers: Annotated[str, typer.Option(help="adamw, q-galore, with commas.")] = "adamw",
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    windows: Annotated[
        int, typer.Option(help="Windows that pass through the model together; hf-gptq train passes one at a time.")
    ] = 1,
    rank: Annotated[int, typer.Option(help="Of lora, qa-lora and l4q.")] = 16,
    subspace: Annotated[int, typer.Option(help="Rank of Q-GaLore's projection.")] = 64,
    target_modules: Annotated[
        str | None, typer.Option(help="Which layers learn: last parts of names, with commas; all by default.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Width of a code.", rich_help_panel="Dense models")] = DEFAULT["bits"],
    group_size: Annotated[
        int, typer.Option(help="Input features per scale.", rich_help_panel="Dense models")
    ] = DEFAULT["group_size"],
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """What training takes by each method, byte by byte, and which to choose within a budget.

    One step is run on tensors that have shapes and no memory, so that nothing but headers is read. What lies outside of
    PyTorch's tensors (the interpreter, a CUDA context) comes on top.

    Example: hf-gptq plan ./smollm2-4bit --budget 8GB --seqlen 2048 --rank 64
    """
    from hf_gptq_plugin.hf.planning import tune_memory_budget

    kept = torch_dtype(dtype)
    if kept == "auto":
        from transformers import AutoConfig

        kept = AutoConfig.from_pretrained(model).dtype or torch_dtype("float32")
    found = tune_memory_budget(
        model, size(budget), dtype=kept, bits=bits, group_size=group_size, seqlen=seqlen,
        windows=windows, methods=None if methods is None else _names(methods), optimizers=_names(optimizers),
        target_modules=None if target_modules is None else _names(target_modules), rank=rank, subspace=subspace,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    table = Table(header_style="bold")
    columns = ("weights", "learned", "gradients", "optimizer", "activations", "total")
    for column in ("method", "optimizer", "checkpointing"):
        table.add_column(column)
    for column in columns:
        table.add_column(f"{column}, MB", justify="right")
    table.add_column("fits")
    for row in found.plans:
        parts = (row.weights, row.learned, row.gradients, row.optimizer_states, row.activations, row.total)
        table.add_row(
            row.method, row.optimizer, "yes" if row.checkpointing else "no", *(f"{part / 1e6:,.1f}" for part in parts),
            Text("yes", "green") if row.total <= found.budget else Text("no", "red"),
        )  # fmt: skip
    console.print(table)
    console.print(found.advice[:1].upper() + found.advice[1:] + ".", soft_wrap=True, highlight=False)


def size(text: str) -> int:
    """Bytes of "16GB", "1.5 GiB", "800MB".

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"--budget={text!r} is not a size; write 24GB, 16GiB or 800MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
