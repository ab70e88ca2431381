"""`hf-gptq doctor` and `demo`: does the installation work?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .app import CHECK_FAILED, Json, console, print_json


def doctor(as_json: Json = False) -> None:
    """What is installed, what works, and what to do about what does not. Exit code 3 where something is broken.

    Example: hf-gptq doctor --json
    """
    from hf_gptq_plugin import native
    from hf_gptq_plugin.diagnose import findings

    rows = findings()
    broken = any(row.state == "broken" for row in rows)
    if as_json:
        print_json({"native": vars(native.status()), "checks": [vars(row) for row in rows]})
    else:
        table = Table(show_header=True, header_style="bold")
        for column in ("", "part", "what was found"):
            table.add_column(column, overflow="fold")
        styles = {"ok": "green", "note": "yellow", "broken": "red"}
        for row in rows:
            table.add_row(Text(row.state, styles[row.state]), row.part, row.detail)
        console.print(table)
    raise typer.Exit(CHECK_FAILED if broken else 0)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for what is made.")] = Path("hf-gptq-demo"),
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 32,
    windows: Annotated[int, typer.Option(help="Held-out windows of 1024 tokens.")] = 6,
    steps: Annotated[int, typer.Option(help="Training steps of the adapter.")] = 8,
) -> None:
    """Quantize SmolLM2-135M-Instruct, evaluate, save, reload, train a LoRA adapter, and serve both in vLLM.

    Example: hf-gptq demo ./demo --samples 16
    """
    from hf_gptq_plugin.demo import run

    run(folder, samples, windows, steps, Console())  # it prints markup
