"""How well a causal language model does: perplexity on text, beside another model, and on tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

_TOKENS = 256  # that two models are compared on at a time


def require_readable(model: Any, windows: Iterable[Tensor]) -> None:
    """Check that a model can read windows of token ids, `[tokens]` or `[1, tokens]`.

    Raises:
        ValueError: one is longer than what the model was made for, or holds a token that it does not know.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for ids in windows:
        seqlen, highest = ids.shape[-1], int(ids.max())
        if isinstance(known, int) and highest >= known:
            raise ValueError(
                f"the text holds the token id {highest}, and the model knows 0 to {known - 1}: the tokenizer is "
                "another model's"
            )
        if isinstance(most, int) and seqlen > most:
            raise ValueError(f"seqlen={seqlen} is more than the {most} tokens that the model was made for; shorten it")


def _logits(model: Any, ids: Tensor) -> Tensor:
    """What a model makes of token ids `[1, tokens]`, for all tokens but the last, `[tokens - 1, vocabulary]`."""
    try:
        return model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
    except IndexError:
        require_readable(model, [ids])
        raise


def text_windows(tokenizer: Any, text: str, seqlen: int, windows: int | None = None, bos: bool = False) -> list[Tensor]:
    """Cut a text into its first non-overlapping windows.

    Args:
        tokenizer: a Transformers tokenizer; what it puts before a text stands once, at the text's beginning.
        text: at least 2 tokens.
        seqlen: tokens per window, at least 2.
        windows: at most so many; None for all whole ones.
        bos: begin every window with the tokenizer's BOS token, which counts among its tokens.

    Returns:
        int64 `[1, seqlen]` each; a text shorter than one window gives one shorter window.

    Raises:
        ValueError: fewer than 2 tokens, a length or a number of windows that is none, a tokenizer without BOS.
    """
    return [ids for ids, _ in sliding_windows(tokenizer, text, seqlen, None, windows, bos)]


def sliding_windows(
    tokenizer: Any, text: str, seqlen: int, stride: int | None, windows: int | None = None, bos: bool = False
) -> list[tuple[Tensor, int]]:
    """Cut a text into windows that overlap, so that every token is predicted from some context.

    A window begins `stride` tokens after the one before it, and of its tokens only those count that have not counted
    yet. Without a stride windows lie side by side and all their tokens count, but the first, which nothing predicts.

    Args:
        tokenizer, text, seqlen, windows, bos: see `text_windows`.
        stride: 1 to seqlen; None for seqlen and whole windows only.

    Returns:
        Token ids `[1, T]` and how many of the last of them count, for each window.

    Raises:
        ValueError: as `text_windows`, and a stride that is none.
    """
    if seqlen < 2 + bos:
        raise ValueError(f"seqlen={seqlen} must be at least {2 + bos}")
    if windows is not None and windows < 1:
        raise ValueError(f"windows={windows} must be at least 1")
    if stride is not None and not 1 <= stride <= seqlen - bos:
        raise ValueError(f"stride={stride} must be from 1 to {seqlen - bos}")
    first = getattr(tokenizer, "bos_token_id", None)
    if bos and first is None:
        raise ValueError("this tokenizer has no BOS token; evaluate without")
    given = tokenizer(text, verbose=False, add_special_tokens=not bos)["input_ids"]
    ids = torch.tensor(given, dtype=torch.int64)
    if ids.numel() < 2:
        raise ValueError(f"the text has {ids.numel()} tokens; perplexity needs at least 2")
    width = seqlen - bos
    step = width if stride is None else stride
    out: list[tuple[Tensor, int]] = []
    counted = 0
    for begin in range(0, ids.numel(), step):
        end = min(begin + width, ids.numel())
        whole = end - begin == width or not out
        if (stride is None and not whole) or end - begin < 2 - bos or len(out) == windows:
            break
        piece = ids[begin:end]
        count = min(end - counted, piece.numel() - (0 if bos else 1))
        out.append((torch.cat([torch.tensor([first]), piece]) if bos else piece, count))
        counted = end
        if end == ids.numel():
            break
    return [(piece[None], count) for piece, count in out]


@torch.no_grad()
def perplexity(
    model: Any, windows: Sequence[Tensor], progress: bool = True, counts: Sequence[int] | None = None
) -> float:
    """`exp` of the mean negative log-likelihood of every token but each window's first.

    Args:
        model: a causal language model of Transformers.
        windows: token ids `[1, tokens]`.
        progress: show a bar.
        counts: how many of each window's last tokens count, see `sliding_windows`.

    Returns:
        Infinity where the mean is too large.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for number, ids in enumerate(tqdm(windows, desc="Perplexity", unit="window", disable=not progress)):
        last = ids.shape[1] - 1 if counts is None else counts[number]
        logits = _logits(model, ids)[-last:].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, -last:].to(logits.device), reduction="sum"))
        count += last
    model.train(was_training)
    return _exp(total / count)


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def harness(
    model: Any, tokenizer: Any, tasks: list[str], shots: int | None = None, limit: int | None = None,
    folder: str | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Tasks of EleutherAI's lm-evaluation-harness.

    Args:
        model, tokenizer: of Transformers.
        tasks: names as the harness knows them.
        shots: examples in every prompt; the tasks' own number by default.
        limit: documents per task, from the beginning; None for all.
        folder: with task files of your own.

    Returns:
        Task to metric to value.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: a task that it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"tasks are those of the lm-evaluation-harness, which cannot be imported ({error}); install it: "
            "pip install lm_eval"
        ) from None
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"the harness knows no task {unknown[0]!r}; see lm_eval ls tasks")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    found: Any = simple_evaluate(
        wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
    )
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in values.items()
            if isinstance(value, float) and not metric.startswith("alias")
        }
        for task, values in found["results"].items()
    }


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
    loss, divergence, agreed, count, largest = [0.0, 0.0], 0.0, 0, 0, torch.zeros(())
    for ids in tqdm(windows, desc="Comparing", unit="window", disable=not progress):
        logits = [_logits(each.eval(), ids) for each in (model, reference)]
        parts = zip(*(each.split(_TOKENS) for each in (*logits, ids[0, 1:])), strict=True)
        for own, other, targets in parts:  # in fp32 a whole window of a large vocabulary would not fit beside a model
            logs = [torch.log_softmax(part.to(own.device, torch.float32), -1) for part in (own, other)]
            for number, each in enumerate(logs):
                loss[number] += float(torch.nn.functional.nll_loss(each, targets.to(own.device), reduction="sum"))
            each_token = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
            divergence += float(each_token.sum())
            largest = torch.maximum(largest, each_token.max().cpu())  # NaN, once there was one
            agreed += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        count += ids.shape[1] - 1
    mean, most = divergence / count, float(largest)
    return Comparison(_exp(loss[0] / count), _exp(loss[1] / count), mean, most, agreed / count, count)
