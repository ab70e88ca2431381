"""Windows that a model writes: drawn from what it would say, the same for any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate.generate import PIECE, generated_windows
from hf_gptq_plugin.calibrate.sources import CalibrationError


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_text_is_drawn_from_the_models_distribution(tiny: Callable[..., Path]) -> None:
    """From one beginning on: how often which token comes second, against the model's probabilities."""
    model = load(tiny("llama", initializer_range=0.3))
    start = torch.full((1, 2), 5)
    with torch.no_grad():
        expected = model(start[:, :1]).logits[0, -1].softmax(-1)
    # Windows of two tokens, of which the first is the only one there is to begin with.
    found = torch.stack(generated_windows(model, [start[0]], 4000, seed=1))
    assert found.shape == (4000, 2) and bool((found[:, 0] == 5).all())
    counts = torch.bincount(found[:, 1], minlength=len(expected)).float() / 4000
    assert expected.max() > 0.02  # a model that prefers nothing would show nothing
    assert (counts - expected).abs().max() < 4 * float((expected.max() / 4000).sqrt())


def test_pieces_begin_with_what_all_windows_begin_with_and_a_token_of_theirs(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama"))
    given = [torch.tensor([1, 40, 41, 42]), torch.tensor([1, 43, 44] + [45] * (PIECE + 17))]
    written = generated_windows(model, given, 3, seed=0)
    assert [len(window) for window in written] == [PIECE + 20] * 3
    starts = torch.cat([window[where : where + 2][None] for window in written for where in (0, PIECE)])
    assert bool((starts[:, 0] == 1).all())
    assert set(starts[:, 1].tolist()) <= {1, 40, 41, 42, 43, 44, 45} and len(set(starts[:, 1].tolist())) > 1


def test_text_goes_on_behind_what_ends_it(tiny: Callable[..., Path]) -> None:
    """Where every token would end a text, it is what it is where none does; no padding."""
    model, given = load(tiny("llama")), [torch.arange(10, 74)]
    expected = torch.stack(generated_windows(model, given, 3, seed=0))
    own = model.generation_config
    own.eos_token_id = list(range(model.config.vocab_size))
    assert torch.equal(torch.stack(generated_windows(model, given, 3, seed=0)), expected)
    assert model.generation_config is own and own.eos_token_id == list(range(model.config.vocab_size))
    assert (expected[:, 1:] == 0).float().mean() < 0.1


@pytest.mark.parametrize("fields", [
    {"repetition_penalty": 1.5}, {"num_beams": 3}, {"suppress_tokens": list(range(100))}, {"forced_bos_token_id": 7},
    {"max_time": 1e-4}, {"return_dict_in_generate": True}, {"num_return_sequences": 2},
    {"temperature": 0.1, "top_k": 1}, {"stop_strings": ["a"]}, {"min_length": 1000},
], ids=lambda fields: next(iter(fields)))  # fmt: skip
def test_how_the_model_is_usually_asked_to_write_plays_no_part(tiny: Callable[..., Path], fields: Any) -> None:
    model, given = load(tiny("llama")), [torch.arange(10, 74)]
    expected = torch.stack(generated_windows(model, given, 2, seed=0))
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(torch.stack(generated_windows(model, given, 2, seed=0)), expected)


def test_the_same_for_any_number_of_threads(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model, given = load(tiny("llama")), [torch.tensor(w) for w in windows]
    before = torch.get_num_threads()
    texts = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            texts.append(torch.stack(generated_windows(model, given, 70, seed=3)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], torch.stack(generated_windows(model, given, 70, seed=4)))


@pytest.mark.parametrize(("kind", "auto"), [("bert", "AutoModelForMaskedLM"), ("t5", "AutoModelForSeq2SeqLM")])
def test_what_does_not_continue_text_gives_none(
    kind: str, auto: str, tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    model = getattr(transformers, auto).from_pretrained(tiny(kind), dtype=torch.float32)
    assert generated_windows(model, [torch.tensor(w) for w in windows], 2, seed=0) == []


def test_an_offloaded_model_gives_none(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = load(tiny("llama"))
    given = [torch.tensor(w) for w in windows]
    assert len(generated_windows(model, given, 2, seed=0)) == 2
    model.model.layers[1].to("meta")
    assert generated_windows(model, given, 2, seed=0) == []


def test_a_model_that_fails(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny("llama"))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no cache")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(
        CalibrationError, match=r"failed to write calibration text \(RuntimeError: no cache\); set generated=0"
    ):
        generated_windows(model, [torch.arange(4)], 1, seed=0)


def test_a_calibration_uses_them(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    config = GPTQConfig(group_size=32, dataset=windows, samples=8, generated=0.5)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32, quantization_config=config)
    assert {report.tokens for report in model.hf_quantizer.reports} == {12 * 32}
    assert model.config.quantization_config.meta["solver"]["generated"] == 0.5
    with pytest.raises(ValueError, match="generated=-1 must be a number from 0 to 100"):
        GPTQConfig(generated=-1)
