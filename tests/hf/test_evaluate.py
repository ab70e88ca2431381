"""Two models side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gptq_plugin.hf.evaluate import compared, perplexity


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
