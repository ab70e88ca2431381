"""Adapters that are damaged, or are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_gptq_plugin.format.spec import CheckpointError
from hf_gptq_plugin.hf.adapter import check_adapter, local_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def adapter(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    usual = {"A": torch.ones(4, 32), "B": torch.ones(48, 4), **tensors}
    named = {f"{Q}.lora_{name}.weight": value for name, value in usual.items() if value.numel()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def test_what_an_adapter_holds(tmp_path: Path) -> None:
    assert check_adapter(adapter(tmp_path / "a")) == {Q: (4, 32, 48)}
    found = check_adapter(
        adapter(tmp_path / "b", {"rank_pattern": {"q_proj": 2}}, A=torch.ones(2, 32), B=torch.ones(48, 2))
    )
    assert found == {Q: (2, 32, 48)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"r": 0}, {}, "r=0 must be an integer"),
        ({"r": True}, {}, "r=True must be an integer"),
        ({"lora_alpha": "8"}, {}, "lora_alpha='8' must be a number"),
        ({"target_modules": []}, {}, r"target_modules=\[\] must be"),
        ({"r": 8}, {}, "factors have rank 4, and adapter_config.json says r=8"),
        ({}, {"B": torch.ones(48, 3)}, "lora_A has rank 4 and lora_B 3"),
        ({}, {"B": torch.empty(0)}, "has lora_A alone"),
        ({}, {"A": torch.ones(4, 4, 2)}, r"shape \[4, 4, 2\]; it must be a float matrix"),
        ({}, {"A": torch.ones(4, 32, dtype=torch.int32)}, "has dtype I32"),
        ({}, {"A": torch.full((4, 32), float("nan"))}, "not finite"),
        ({}, {"A": torch.empty(0), "B": torch.empty(0), "C": torch.ones(1)}, "has no lora_A or lora_B"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_adapter(adapter(tmp_path / "a", config, **tensors))


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        check_adapter(tmp_path)
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled files can run code"):
        check_adapter(folder)


def test_the_folder_that_training_wrote_names_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    inner = adapter(tmp_path / "tuned" / "adapter")
    assert local_adapter(str(tmp_path / "tuned")) == inner == local_adapter(str(inner))
    # A folder that is an adapter itself is taken as it is, whatever it holds.
    own = adapter(tmp_path / "own")
    adapter(own / "adapter")
    assert local_adapter(str(own)) == own
    with pytest.raises(ValueError, match="neither a folder nor a Hub name"):
        local_adapter(str(tmp_path / "nowhere"))
