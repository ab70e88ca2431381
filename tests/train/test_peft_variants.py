"""Every kind of adapter that PEFT has for linear layers: it learns on codes, or it says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig

# PEFT 0.21 uses names that Transformers 5.23 replaced; warnings of PEFT's about its own kinds say nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(3, 35)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, target_modules=TARGETS),
    "DoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "rsLoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "LoRA that begins from normal values": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"),
    "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=20, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "LoHa": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=4, target_modules=TARGETS),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=16, target_modules=TARGETS),
    "VeRA": peft.VeraConfig(r=8, target_modules=["q_proj"]),
}


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "q"
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    AutoModelForCausalLM.from_pretrained(
        tiny("llama"), quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder)
    return folder


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_as_on_the_dense_weights(base: Path, kind: str) -> None:
    curves = []
    for model in (load(base), load(base).dequantize()):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, KINDS[kind])
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        curves.append(losses)
    quantized, dense = curves
    assert quantized == pytest.approx(dense, rel=1e-4) and quantized[-1] < quantized[0]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_are_refused(base: Path, start: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be replaced.*PiSSA.*init_lora_weights=True"):
        peft.get_peft_model(load(base), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start))


def test_merges_are_refused(base: Path) -> None:
    adapted = peft.get_peft_model(load(base), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    wanted = adapted(input_ids=IDS).logits
    with pytest.raises(ValueError, match="gptq"):
        adapted.merge_and_unload()
    # A tuner that does not ask whether it may.
    layer = next(m for n, m in adapted.named_modules() if n.endswith("0.self_attn.q_proj"))
    with pytest.raises(ValueError, match="hf-gptq fold"):
        layer.merge()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted)
