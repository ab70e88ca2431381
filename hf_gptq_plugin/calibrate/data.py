"""Calibration data to windows of token ids."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .sources import CalibrationError, Samples, read_samples

logger = logging.getLogger(__name__)


def calibration_windows(
    dataset: Any,
    tokenizer: Any,
    samples: int,
    seqlen: int,
    seed: int,
    vocab_size: int | None = None,
    packing: str = "auto",
) -> list[Tensor]:
    """Cut calibration data into windows.

    Packing "concat": samples are joined, texts by the end-of-sequence token, and cut into windows of `seqlen` tokens;
    of more than `samples` windows, a seeded draw is kept, in order. Packing "each": every sample gives one window, cut
    off after `seqlen` tokens; of more than `samples` texts or chats, a seeded draw is kept, in order, of token ids the
    first ones. Either way every window of texts and chats begins with what the tokenizer puts before a text. Chats are
    rendered by the tokenizer's chat template, and joined by nothing.

    Args:
        dataset: what `read_samples` takes, or returns.
        tokenizer: a Transformers tokenizer; not needed for token ids.
        samples: most windows.
        seqlen: most tokens per window.
        seed: of the draw.
        vocab_size: token ids must be below this, where given.
        packing: "concat", "each", or "auto": "each" for token ids, else "concat".

    Returns:
        int64 tensors `[tokens]`. Packed by "concat", all of `seqlen` tokens where there are enough.

    Raises:
        CalibrationError: empty, too short, of a wrong type, or with token ids out of range.
    """
    found = dataset if isinstance(dataset, Samples) else read_samples(dataset, seed)
    opening = [] if found.kind == "tokens" else _opening(_required(tokenizer, found))
    cut = _one_each if packing_of(found, packing) == "each" else _joined
    windows = cut(found, tokenizer, opening, samples, seqlen, torch.Generator().manual_seed(seed))
    longest = max((len(window) for window in windows), default=0)
    tokens = sum(len(window) for window in windows)
    if longest < 2:
        raise CalibrationError(
            f"the data ({found.source}) gives windows of at most {longest} tokens; at least 2 are needed, "
            f"and {samples} × {seqlen} = {samples * seqlen} were asked for: pass more text"
        )
    for i, window in enumerate(windows):
        _require_in_range(window, i, vocab_size)
    if len(windows) < samples and tokens < samples * seqlen:
        logger.warning(
            "The data gives %d windows, %d tokens; %d × %d were asked for: pass more, or ask for less.",
            len(windows), tokens, samples, seqlen,
        )  # fmt: skip
    return windows


def calibration_record(
    found: Samples, windows: list[Tensor], seqlen: int, seed: int, packing: str = "auto"
) -> dict[str, Any]:
    """What a checkpoint remembers of its calibration data. "sha256" is that of every window's length and token ids, all
    as little-endian int64."""
    digest = hashlib.sha256()
    for window in windows:
        for part in (torch.tensor([len(window)]), window):
            digest.update(part.numpy().astype("<i8").tobytes())
    return {
        "dataset": found.source,
        "windows": len(windows),
        "seqlen": seqlen,
        "tokens": sum(len(window) for window in windows),
        "seed": seed,
        "packing": packing_of(found, packing),
        "sha256": digest.hexdigest(),
    }


def packing_of(found: Samples, packing: str) -> str:
    """ "concat" or "each": what "auto" stands for is resolved."""
    if packing not in ("auto", "concat", "each"):
        raise CalibrationError(f"packing={packing!r} is not supported; use 'auto', 'concat' or 'each'")
    if packing == "auto":
        return "each" if found.kind == "tokens" else "concat"
    return packing


def _joined(
    found: Samples, tokenizer: Any, opening: list[int], samples: int, seqlen: int, draw: torch.Generator
) -> list[Tensor]:
    between = []
    if found.kind == "texts" and tokenizer.eos_token_id is not None:
        between = [tokenizer.eos_token_id]
    stream: list[int] = []
    for i, item in enumerate(found.items):
        if len(item):
            ids = _encoded(found, tokenizer, i, opening)
            if stream:
                stream += between
            stream += ids
    length = max(seqlen - len(opening), 1)
    if not stream:
        return []
    if len(stream) < length:
        return [torch.tensor(opening + stream)]
    count = len(stream) // length
    chosen: Iterable[int] = range(count)
    if count > samples:
        chosen = sorted(torch.randperm(count, generator=draw)[:samples].tolist())
    return [torch.tensor(opening + stream[i * length : (i + 1) * length]) for i in chosen]


def _one_each(
    found: Samples, tokenizer: Any, opening: list[int], samples: int, seqlen: int, draw: torch.Generator
) -> list[Tensor]:
    count = len(found.items)
    drawn = found.kind != "tokens" and count > samples
    windows: dict[int, Tensor] = {}
    for i in torch.randperm(count, generator=draw).tolist() if drawn else range(count):
        if len(windows) == samples:
            break
        ids = _encoded(found, tokenizer, i, opening)
        if ids:
            windows[i] = torch.tensor((opening + ids)[:seqlen])
    return [windows[i] for i in sorted(windows)]


def _encoded(found: Samples, tokenizer: Any, i: int, opening: list[int]) -> list[int]:
    """Token ids of one sample, without the opening."""
    item = found.items[i]
    if found.kind == "tokens":
        return item.tolist()
    text = _rendered(item, tokenizer, i) if found.kind == "chats" else item
    # verbose=False: the text is meant to be longer than the model's window.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # A chat template writes the opening itself.
    return ids[len(opening) :] if found.kind == "chats" and ids[: len(opening)] == opening else ids


def _rendered(chat: list[dict[str, Any]], tokenizer: Any, i: int) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the data are chats, but the tokenizer has no chat template; set tokenizer.chat_template, or pass texts"
        )
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False)
    except ImportError:
        raise
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise CalibrationError(
            f"the tokenizer's chat template refuses chat {i} ({type(error).__name__}: {error}); leave it out or mend it"
        ) from error


def _required(tokenizer: Any, found: Samples) -> Any:
    if tokenizer is None:
        raise CalibrationError(f"calibrating on {found.kind} needs a tokenizer: pass GPTQConfig(tokenizer=...)")
    return tokenizer


def _opening(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer puts before every text, e.g. BOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    where = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return list(full[:where])


def _require_in_range(window: Tensor, i: int, vocab_size: int | None) -> None:
    wrong = (window < 0) | (window >= vocab_size) if vocab_size is not None else window < 0
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        accepted = f"0 to {vocab_size - 1}" if vocab_size is not None else "0 and above"
        raise CalibrationError(
            f"calibration window {i} holds at position {place} the token id {int(window[place])}; this model takes "
            f"{accepted}: the tokenizer is another model's"
        )
