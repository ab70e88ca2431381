"""Perplexity of a causal language model on text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm


def text_windows(tokenizer: Any, text: str, seqlen: int, windows: int | None = None) -> list[Tensor]:
    """Cut a text into its first non-overlapping windows.

    Args:
        tokenizer: a Transformers tokenizer; what it puts before a text stands once, at the text's beginning.
        text: at least 2 tokens.
        seqlen: tokens per window.
        windows: at most so many; None for all whole ones.

    Returns:
        int64 `[1, seqlen]` each; a text shorter than one window gives one shorter window.

    Raises:
        ValueError: fewer than 2 tokens.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < 2:
        raise ValueError(f"the text has {ids.numel()} tokens; perplexity needs at least 2")
    count = max(ids.numel() // seqlen, 1)
    count = count if windows is None else min(count, windows)
    return [ids[None, i * seqlen : (i + 1) * seqlen] for i in range(count)]


@torch.no_grad()
def perplexity(model: Any, windows: list[Tensor], progress: bool = True) -> float:
    """`exp` of the mean negative log-likelihood of every token but each window's first.

    Args:
        model: a causal language model of Transformers.
        windows: token ids `[1, tokens]`.
        progress: show a bar.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for ids in tqdm(windows, desc="Perplexity", unit="window", disable=not progress):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    model.train(was_training)
    return math.exp(total / count)
