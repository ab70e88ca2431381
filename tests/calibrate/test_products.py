"""Attention as calibration computes it, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_gptq_plugin import native
from hf_gptq_plugin.calibrate import products
from hf_gptq_plugin.solve import linalg

pytestmark = pytest.mark.skipif(
    native.library() is None or not linalg.attends_faster(32), reason="PyTorch's attention is the faster one here"
)


def exact(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    k, v = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
    scores = query.double() @ k.mT * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize(
    ("batch", "heads", "shared", "queries", "keys", "causal"),
    [(1, 6, 2, 9, 9, True), (4, 6, 2, 1, 23, False), (3, 4, 4, 1, 7, False), (3, 6, 3, 5, 5, True),
     (2, 6, 2, 4, 9, False), (2, 2, 1, 1, 6, True)],
)  # fmt: skip
def test_any_batch_natively(
    batch: int, heads: int, shared: int, queries: int, keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(batch, queries, heads, 16).bfloat16().transpose(1, 2)  # as models lay them out
    key, value = (torch.randn(batch, shared, keys, 16).bfloat16() for _ in range(2))
    theirs = nn.functional.scaled_dot_product_attention
    asked = []
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: asked.append(a) or theirs(*a, **k)
    )
    found = products.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    truth = exact(query, key, value, causal)
    assert found.shape == query.shape and not asked
    assert float((found.double() - truth).abs().max()) <= 2**-8 * float(truth.abs().max())


def test_the_rest_is_pytorchs() -> None:
    query, key = torch.randn(2, 4, 3, 16).bfloat16(), torch.randn(2, 4, 5, 16).bfloat16()
    mask = torch.rand(2, 1, 3, 5) < 0.7
    mask[..., 0] = True
    with products.Attending():
        asked = (
            ((query, key, key), dict(attn_mask=mask)),
            ((query[0], key[0], key[0]), {}),
            ((query, key[:1], key[:1]), {}),
        )
        for args, options in asked:
            found = nn.functional.scaled_dot_product_attention(*args, **options)
            wanted = nn.functional.scaled_dot_product_attention(*(t.float() for t in args), **options)
            torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.02)
