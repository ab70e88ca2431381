"""`hf-gptq fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .app import Dtype, Json, console, print_json, torch_dtype
from .refuse import require_exists, require_writable


def fold(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub name of a GPTQ checkpoint.")],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder or Hub name of a LoRA adapter trained on it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
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
    from hf_gptq_plugin.hf.folding import run

    require_exists(base, adapter)
    require_writable(out)
    found = run(base, adapter, out, calibration, samples, seqlen, seed, torch_dtype(dtype))
    if as_json:
        print_json(found.to_dict())
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
    console.print(Text.assemble((found.recommendation, "bold"), f": {found.reason}."))
