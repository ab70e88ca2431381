"""Plain PEFT and Trainer on a quantized model, with no line of special code."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_gptq_plugin import GPTQConfig, QuantLinear

IDS = torch.arange(3, 35)[None]
# PEFT 0.21 uses names that Transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture
def model(tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path) -> Any:
    config = GPTQConfig(bits=4, group_size=32, dataset=windows, samples=8, seqlen=32)
    made = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype=torch.float32)
    made.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def train_step(peft_model: Any, steps: int = 3, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = peft_model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_lora_trains_saves_and_reloads(model: Any, targets: Any, tmp_path: Path) -> None:
    base = model(input_ids=IDS).logits.detach()
    codes = {k: v.clone() for k, v in model.state_dict().items()}
    peft_model = get_peft_model(model, lora(target_modules=targets))
    wrapped = [m for m in peft_model.modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == (14 if targets == "all-linear" else 4)
    assert all(isinstance(m.base_layer, QuantLinear) for m in wrapped)
    assert torch.equal(peft_model(input_ids=IDS).logits, base)  # B starts at zero
    losses = train_step(peft_model)
    assert losses[-1] < losses[0]
    trained = peft_model(input_ids=IDS).logits.detach()
    peft_model.save_pretrained(tmp_path / "adapter")
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(input_ids=IDS).logits, base)
    plain = peft_model.unload()
    assert all(torch.equal(v, codes[k]) for k, v in plain.state_dict().items())
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=IDS).logits, trained)


def test_gradients_of_the_adapter_are_those_on_the_dense_weights(model: Any, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).dequantize()
    gradients = []
    for base in (model, dense):
        torch.manual_seed(0)
        peft_model = get_peft_model(base, lora(init_lora_weights=False))
        peft_model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}])
def test_variants_of_lora_train(model: Any, fields: dict[str, Any]) -> None:
    losses = train_step(get_peft_model(model, lora(**fields)))
    assert losses[-1] < losses[0]


def test_preparing_for_training_and_checkpointing(model: Any) -> None:
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only the adapters train; what is not quantized is kept in fp32.
    peft_model = get_peft_model(prepared, lora())
    assert {n for n, p in peft_model.named_parameters() if p.requires_grad} == {
        n for n, _ in peft_model.named_parameters() if "lora_" in n
    }
    peft_model.train()
    losses = train_step(peft_model)
    assert losses[-1] < losses[0]


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers adds adapters only with PEFT {MIN_PEFT_VERSION} or newer, perhaps not published yet",
)
def test_an_adapter_added_by_transformers(model: Any) -> None:
    model.add_adapter(lora(target_modules=["q_proj"]))
    losses = train_step(model)
    assert losses[-1] < losses[0]


def test_merging_goes_through_dequantize(model: Any) -> None:
    peft_model = get_peft_model(model, lora(init_lora_weights=False))
    expected = peft_model(input_ids=IDS).logits.detach()
    peft_model.get_base_model().dequantize()
    merged = peft_model.merge_and_unload()
    assert not any(isinstance(m, QuantLinear) for m in merged.modules())
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # Trainer's own, about its machine
def test_trainer(model: Any, windows: list[list[int]], tmp_path: Path) -> None:
    peft_model = get_peft_model(model, lora())
    rows = [{"input_ids": w, "labels": w} for w in windows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_steps=3, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    trained = peft_model(input_ids=IDS).logits.detach()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path / "run" / "checkpoint-6")
    torch.testing.assert_close(again(input_ids=IDS).logits, trained)
