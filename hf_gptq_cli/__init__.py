"""The command `hf-gptq`: one file per command, or per family of them, on what `app` shares."""

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

# In the order of `hf-gptq --help`.
app.command()(quantize)
app.command("eval")(evaluate)
app.command()(train)
app.command()(fold)
app.command()(plan)
app.command()(inspect)
app.command()(convert)
app.command()(verify)
app.command()(compare)
app.command()(bench)
app.command()(push)
app.command()(doctor)
app.command()(demo)
app.command()(optimum_register)
