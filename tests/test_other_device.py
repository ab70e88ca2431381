"""Calibration and training leave nothing on the CPU that belongs beside a model elsewhere.

On a device that has the CPU's memory and refuses to meet it (`tests/support/other_device.py`): no GPU is needed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import sys
sys.path.insert(0, {support!r})
from other_device import Elsewhere, OtherDevice, move
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import hf_gptq_plugin
from hf_gptq_plugin.config import GPTQConfig

def model(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )
    return move(LlamaForCausalLM(config).to(dtype).eval())

def where(module):
    return {{p.device.type for p in module.parameters()}} | {{b.device.type for b in module.buffers()}}

ids = [torch.randint(0, 128, (32,)) for _ in range(6)]
with OtherDevice():
{body}
print("done")
"""

CALIBRATE = """
    from hf_gptq_plugin.hf.quantizer import GptqQuantizer
    from hf_gptq_plugin.nn.linear import QuantLinear

    made = model(torch.bfloat16)
    quantizer = GptqQuantizer(GPTQConfig(group_size=32, dataset=ids, samples=6, seqlen=32, {options}))
    quantizer.pre_quantized = False
    quantizer._read_calibration_data(made)
    quantizer._calibrate(made)
    assert sum(isinstance(m, QuantLinear) for m in made.modules()) >= 14
    assert where(made) == {{"elsewhere"}}, where(made)
    logits = made(input_ids=ids[0][None].to("elsewhere")).logits
    assert isinstance(logits, Elsewhere) and bool(logits.inner.isfinite().all())
"""

TRAIN = """
    import tempfile
    from hf_gptq_plugin.calibrate.datafree import quantize_without_data
    from hf_gptq_plugin.calibrate.plan import Plan
    from hf_gptq_plugin.train.loop import TrainSettings, train
    from hf_gptq_plugin.train.methods import attach, export

    class Stopped(Exception):
        pass

    def stop(step, loss):
        if step == 3:
            raise Stopped

    def attached():
        made, config = model(torch.float32), GPTQConfig(bits=4, group_size=32, method="rtn")
        quantize_without_data(made, Plan(checkpoint=config.checkpoint, settings=config.settings), "rtn")
        attach(made, {method!r})
        return made

    settings = TrainSettings(steps=4, batch=2, save_every=2, optimizer={optimizer!r}, subspace=16)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(attached(), ids, settings, Path(folder), stop)
            raise SystemExit("it did not stop")
        except Stopped:
            pass
        made = attached()
        assert len(train(made, ids, settings, Path(folder))) == 4  # from the state of the second step
    assert where(made) == {{"elsewhere"}}, where(made)
    export(made)
    assert where(made) == {{"elsewhere"}}, where(made)
"""


def run(body: str) -> None:
    script = CHILD.format(support=str(Path(__file__).parent / "support"), body=body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize(
    "options",
    [
        "preset='fast'", "preset='balanced', lm_head=True", "preset='balanced', desc_act=True, bits=3",
        "preset='best', block_epochs=1, model_epochs=1", "preset='fast', scale_search='entropy', sym=False",
    ],
)  # fmt: skip
def test_calibration(options: str) -> None:
    bits = "" if "bits" in options else "bits=4, "
    run(CALIBRATE.format(options=bits + options))


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("affine", "adamw"), ("eetq", "adamw"), ("qa-lora", "adamw"), ("ste", "adamw"), ("shadow", "q-galore"),
        ("l4q", "adamw"), ("affine", "q-galore"),
    ],
)  # fmt: skip
def test_training_stopped_and_taken_up_again(method: str, optimizer: str) -> None:
    run(TRAIN.format(method=method, optimizer=optimizer))


def test_the_device_refuses_what_cuda_refuses() -> None:
    run(
        """
    here, there = torch.ones(2), Elsewhere(torch.ones(2))
    assert isinstance(there + there, Elsewhere) and isinstance(there * 2, Elsewhere)
    assert torch.equal((there + here.to("elsewhere")).cpu(), torch.full((2,), 2.0))
    for call in (
        lambda: here + there, lambda: torch.mm(there[None], here[:, None]), there.numpy, there.data_ptr,
        lambda: torch.rand(2, device="elsewhere", generator=torch.Generator()),
    ):
        try:
            call()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit("a mix of devices went through")
"""
    )
