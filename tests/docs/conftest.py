"""The model that documentation and examples are run on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from text_model import make_text_model


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model and its tokenizer; HF_GPTQ_DOCS_MODEL names another."""
    given = os.environ.get("HF_GPTQ_DOCS_MODEL")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("text") / "model"
    make_text_model(folder)
    return folder
