"""The file that `hf-gptq optimum-register` copies into an installed optimum, where `optimum-cli` finds it."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib.util import find_spec

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class HfGptqCommand(BaseOptimumCLICommand):
    """`optimum-cli hf-gptq ...`: what follows is the command line of `hf-gptq`."""

    COMMAND = CommandInfo(name="hf-gptq", help="GPTQ for Transformers and vLLM: quantize, evaluate, train, convert.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Everything is passed on, `--help` included."""
        parser.add_argument("arguments", nargs="...")
        parser.print_help = lambda file=None: _run(["--help"])  # type: ignore[method-assign]

    def run(self) -> None:
        """Run the command; it ends the process with its exit code."""
        _run(self.args.arguments)


def _run(arguments: list[str]) -> None:
    from hf_gptq_cli import main

    main(arguments, "optimum-cli hf-gptq")


# Left behind by a plugin that is no longer installed, this file adds nothing.
REGISTER_COMMANDS = [HfGptqCommand] if find_spec("hf_gptq_cli") else []
