"""`hf-gptq optimum-register`."""

from __future__ import annotations

import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated

import typer

from .app import Json, console, print_json

_SOURCE = Path(__file__).with_name("optimum_command.py")
_NAME = "register_hf_gptq.py"


def optimum_register(
    remove: Annotated[bool, typer.Option("--remove", help="Take the subcommand away again.")] = False,
    as_json: Json = False,
) -> None:
    """Make `optimum-cli hf-gptq ...` work: writes one small file into the installed optimum, once.

    The wheel does not bring that file along: a distribution that owns a file under optimum/ is taken for optimum by
    Transformers, and for optimum-quanto by diffusers, which then compares the wrong version.

    Examples:

    hf-gptq optimum-register

    hf-gptq optimum-register --remove  # before optimum is uninstalled
    """
    from hf_gptq_plugin.format.checkpoint import written_whole

    target = _commands() / "register" / _NAME
    if remove:
        _take_away(target)
    else:
        with written_whole(target.parent) as staging:
            shutil.copyfile(_SOURCE, staging / _NAME)
    if as_json:
        print_json({"file": str(target), "registered": not remove})
    elif remove:
        console.print(f"{target} is removed.", soft_wrap=True)
    else:
        console.print(f"{target} is written: optimum-cli hf-gptq --help shows the commands.", soft_wrap=True)


def _commands() -> Path:
    """The folder of the installed optimum's commands.

    Raises:
        ImportError: no optimum, or one without a command line.
    """
    try:
        folder = Path(str(distribution("optimum").locate_file("optimum/commands")))
    except PackageNotFoundError:
        raise ImportError("optimum is not installed; install it first: pip install optimum") from None
    if not (folder / "optimum_cli.py").is_file():
        raise ImportError(
            f"optimum {distribution('optimum').version} has no command line in {folder}; accepted are releases with "
            "optimum/commands/optimum_cli.py, from 1.14 on"
        )
    return folder


def _take_away(target: Path) -> None:
    target.unlink(missing_ok=True)
    for cached in (target.parent / "__pycache__").glob(f"{target.stem}.*"):
        cached.unlink()
    for folder in (target.parent / "__pycache__", target.parent):
        with suppress(OSError):  # another package's files are in it, or it is not there
            folder.rmdir()
