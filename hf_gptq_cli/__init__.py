"""The command `hf-gptq`: one file per command, or per family of them, on what `app` shares."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc

from .app import app, main
from .check import demo, doctor
from .convert import convert
from .evaluate import bench, compare, evaluate, verify
from .fold import fold
from .inspect import inspect
from .optimum import optimum_register
from .plan import plan
from .push import push
from .quantize import quantize
from .train import train

__all__ = ["app", "main"]


def _add(command: Callable[..., None], name: str | None = None) -> None:
    """Make a function a command. Its docstring is its help: paragraphs, each wrapped to the terminal."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    app.command(name, help="\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs))(command)


# In the order of `hf-gptq --help`.
_add(quantize)
_add(evaluate, "eval")
for _command in (train, fold, plan, inspect, convert, verify, compare, bench, push, doctor, demo, optimum_register):
    _add(_command)
