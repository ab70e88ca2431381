"""Models that are no causal LMs: the command quantizes them as what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from byte_tokenizer import byte_tokenizer
from command import Run
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel, T5EncoderModel

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.hf.loading import auto_class
from hf_gptq_plugin.hf.saving import save_checkpoint
from hf_gptq_plugin.nn.linear import QuantLinear

DATA = ("--bits", 8, "--group-size", 16, "--preset", "fast", "--samples", 4, "--seqlen", 32)
IDS = torch.arange(3, 23)[None]


def quantized(hf_gptq: Run, dense: Path, out: Path, text: Path) -> None:
    byte_tokenizer().save_pretrained(dense)
    done = hf_gptq("quantize", dense, out, *DATA, "--calibration", text)
    assert done.code == 0, done.err


@pytest.mark.parametrize("kind", ["t5", "bart", "bert", "llava", "qwen2_vl", "gemma3", "qwen3"])
def test_kinds_of_models(kind: str, hf_gptq: Run, tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    known, folder, out = ARCHITECTURES[kind], shutil.copytree(tiny(kind), tmp_path / "dense"), tmp_path / "out"
    quantized(hf_gptq, folder, out, text)
    dense = getattr(transformers, known.auto).from_pretrained(folder).eval()
    loaded = getattr(transformers, known.auto).from_pretrained(out).eval()
    assert type(loaded) is type(dense)
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(dense).__name__]
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == sum(known.quantized.values())
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if dense.config.is_encoder_decoder else {})}
    with torch.no_grad():
        exact, given = dense(**inputs).logits, loaded(**inputs).logits
    assert (given - exact).norm() < 0.1 * exact.norm()
    auto = auto_class([type(dense).__name__]).__name__
    card = (out / "README.md").read_text()
    assert f'model = {auto}.from_pretrained("out")' in card
    writes = auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    assert ("vllm serve" in card) == writes
    done = hf_gptq("eval", out, "--text", text, "--windows", 2, "--seqlen", 32)
    assert done.code == (0 if writes else 1)
    assert writes or f"{type(dense).__name__}, which does not continue text" in done.err


def test_what_reads_images_comes_along(hf_gptq: Run, tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(tiny("llava"), tmp_path / "dense")
    processor = dense / "preprocessor_config.json"
    processor.write_text('{"image_processor_type": "CLIPImageProcessor"}')
    quantized(hf_gptq, dense, tmp_path / "out", text)
    assert json.loads((tmp_path / "out" / processor.name).read_text())["image_processor_type"] == "CLIPImageProcessor"


def test_a_dense_model_that_is_gone_costs_nothing(
    tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = shutil.copytree(tiny("llava"), tmp_path / "dense")
    config = GPTQConfig(bits=8, group_size=16, dataset=windows, preset="fast")
    model = transformers.AutoModelForImageTextToText.from_pretrained(dense, quantization_config=config)
    shutil.rmtree(dense)
    save_checkpoint(model, tmp_path / "out", tokenizer=byte_tokenizer())
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "preprocessor_config.json" in caplog.text and "could not be read" in caplog.text


def test_task_heads(hf_gptq: Run, model: Path, text: Path, tmp_path: Path) -> None:
    """A classifier stays one; a base model and an encoder, too."""
    config, t5 = AutoConfig.from_pretrained(model), ARCHITECTURES["t5"]
    encoder = T5EncoderModel(AutoConfig.for_model(t5.model_type, **t5.config))
    in_encoder = t5.quantized["encoder.block"]
    for made, layers in ((LlamaForSequenceClassification(config), 14), (LlamaModel(config), 14), (encoder, in_encoder)):
        name = type(made).__name__
        made.save_pretrained(tmp_path / name)
        quantized(hf_gptq, tmp_path / name, tmp_path / f"{name}-8bit", text)
        loaded = type(made).from_pretrained(tmp_path / f"{name}-8bit")
        assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == layers
        with torch.no_grad():
            exact, given = made.eval()(IDS)[0], loaded.eval()(IDS)[0]
        assert (given - exact).norm() < 0.1 * exact.norm()


def test_what_is_not_of_transformers_is_a_causal_lm() -> None:
    assert auto_class(["SomebodysOwnModel"]) is AutoModelForCausalLM
    assert auto_class(None) is AutoModelForCausalLM
