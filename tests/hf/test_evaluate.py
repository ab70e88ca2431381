"""Perplexity, two models side by side, tasks, speed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gptq_plugin.hf.bench import speed
from hf_gptq_plugin.hf.evaluate import compared, harness, perplexity, sliding_windows


@torch.no_grad()
def test_compared(tiny: Callable[..., Path]) -> None:
    first = AutoModelForCausalLM.from_pretrained(tiny("llama", initializer_range=0.1))
    second = AutoModelForCausalLM.from_pretrained(tiny("llama", initializer_range=0.1))
    second.lm_head.weight.mul_(1.5)
    windows = list(torch.randint(3, 256, (3, 1, 20)))
    found = compared(second, first, windows, progress=False)
    # The definition, one token at a time, in float64.
    sums, same = [], 0
    for ids in windows:
        p = first(input_ids=ids).logits[0, :-1].double().softmax(-1)
        q = second(input_ids=ids).logits[0, :-1].double().softmax(-1)
        for t in range(19):
            sums.append(sum(float(p[t, v]) * math.log(float(p[t, v]) / float(q[t, v])) for v in range(256)))
            same += int(p[t].argmax()) == int(q[t].argmax())
    assert found.tokens == 57
    assert found.divergence == pytest.approx(sum(sums) / 57, rel=1e-4)
    assert found.largest == pytest.approx(max(sums), rel=1e-4)
    assert found.agreement == pytest.approx(same / 57)
    assert found.perplexity == pytest.approx(perplexity(second, windows, progress=False), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(perplexity(first, windows, progress=False), rel=1e-6)


def test_another_vocabulary(tiny: Callable[..., Path]) -> None:
    models = [AutoModelForCausalLM.from_pretrained(tiny("llama", vocab_size=size)) for size in (256, 320)]
    with pytest.raises(ValueError, match="256 and 320 tokens"):
        compared(*models, [torch.tensor([[3, 4, 5]])])


class Letters:
    """A tokenizer of single letters that begins texts with 1, as real ones do."""

    bos_token_id = 1

    def __call__(self, text: str, verbose: bool, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) % 200 + 5 for letter in text]}


TEXT = "the quick brown fox jumps over the lazy dog"


@torch.no_grad()
@pytest.mark.parametrize(
    ("seqlen", "stride", "windows", "bos"),
    [(16, None, None, False), (16, None, None, True), (16, 5, None, False), (16, 7, None, True), (16, 15, 2, False),
     (100, None, None, False), (100, 3, None, True), (16, 1, None, False)],
)  # fmt: skip
def test_perplexity_by_the_protocol(
    tiny: Callable[..., Path], seqlen: int, stride: int | None, windows: int | None, bos: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama", initializer_range=0.1))
    pieces = sliding_windows(Letters(), TEXT, seqlen, stride, windows, bos)
    counts = [count for _, count in pieces]
    found = perplexity(model, [ids for ids, _ in pieces], progress=False, counts=counts)
    # Token by token: from which window is it predicted first?
    ids = Letters()(TEXT, False, not bos)["input_ids"]
    width, step = seqlen - bos, stride or seqlen - bos
    losses: dict[int, float] = {}
    begin, number = 0, 0
    while begin < len(ids) and (windows is None or number < windows):
        end = min(begin + width, len(ids))
        if stride is None and end - begin < width and number:
            break
        window = ([1] if bos else []) + ids[begin:end]
        logs = model(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
        for place in range(begin if bos else begin + 1, end):
            inside = place - begin + bos
            losses.setdefault(place, -float(logs[inside - 1, window[inside]]))
        if end == len(ids):
            break
        begin, number = begin + step, number + 1
    assert sum(counts) == len(losses)
    assert found == pytest.approx(math.exp(sum(losses.values()) / len(losses)), rel=1e-5)


def test_protocols_that_are_none() -> None:
    for match, arguments in (
        ("seqlen=1 must be at least 2", (1, None, None, False)),
        ("seqlen=2 must be at least 3", (2, None, None, True)),
        ("stride=17 must be from 1 to 16", (16, 17, None, False)),
        ("windows=-1 must be at least 1", (16, None, -1, False)),
    ):
        with pytest.raises(ValueError, match=match):
            sliding_windows(Letters(), TEXT, *arguments)
    without = Letters()
    without.bos_token_id = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no BOS token"):
        sliding_windows(without, TEXT, 16, None, None, True)


def test_a_token_that_the_model_does_not_know(tiny: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    windows = [torch.tensor([[3, 4, 5]]), torch.tensor([[3, 256, 5]])]
    for read in (lambda: perplexity(model, windows, False), lambda: compared(model, model, windows, False)):
        with pytest.raises(ValueError, match="the token id 256, and the model knows 0 to 255: the tokenizer is"):
            read()


def test_a_loss_too_large_for_a_number(tiny: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e7)
    assert perplexity(model, [torch.arange(3, 20)[None]], progress=False) == math.inf


def test_tasks_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        harness(None, None, ["piqa"])


def test_speed(tiny: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama", max_position_embeddings=64))
    calls: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = speed(model, prompt=9, new=3, batch=2, repeats=2, progress=False)
    assert calls == [(2, 9), (2, 1), (2, 1), (2, 1)] * 3  # one run that does not count
    assert found.prefill == pytest.approx(2 * 9 / found.first)
    assert found.weights == sum(t.numel() * 4 for t in model.state_dict().values())
    with pytest.raises(ValueError, match="more than the 64 positions"):
        speed(model, prompt=60, new=5)
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        speed(model, batch=0)
