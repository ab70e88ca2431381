"""Perplexity of a causal language model on text."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference on the same tokens.

    Args:
        perplexity, reference_perplexity: see `perplexity`.
        divergence: mean `KL(reference | model)` per token, in nats.
        largest: its largest value for one token.
        agreement: share of tokens at which both find the same next token likeliest.
        tokens: predicted tokens.
    """

    perplexity: float
    reference_perplexity: float
    divergence: float
    largest: float
    agreement: float
    tokens: int


@torch.no_grad()
def compared(model: Any, reference: Any, windows: list[Tensor], progress: bool = True) -> Comparison:
    """Run two models with the same vocabulary on the same windows.

    Args:
        model, reference: causal language models of Transformers.
        windows: token ids `[1, tokens]`.
        progress: show a bar.

    Raises:
        ValueError: vocabularies of different sizes.
    """
    sizes = [m.get_input_embeddings().num_embeddings for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models have {sizes[0]} and {sizes[1]} tokens; only models of one vocabulary compare")
    loss, divergence, agreed, count, largest = [0.0, 0.0], 0.0, 0, 0, 0.0
    for ids in tqdm(windows, desc="Comparing", unit="window", disable=not progress):
        logs = []
        for number, each in enumerate((model, reference)):
            each.eval()
            logits = each(input_ids=ids.to(each.device), use_cache=False).logits[0, :-1].float().cpu()
            logs.append(torch.log_softmax(logits, -1))
            loss[number] += float(torch.nn.functional.nll_loss(logs[-1], ids[0, 1:], reduction="sum"))
        each_token = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
        divergence += float(each_token.sum())
        largest = max(largest, float(each_token.max()))
        agreed += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        count += ids.shape[1] - 1
    return Comparison(
        math.exp(loss[0] / count), math.exp(loss[1] / count), divergence / count, largest, agreed / count, count
    )
