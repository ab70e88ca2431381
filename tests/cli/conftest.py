"""A tiny model, a text, and the command run in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from command import Result

from hf_gptq_cli import main
from hf_gptq_plugin.demo import texts


@pytest.fixture(scope="session")
def model(tiny: Callable[..., Path]) -> Path:
    """A tiny llama with a tokenizer of single bytes beside it."""
    folder = tiny("llama", initializer_range=0.05)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(texts()[0][:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def four_bit(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four") / "bit"
    command = [sys.executable, "-c", "from hf_gptq_cli import main; main()", "quantize", model, out]
    subprocess.run(
        [*map(str, command), "--method", "rtn", "--group-size", "32", "--asym", "--format", "gptq_v2"], check=True
    )
    return out


@pytest.fixture
def hf_gptq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command's entry point in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hf-gptq", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run
