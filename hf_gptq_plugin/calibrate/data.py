"""Calibration text to windows of token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Names that the stock GPTQConfig accepts, as data sets on the Hub: path, configuration, split, text column.
NAMED = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "c4-new": ("allenai/c4", "en", "train", "text"),
}
_NAMED_TEXTS = 20_000  # enough lines for any sensible number of windows


class CalibrationError(ValueError):
    """Calibration data that cannot be used; the message says what is accepted."""


def calibration_windows(
    dataset: Any, tokenizer: Any, samples: int, seqlen: int, seed: int, vocab_size: int | None = None
) -> list[Tensor]:
    """Cut calibration data into windows.

    Texts are tokenized, joined by the end-of-sequence token, and cut into windows of `seqlen` tokens, each with the
    tokenizer's beginning-of-sequence token where it uses one; of more than `samples` windows, a seeded draw is
    kept, in text order. Token lists are taken one window each, cut at `seqlen`.

    Args:
        dataset: list of strings, list of token-id sequences (or dicts with "input_ids"), or a name in `NAMED`.
        tokenizer: a Transformers tokenizer; only needed for text.
        samples: most windows.
        seqlen: most tokens per window.
        seed: of the draw.
        vocab_size: token ids must be below this, where given.

    Returns:
        int64 tensors `[tokens]`, all of `seqlen` tokens where there was enough text.

    Raises:
        CalibrationError: empty, too short, of a wrong type, or with token ids out of range.
    """
    if dataset is None:
        raise CalibrationError(
            "quantizing needs calibration text: pass GPTQConfig(dataset=[...texts...], tokenizer=...)"
        )
    if isinstance(dataset, str):
        dataset = _load_named(dataset, seed)
    if isinstance(dataset, Tensor):
        dataset = list(dataset) if dataset.dim() == 2 else [dataset]
    if not isinstance(dataset, Sequence) or not len(dataset):
        raise CalibrationError(
            f"dataset={dataset!r:.80} is empty or not a list; pass a list of texts, a list of token-id lists, or one "
            f"of the names {', '.join(NAMED)}"
        )
    if isinstance(dataset[0], str):
        windows = _windows_of_text(dataset, tokenizer, samples, seqlen, seed)
    else:
        windows = [_token_ids(item)[:seqlen] for item in dataset[:samples]]
    windows = [window for window in windows if window.numel() > 0]
    if not windows or max(window.numel() for window in windows) < 2:
        raise CalibrationError("the calibration data holds fewer than 2 tokens; pass more text")
    for window in windows:
        low, high = int(window.min()), int(window.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            raise CalibrationError(
                f"calibration data holds token id {low if low < 0 else high}; this model takes 0 to "
                f"{(vocab_size or 0) - 1}: the tokenizer is another model's"
            )
    if len(windows) < samples and sum(w.numel() for w in windows) < samples * seqlen:
        logger.warning(
            "The calibration data gives %d windows, %d tokens; %d × %d were asked for.",
            len(windows), sum(w.numel() for w in windows), samples, seqlen,
        )  # fmt: skip
    return windows


def _windows_of_text(texts: Sequence[Any], tokenizer: Any, samples: int, seqlen: int, seed: int) -> list[Tensor]:
    if tokenizer is None:
        raise CalibrationError("calibrating on text needs a tokenizer: pass GPTQConfig(tokenizer=...)")
    stream: list[int] = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise CalibrationError(f"dataset[{i}] is {type(text).__name__}; the items before it are strings")
        if not text:
            continue
        # verbose=False: the text is meant to be longer than the model's window.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if stream and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += ids
    opening = _opening(tokenizer)
    length = max(seqlen - len(opening), 1)
    if len(stream) < length:
        return [torch.tensor(opening + stream, dtype=torch.int64)]
    count = len(stream) // length
    chosen = range(count)
    if count > samples:
        draw = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
        chosen = sorted(draw.tolist())  # type: ignore[assignment]
    return [torch.tensor(opening + stream[i * length : (i + 1) * length], dtype=torch.int64) for i in chosen]


def _opening(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer puts before every text, e.g. BOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    where = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return list(full[:where])


def _token_ids(item: Any) -> Tensor:
    if isinstance(item, dict) or hasattr(item, "keys"):
        if "input_ids" not in item:
            raise CalibrationError(f"a calibration item has the keys {list(item)}; it needs 'input_ids'")
        mask = item.get("attention_mask")
        ids = torch.as_tensor(item["input_ids"]).reshape(-1)
        return ids[torch.as_tensor(mask).reshape(-1).bool()].long() if mask is not None else ids.long()
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise CalibrationError(
            f"a calibration item is {item!r:.60}; accepted are strings, lists of token ids, and dicts with 'input_ids'"
        )
    return ids.long()


def _load_named(name: str, seed: int) -> list[str]:
    if name not in NAMED:
        raise CalibrationError(f"dataset={name!r} is not known; use one of {', '.join(NAMED)}, or pass a list of texts")
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"dataset={name!r} is fetched through the datasets library: pip install 'hf-gptq-plugin[data]'"
        ) from None
    path, config, split, column = NAMED[name]
    rows = load_dataset(path, config, split=split, streaming=True).shuffle(seed=seed, buffer_size=1000)
    return [row[column] for row in rows.take(_NAMED_TEXTS) if row[column].strip()]
