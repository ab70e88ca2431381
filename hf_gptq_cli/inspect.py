"""`hf-gptq inspect`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .app import CHECK_FAILED, Json, console, folder_of, print_json

_NAMES = 6  # patterns of names that are shown per kind of module


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, GGUF file, or Hub name.")],
    values: Annotated[bool, typer.Option(help="Read scales and group indices too, not only headers.")] = True,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, how large it is, what runs it, and what is wrong with it. Exit code 3 for problems.

    GPTQ v1 and v2, AWQ, compressed-tensors, bitsandbytes, GGUF and dense checkpoints are told apart.

    Examples:

    hf-gptq inspect ./smollm2-4bit

    hf-gptq inspect ./model.gguf --json
    """
    from hf_gptq_plugin import native
    from hf_gptq_plugin.convert.inspect import inspect as look

    found = look(folder_of(model), values)
    gptq = found.layout in ("gptq", "gptq_v2")
    status = native.status()
    kernel = status.isa if status.state == "loaded" else "PyTorch, without the native library"
    if as_json:
        print_json(found.to_dict() | ({"kernel": kernel} if gptq else {}))
        raise typer.Exit(CHECK_FAILED if found.problems else 0)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")

    def row(name: str, value: str, style: str = "bold") -> None:
        table.add_row(Text(name, style), Text(value))

    row("format", found.layout + ("" if found.layout == found.label else f" (labelled {found.label})"))
    row("architecture", found.architecture)
    for kind in found.modules:
        rest = ", ".join(f"{name} {value}" for name, value in kind.items() if name not in ("modules", "names"))
        names = ""
        if len(found.modules) > 1:  # of which modules differ from which
            more = ", …" if len(kind["names"]) > _NAMES else ""
            names = f" ({', '.join(kind['names'][:_NAMES])}{more})"
        row("modules", f"{kind['modules']}: {rest}{names}")
    size = found.quantized_bytes + found.dense_bytes
    whole = found.parameters * 2 / 1e6
    row("weights", f"{found.parameters / 1e6:.1f} M in {size / 1e6:.1f} MB, in bf16 {whole:.1f} MB")
    if found.bf16_bytes:
        ratio = found.bf16_bytes / max(found.quantized_bytes, 1)
        row("quantized part", f"{found.quantized_bytes / 1e6:.1f} MB, {ratio:.2f} times less than in bf16")
    for stack, answer in found.runs.items():
        row(stack, answer)
    if gptq and not found.problems:
        row("kernel on this machine's CPU", kernel)
    for problem in found.problems:
        row("problem", problem, "bold red")
    console.print(table)
    raise typer.Exit(CHECK_FAILED if found.problems else 0)
