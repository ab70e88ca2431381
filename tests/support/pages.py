"""Read the documentation: its pages, and the code blocks that are to be run.

A fenced block of `python` or `sh` is run, in the order of the page, unless an HTML comment `<!-- not run: reason -->`
stands on the line before it; a block that only includes a program (`--8<--`) is run by the program's own test. Blocks
inside lists or admonitions are no part of this: they only show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\n\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text, first line in the page, and whether it is to be run."""

    language: str
    text: str
    line: int
    run: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found[1], found[2], text[: found.start()].count("\n") + 2,
            found[1] in ("python", "sh")
            and not found[2].startswith("--8<--")
            and not _NOT_RUN.search(text[: found.start()]),
        )
        for found in _FENCE.finditer(text)
    ]  # fmt: skip


def pages() -> list[Path]:
    """Every page of the site."""
    return sorted(DOCS.rglob("*.md"))
