"""`hf-gptq inspect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from .app import Json, console, folder_of


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file, or Hub name.")],
    values: Annotated[bool, typer.Option(help="Read scales and group indices too, not only headers.")] = True,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, how large it is, what runs it, and what is wrong with it. Exit code 1 for problems.

    Example: hf-gptq inspect ./smollm2-4bit
    """
    from ..convert.inspect import inspect as look

    found = look(folder_of(model), values)
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
