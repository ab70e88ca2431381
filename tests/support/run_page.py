"""Run the code of one page of the documentation, in order, in this process and folder: `run_page.py PAGE`.

Blocks of Python share their names, as they would in one notebook. Lines of `sh` that call `hf-gptq` run in this
process too, which spares an import of torch for each of them; others run in a shell. An error names the block's line.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from pages import Block, blocks


def main(page: Path) -> None:
    """Run the page."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if not block.run:
            continue
        print(f"--- {page.name}, line {block.line}", flush=True)
        if block.language == "python":
            # Line numbers of the page, so that a traceback points into it.
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
        else:
            run_shell(block)


def run_shell(block: Block) -> None:
    """Run a block of commands; what a command line must give back is exit code 0."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] != "hf-gptq":
            subprocess.run(line, shell=True, check=True)
            continue
        from hf_gptq_cli import main as command_line

        sys.argv = words
        try:
            command_line()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"line {block.line}: {line!r} ended with exit code {end.code}") from end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
