"""Fixtures: tiny random models, made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, MIXTURES, Architecture

# Processes that tests start import what is installed, as the tests do, and not the checkout that they are started in,
# which has no native library.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # but for those of a loopback Hub
for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):  # what is printed is compared
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A dense random model saved to disk: `tiny("llama", hidden_size=96)` gives its folder."""
    import transformers

    made: dict[tuple[object, ...], Path] = {}

    def make(kind: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Path:
        key = (kind, dtype, *sorted((k, str(v)) for k, v in overrides.items()))
        if key not in made:
            known = ARCHITECTURES[kind] if kind in ARCHITECTURES else Architecture(kind, MIXTURES[kind], {})
            config = transformers.AutoConfig.for_model(known.model_type, **{**known.config, **overrides})
            with torch.random.fork_rng():  # what a test draws is the same whether it is the first to ask or not
                torch.manual_seed(0)
                model = getattr(transformers, known.auto).from_config(config, dtype=dtype)
            made[key] = tmp_path_factory.mktemp(kind) / "dense"
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def windows() -> list[list[int]]:
    """Calibration token ids for models of 256 tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 256, (8, 32), generator=generator).tolist()
