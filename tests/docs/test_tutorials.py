"""The code of the tutorials runs as it stands, on a small model of the same architecture as the one they name.

`HF_GPTQ_DOCS_MODEL=FOLDER pytest tests/docs/test_tutorials.py` runs them on a model of your own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks

RUNNER = ROOT / "tests" / "support" / "run_page.py"
TUTORIALS = sorted(page for page in (DOCS / "tutorials").glob("*.md") if any(block.run for block in blocks(page)))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial(page: Path, text_model: Path, tmp_path: Path) -> None:
    shutil.copytree(text_model, tmp_path / "SmolLM2")
    environment = {
        **os.environ,
        "PYTHONPATH": str(RUNNER.parent),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, RUNNER, page], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    print(done.stdout)


def test_the_tutorials_have_code() -> None:
    # A page whose blocks are not found would pass unnoticed.
    assert {page.stem for page in TUTORIALS} == {"quantize", "lora", "scales", "convert"}
