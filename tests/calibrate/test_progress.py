"""Whatever takes long counts to its end while somebody watches."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import processes


@pytest.mark.parametrize("threads", [1, 2])
def test_every_stage_shows_its_progress(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ARCHITECTURES["llama"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.model_type, **kind.config)).save_pretrained(tmp_path)
    ids = torch.randint(3, 256, (8, 128), generator=torch.Generator().manual_seed(1)).tolist()
    config = GPTQConfig(
        bits=3, group_size=32, preset="best", dataset=ids, samples=8, seqlen=128, block_epochs=1, model_epochs=1
    )
    bars: list[tqdm[Any]] = []

    def kept(**kwargs: Any) -> tqdm[Any]:
        bars.append(tqdm(**kwargs, disable=False, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(processes, "tqdm", kept)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    finally:
        torch.set_num_threads(before)
    blocks = [f"Tuning model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    assert [bar.desc for bar in bars] == ["Writing text", "Weighing errors", "Quantizing", *blocks, "Tuning the model"]
    for bar in bars:
        assert bar.total > 0 and bar.n == bar.total, bar.desc
