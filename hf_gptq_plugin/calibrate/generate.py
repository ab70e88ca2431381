"""Calibration text that the dense model writes itself.

A text shows what its own domain asks of the weights. What a model samples comes from all that it was trained on, and
costs nothing but time (Liu et al. 2023, LLM-QAT; Williams et al. 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import processes
from .offload import is_offloaded
from .products import Attending, own_products
from .sources import CalibrationError
from .threads import in_order
from .walk import input_device

logger = logging.getLogger(__name__)

# Tokens written in one go. A window holds several such pieces, as windows of joined texts do: writing takes time that
# grows faster than the length, and every piece begins somewhere else.
PIECE = 64
# Pieces written side by side, by one thread whatever the number of threads: products of other sizes round otherwise,
# and a text goes another way from there.
_BATCH = 32


@torch.no_grad()
def generated_windows(model: Any, windows: list[Tensor], count: int, seed: int) -> list[Tensor]:
    """Windows sampled from a model at temperature 1, as long as the longest of those given.

    Every piece of `PIECE` tokens begins with a token drawn evenly from those that the given windows hold, behind the
    one that all of them begin with, if so (BOS).

    Args:
        model: a dense Transformers model. One that does not continue text (an encoder, an encoder-decoder), or is
            partly offloaded, gives none.
        windows: token ids, int64 `[tokens]` each.
        count: windows to write.
        seed: of the draws.

    Raises:
        CalibrationError: the model failed while it wrote.
    """
    if not count:
        return []
    why = _cannot_write(model)
    if why:
        logger.info("%s %s: it is calibrated on the given text alone.", type(model).__name__, why)
        return []
    length = max(map(len, windows))
    firsts = torch.stack([window[0] for window in windows]).unique()
    opening = firsts if len(windows) > 1 and len(firsts) == 1 else firsts[:0]
    size = max(min(PIECE, length), len(opening) + 1)
    pieces = count * -(-length // size)
    draw = torch.Generator().manual_seed(seed)
    known = torch.cat(windows).unique()
    begun = known[torch.randint(len(known), (pieces, 1), generator=draw)]
    begun = torch.cat([opening.expand(pieces, -1), begun], 1)
    device = input_device(model)
    batches = list(enumerate(begun.split(_BATCH)))
    try:
        steps = processes.progress(len(batches) * (size - begun.shape[1]), "Writing text", "step", leave=False)
        with own_products(model), _own_ways_forgotten(model), steps as bar:

            def written_step() -> None:
                with bar.get_lock():  # several threads write
                    bar.update()

            def work(batch: tuple[int, Tensor]) -> Tensor:
                return _continued(model, batch, size, seed, device, written_step)

            written = torch.cat(list(in_order(work, batches, device.type == "cpu")))
    except Exception as error:  # the model's own code, and whatever it calls
        raise CalibrationError(
            f"{type(model).__name__} failed to write calibration text ({type(error).__name__}: {error}); set "
            "generated=0"
        ) from error
    return [window.flatten()[:length].clone() for window in written.view(count, -1)]


def drawn(probable: Tensor, draw: torch.Generator) -> Tensor:
    """A sample of every distribution `[..., n]` of finitely many things, int64 `[..., 1]`."""
    uniform = torch.rand(*probable.shape[:-1], 1, generator=draw).to(probable.device)
    sums = probable.cumsum(-1)
    return torch.searchsorted(sums, uniform * sums[..., -1:], right=True).clamp_(max=probable.shape[-1] - 1)


def _cannot_write(model: Any) -> str:
    """Why not, or ""."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or model.config.is_encoder_decoder:
        return "does not continue text"
    if is_offloaded(model):
        return "is offloaded, and every token would read all of it"
    return ""


@contextmanager
def _own_ways_forgotten(model: Any) -> Iterator[None]:
    """Let a model's own config play no part: `generate` takes from it whatever it is not told. It may ask for beams or
    penalties, and name tokens that end a text: what follows those is filled with padding, and what the model writes
    there is text, too (the next turn of a chat, the next document)."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def _continued(
    model: Any, batch: tuple[int, Tensor], size: int, seed: int, device: torch.device, step: Callable[[], None]
) -> Tensor:
    """Beginnings `[pieces, few]` continued to `[pieces, size]`; `step` is called after every token."""
    from transformers import GenerationConfig, LogitsProcessorList

    number, begun = batch
    if begun.shape[1] == size:
        return begun
    noise = torch.Generator().manual_seed(seed + 1 + number)

    def sampled(ids: Tensor, logits: Tensor) -> Tensor:
        """Nothing but a sample of their softmax. Unlike torch.multinomial behind `do_sample`, it draws from a generator
        that no other thread uses."""
        chosen = drawn(torch.softmax(logits.float(), -1), noise)
        step()
        return torch.full_like(logits, -torch.inf).scatter_(-1, chosen, 0.0)

    config = GenerationConfig(max_new_tokens=size - begun.shape[1], do_sample=False, pad_token_id=0, use_cache=True)
    begun = begun.to(device)
    with Attending():
        out = model.generate(
            begun, attention_mask=torch.ones_like(begun), generation_config=config,
            logits_processor=LogitsProcessorList([sampled]),
        )  # fmt: skip
    return out.cpu()
