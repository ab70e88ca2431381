"""The command that trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Run

# PEFT 0.21 uses names that Transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.mark.parametrize("method", ["lora", "qa-lora", "eetq"])
def test_train(hf_gptq: Run, four_bit: Path, text: Path, tmp_path: Path, method: str) -> None:
    settings = ("--data", text, "--samples", 20, "--seqlen", 48, "--steps", 6, "--rate", 1e-2, "--json")
    rank = () if method == "eetq" else ("--rank", 4)
    result = hf_gptq("train", four_bit, tmp_path / "out", "--method", method, *rank, *settings)
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert found["after"] < found["before"] and found["layers"] == 14 and found["difference"] < 1e-4
    assert len(found["losses"]) == 6
    assert not (tmp_path / "out.training").exists()
    if method == "eetq":
        assert hf_gptq("inspect", tmp_path / "out").code == 0
    else:
        assert found["folder"] == str(four_bit)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter"]
        assert (tmp_path / "out/adapter/adapter_config.json").exists()


def test_training_a_dense_model_quantizes_it_first(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    command = ("train", model, tmp_path / "out", "--data", text, "--samples", 12, "--seqlen", 48, "--steps", 2)
    result = hf_gptq(*command, "--method", "ste", "--group-size", 32, "--preset", "fast")
    assert result.code == 0, result.err
    assert "Held-out loss" in result.out and "vllm serve" in result.out
    assert hf_gptq("inspect", tmp_path / "out").code == 0
    # On the windows it trains on: the twelfth is held out, and the text would give more.
    read = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["meta"]["calibration"]
    assert (read["windows"], read["tokens"]) == (11, 11 * 48)
    result = hf_gptq(*command, "--method", "lisa")
    assert result.code == 1 and "use one of lora, affine" in result.err
    result = hf_gptq("train", tmp_path / "out", tmp_path / "x", "--data", text, "--seqlen", 48, "--rank", 4000)
    assert result.code == 1 and "rank=4000 must be an integer from 1 to" in result.err
