"""Other projects' training loops on a quantized model, unchanged: TRL, accelerate, DeepSpeed's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from pages import DOCS, blocks
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_gptq_plugin import GPTQConfig, QuantLinear
from hf_gptq_plugin.train.methods import advance, attach, export, parameter_groups
from hf_gptq_plugin.train.qgalore import QGaLore

# PEFT 0.21 uses names that Transformers 5.23 replaced; the rest is the trainers' own, about their machine.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = "the quick brown fox jumps over the lazy dog " * 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer(eos_token="!", pad_token="#")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    return tokenizer


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Any:
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype=torch.float32)


IDS = torch.arange(3, 35)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def codes(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("qweight", "scales"))}


def learned(trainer: Any, before: dict[str, torch.Tensor]) -> list[float]:
    """Losses of a run, after a check that the base is as it was and the adapter is not."""
    trainer.train()
    base = trainer.model.get_base_model()
    after = codes(base)
    assert before and {n.replace(".base_layer", "") for n in after} == set(before)
    assert all(torch.equal(value, before[n.replace(".base_layer", "")]) for n, value in after.items())
    assert any(m.weight.any() for n, m in trainer.model.named_modules() if ".lora_B." in n)
    assert any(isinstance(m, QuantLinear) for m in base.modules())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trainer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed; the extra 'test-trl' has it")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=2, learning_rate=2e-2,
        report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, max_length=64, save_strategy="no",
    )  # fmt: skip
    before = codes(model)
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_dict({"text": [TEXT] * 8}), processing_class=tokenizer,
        peft_config=LORA,
    )  # fmt: skip
    losses = learned(trainer, before)
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_dpo_trainer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed; the extra 'test-trl' has it")
    from datasets import Dataset

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=2, learning_rate=2e-2,
        report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, max_length=64, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["which? "] * 8, "chosen": ["this one"] * 8, "rejected": ["not that"] * 8})
    before = codes(model)
    trainer = trl.DPOTrainer(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=LORA
    )  # fmt: skip
    losses = learned(trainer, before)
    # The reference is the base with the adapter off, so that the first loss is that of indifference.
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]


def test_accelerate(model: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    adapted = get_peft_model(model, LORA)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted, optimizer = accelerator.prepare(adapted, optimizer)
    ids = torch.arange(3, 35)[None]
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_a_deepspeed_configuration_loads(tmp_path: Path) -> None:
    """As far as it goes without DeepSpeed: the configuration is read by accelerate. `test_deepspeed.py` runs it."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    path = tmp_path / "zero2.json"
    (configuration,) = [block for block in blocks(DOCS / "training.md") if block.language == "json"]
    path.write_text(configuration.text)
    config = HfDeepSpeedConfig(str(path))
    assert config.is_zero2() and not config.is_zero3() and not config.is_offload()


class Advance(TrainerCallback):
    """As the page on training says."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        advance(model)


def trainer(model: Any, optimizer: Any, folder: Path, steps: int = 6) -> Trainer:
    """On one window again and again, so that its order plays no part; nothing is clipped, the rate is constant."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=3, max_grad_norm=0, lr_scheduler_type="constant",
    )  # fmt: skip
    rows: Any = [{"input_ids": IDS, "labels": IDS}] * 8
    return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[Advance()])


@pytest.mark.parametrize("method", ["affine", "ste", "shadow"])
def test_trainer_on_what_is_attached(method: str, model: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The weights of a loop written out, from an interruption too."""
    model.save_pretrained(tmp_path / "base")

    def attached() -> tuple[Any, torch.optim.Optimizer]:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        attach(loaded, method, **({"every": 2, "cap": 1.0} if method == "shadow" else {}))
        return loaded, torch.optim.AdamW(parameter_groups(loaded, 0.05))

    reference, optimizer = attached()
    for _ in range(6):
        reference(input_ids=IDS[None], labels=IDS[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(reference)
    export(reference)
    changed = [n for n, p in reference.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert changed and all(n.endswith("scales" if method == "affine" else "qweight") for n in changed)
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-3")):
        learned, optimizer = attached()
        trainer(learned, optimizer, tmp_path / "run").train(resume_from_checkpoint=checkpoint)
        export(learned)
        for name, p in reference.named_parameters():
            assert torch.equal(learned.get_parameter(name), p), (name, checkpoint)


def test_trainer_refuses_a_model_with_nothing_attached(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, None, tmp_path)
    attach(model, "affine")
    trainer(model, None, tmp_path)
    export(model)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, None, tmp_path)


def test_trainer_goes_on_with_q_galore(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")

    def run(checkpoint: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        adapted = get_peft_model(loaded, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = QGaLore([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, rank=4, gap=2)
        trainer(adapted, optimizer, tmp_path / "run").train(resume_from_checkpoint=checkpoint)
        return {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}

    whole, resumed = run(None), run(str(tmp_path / "run" / "checkpoint-3"))
    assert any(p.any() for n, p in whole.items() if ".lora_B." in n)
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())
