"""What the commands of `hf-gptq` share: the application, how errors are told, options of one meaning."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

TRACEBACK = "HF_GPTQ_TRACEBACK"  # environment variable: show where an error happened
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
# What is printed holds paths and names: none of it is markup. Styles are given as rich.text.Text.
console = Console(stderr=False, markup=False, emoji=False)

Dtype = Annotated[
    str, typer.Option(help="dtype of the unquantized parts and of the arithmetic: float32, bfloat16, float16, auto.")
]
DeviceMap = Annotated[str, typer.Option(help="Where the model is loaded, e.g. cpu, cuda, auto.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def main(arguments: list[str] | None = None, name: str = "hf-gptq") -> None:
    """Entry point: errors are one line on stderr and exit code 1.

    Args:
        arguments: what follows the command's name; by default the process's own.
        name: of the command, for help.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # names in checkpoints may hold what no encoding has
    try:
        app(arguments, prog_name=name, standalone_mode=True)
    except Exception as error:
        _told(error, "" if isinstance(error, user_errors()) else _UNEXPECTED)
    except BaseException as error:
        # A library written in Rust that gives up on its input raises an exception that is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        _told(error, _UNEXPECTED)


def user_errors() -> tuple[type[Exception], ...]:
    """What a user can mend. Other errors are told in one line too, with how to see where they came from."""
    from hf_gptq_plugin.calibrate.journal import JournalError
    from hf_gptq_plugin.calibrate.sources import CalibrationError
    from hf_gptq_plugin.calibrate.walk import WalkError
    from hf_gptq_plugin.native import NativeError
    from hf_gptq_plugin.solve.hessian import SolveError
    from hf_gptq_plugin.train.loop import TrainingError

    own = (CalibrationError, JournalError, WalkError, NativeError, SolveError, TrainingError)
    return (*own, ValueError, OSError, ImportError)


# Usually a damaged file that another library stumbles over; else a defect, whose traceback is asked for.
_UNEXPECTED = (
    " (unexpected: is a file damaged? hf-gptq inspect looks at checkpoints; "
    f"{TRACEBACK}=1 shows where it happened, for a report)"
)


def _told(error: BaseException, more: str = "") -> NoReturn:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    told = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)
    stderr.print("error: ", style="bold red", end="")
    stderr.print(f"{type(error).__name__}: {told}{more}", soft_wrap=True)
    sys.exit(FAILED)


def print_json(value: Any) -> None:
    """One JSON object on stdout; numbers that JSON has no word for become null."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
