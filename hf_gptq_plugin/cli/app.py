"""What the commands of `hf-gptq` share: the application, how errors are told, options of one meaning."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..calibrate.journal import JournalError
from ..calibrate.sources import CalibrationError
from ..calibrate.walk import WalkError
from ..config import GPTQConfig
from ..native import NativeError
from ..solve.hessian import SolveError
from ..train.loop import TrainingError

# Exit codes beside 0; 2, for a command line that cannot be read, is the parser's.
FAILED = 1  # an error a user can mend, told in one line
CHECK_FAILED = 3  # the command did its work, and what it looked at is not as it should be

app = typer.Typer(
    name="hf-gptq",
    help="GPTQ for Transformers and vLLM: quantize, evaluate, train, convert, publish.",
    epilog="Exit codes: 0 done; 1 an error, told in one line; 2 a command line that cannot be read; 3 a check failed "
    "(inspect, verify, doctor).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=False)

# What a user can mend; everything else is a defect of ours and shows its traceback.
USER_ERRORS = (
    CalibrationError, JournalError, WalkError, SolveError, NativeError, TrainingError, ValueError, OSError, ImportError,
)  # fmt: skip

# Defaults of options are those of the fields of GPTQConfig that they set.
DEFAULT = {name: field.default for name, field in signature(GPTQConfig).parameters.items()}

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
        sys.exit(FAILED)


def folder_of(model: str) -> Path:
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


def torch_dtype(name: str) -> Any:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
    if name not in names:
        raise ValueError(f"--dtype={name!r} is not supported; use one of {', '.join(names)}")
    return names[name]
