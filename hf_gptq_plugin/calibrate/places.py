"""Where a module stands in a model, read off its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a module stands in a model.

    Args:
        stack: the list of blocks, e.g. "model.layers"; "" for a module outside of blocks.
        block: its number; None outside.
        type: the name within the block with a star for every further number, so that all experts are of one type.
    """

    stack: str
    block: int | None
    type: str


def place(name: str) -> Place:
    """Read a module's place off its name: the first number in it is the block's."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return Place("", None, name)
    rest = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    return Place(".".join(parts[:at]), int(parts[at]), ".".join(rest) or "block")


def type_names(names: Sequence[str]) -> dict[str, str]:
    """Module names to the names of their types, which begin with the list of blocks where a model has several."""
    places = {name: place(name) for name in names}
    several = len({p.stack for p in places.values() if p.block is not None}) > 1
    return {n: f"{p.stack}.*.{p.type}" if several and p.block is not None else p.type for n, p in places.items()}
