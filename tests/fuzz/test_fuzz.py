"""Damaged input of a fixed seed; for more of it, see `tests/support/fuzz.py`."""

from __future__ import annotations

import pytest

pytest.importorskip("gguf", reason="the gguf package writes the GGUF file that is damaged")

import fuzz


def test_damaged_files_and_command_lines() -> None:
    with fuzz.running(seed=11) as run:
        run.run(400)
        run.commands(25)
    print(fuzz.table(run))
    assert not run.findings, fuzz.table(run)
    for counts in run.counts.values():  # mutations that break everything, or nothing, would show little
        assert counts["refused"] > 0
    assert run.counts["inspect a checkpoint"]["done"] > 0
