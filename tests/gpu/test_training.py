"""Training with the model on a GPU, against the same on the CPU. Without a GPU every test here is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gptq_plugin.calibrate.datafree import quantize_without_data
from hf_gptq_plugin.calibrate.plan import Plan
from hf_gptq_plugin.config import GPTQConfig
from hf_gptq_plugin.train.loop import TrainSettings, train
from hf_gptq_plugin.train.methods import METHODS, attach, export

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's, in a thread of autograd
]


class StoppedError(Exception):
    pass


def attached(method: str, device: str) -> Any:
    """A tiny random Llama in fp32, 4 bit, quantized on the CPU, with what `method` trains."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.05,
        )
    )  # fmt: skip
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    quantize_without_data(model, Plan(checkpoint=config.checkpoint, settings=config.settings), "rtn")
    torch.manual_seed(1)
    attach(model, method)
    return model.to(device)


def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 128, (32,), generator=generator) for _ in range(8)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in METHODS), ("ste", {"optimizer": "q-galore", "subspace": 16}),
        ("shadow", {"optimizer": "q-galore", "subspace": 16}),
        ("ste", {"gradients": "int8-block", "gradient_warmup": 1}),
    ],
)  # fmt: skip
def test_losses_are_those_of_the_cpu(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Also where it is stopped and taken up again; what is exported as a checkpoint answers as what was trained."""
    settings = TrainSettings(steps=6, batch=4, rate=1e-3, save_every=2, **options)
    expected = train(attached(method, "cpu"), windows(), settings)

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(attached(method, "cuda"), windows(), settings, tmp_path, stop)
    model = attached(method, "cuda")
    losses = train(model, windows(), settings, tmp_path)
    assert losses == pytest.approx(expected, rel=2e-3)
    assert len({round(loss, 6) for loss in losses}) > 3  # it learns something
    ids = windows()[0][None].cuda()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        export(model)
        exported = model(input_ids=ids).logits
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cuda"}
    if METHODS[method].exported == "checkpoint":  # of an adapter the layers do not keep what was learned
        assert float((exported - trained).norm() / trained.norm()) < 0.02
