"""`optimum-cli hf-gptq`, with an optimum that is really installed, beside this environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

OPTIMUM = "optimum==2.3.0"


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with optimum in it, for the path of a process; not of this one: other tests run without optimum."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, OPTIMUM]
    subprocess.run(pip, check=True, timeout=300)
    return site


def run(site: Path, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (site, *filter(None, [os.environ.get("PYTHONPATH")]))))
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_subcommand_is_put_in_used_and_taken_away(optimum: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    before = sorted(path for path in optimum.rglob("*") if path.suffix != ".pyc")
    done = run(optimum, "hf_gptq_cli", "optimum-register")
    assert done.returncode == 0, done.stderr
    new = [path for path in optimum.rglob("*.py") if path not in before]
    assert new == [optimum / "optimum/commands/register/register_hf_gptq.py"]
    assert str(new[0]) in done.stdout

    cli = "optimum.commands.optimum_cli"
    told = run(optimum, cli, "hf-gptq", "quantize", "--help")
    assert told.returncode == 0, told.stderr
    assert "optimum-cli hf-gptq quantize [OPTIONS]" in told.stdout
    assert "--group-size" in told.stdout
    assert "optimum-cli hf-gptq [OPTIONS] COMMAND" in run(optimum, cli, "hf-gptq", "--help").stdout
    # A run, with options among the arguments and an exit code that is passed on.
    done = run(
        optimum, cli, "hf-gptq", "convert", tiny("llama"), tmp_path / "out", "--to", "dense", "--dtype", "float32"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    failed = run(optimum, cli, "hf-gptq", "inspect", tmp_path / "nothing")
    assert failed.returncode == 1
    assert "is neither a folder nor a Hub name" in failed.stderr

    taken = run(optimum, "hf_gptq_cli", "optimum-register", "--remove")
    assert taken.returncode == 0, taken.stderr
    assert sorted(path for path in optimum.rglob("*") if path.suffix != ".pyc") == before
    assert run(optimum, cli, "hf-gptq", "doctor").returncode == 2


def test_without_optimum_it_says_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path, "hf_gptq_cli", "optimum-register")
    assert done.returncode == 1
    assert "optimum is not installed; install it first: pip install optimum" in done.stderr
