"""`hf-gptq convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..convert.layouts import TARGETS as LAYOUTS
from .app import Json, console, folder_of, torch_dtype


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

    from ..convert.source import open_source
    from ..convert.stream import convert as rewrite

    kept = torch_dtype(dtype)
    if kept == "auto":
        raise ValueError("--dtype='auto' is not supported here; use bfloat16, float16 or float32")
    source = open_source(folder_of(model))
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
