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
from text_model import make_text_model

RUNNER = ROOT / "tests" / "support" / "run_page.py"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the tutorials use in place of SmolLM2."""
    given = os.environ.get("HF_GPTQ_DOCS_MODEL")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("text") / "model"
    make_text_model(folder)
    return folder


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial(page: Path, text_model: Path, tmp_path: Path) -> None:
    if not any(block.run for block in blocks(page)):
        pytest.skip("nothing on this page is run here: its programs have tests of their own")
    shutil.copytree(text_model, tmp_path / "SmolLM2")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(RUNNER.parent), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, RUNNER, page], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    print(done.stdout)


def test_every_block_that_is_not_run_says_why() -> None:
    # A page without a single block that runs would pass unnoticed.
    ran = {page.stem for page in TUTORIALS if any(block.run for block in blocks(page))}
    assert ran >= {"quantize", "lora", "scales", "convert"}
