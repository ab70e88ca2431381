"""What is written beside its place: whole or gone, and what a killed process left goes with the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_gptq_plugin.format.staging import staged

KILLED = """
import os, signal, sys
from pathlib import Path
from hf_gptq_plugin.format.staging import staged
with staged(Path(sys.argv[1]), "out", is_folder=sys.argv[2] == "folder") as path:
    (path / "half").write_text("x") if path.is_dir() else path.write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_process_left_goes_with_the_next(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".out.x.hf-gptq-abcdefgh.part", ".out.download.part")]
    for other in others:  # of other names, and not ours
        other.write_text("")
    with staged(tmp_path, "out", is_folder=kind == "folder") as path:
        assert sorted(tmp_path.iterdir()) == sorted([*others, path]) and path != left
        # One that is being written stays.
        with staged(tmp_path, "out", is_folder=kind == "folder") as second:
            assert path.exists() and second.exists() and path != second
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_nothing_stays_of_an_error(tmp_path: Path) -> None:
    for is_folder in (True, False):
        with pytest.raises(OSError, match="no space"), staged(tmp_path, "a*[b", is_folder=is_folder) as path:
            assert path.exists()
            raise OSError("no space")
        assert list(tmp_path.iterdir()) == []


def test_what_was_moved_stays(tmp_path: Path) -> None:
    with staged(tmp_path, "out", is_folder=False) as path:
        path.write_text("whole")
        os.replace(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "whole"
