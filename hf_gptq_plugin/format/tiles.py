"""The layout that tensor cores read: codes in fragments of 16 outputs by 64 inputs.

`kernels/include/fragments.h` states it. A weight is int32 `[ceil(N / 64), ceil(rows / 64), 4, 32 * bits]`: panels of 64
outputs, in each the tiles along the rows, four of 16 outputs side by side. Rows are the inputs in packed order; missing
ones and missing outputs hold code 0. The GPU packs; this module says in which order and takes apart on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 64  # outputs whose tiles lie together
TILE = 64  # rows of a tile
SLICE = 16  # rows of one product of the tensor cores; scales change only between slices


def row_order(group: Tensor | None, in_features: int, group_size: int, groups: int) -> Tensor | None:
    """The order of the rows, or None where inputs stay as they are.

    Args:
        group: int32 `[K]`, the group of each input, or None where it is `k // group_size`.
        in_features: `K`.
        group_size: inputs per group where `group` is None.
        groups: `G`.

    Returns:
        None: rows are inputs, groups begin every `group_size` rows.
        int32 `[K]`: the input of each row, sorted by group; groups begin every `group_size` rows.
        int32 `[rows * 17 / 16]`, rows > K or not: the input of each row, −1 for padding that lets every group begin
        at a multiple of 16; then the group of each 16 rows.
    """
    device = None if group is None else group.device
    if group is None:
        if group_size % SLICE == 0 or group_size >= in_features:
            return None
        group = torch.arange(in_features, device=device) // group_size
    group = group.long()
    order = torch.argsort(group, stable=True)
    place = torch.arange(in_features, device=group.device)
    if group_size % SLICE == 0 and bool(torch.equal(group[order], place // group_size)):
        return order.to(torch.int32)
    counts = torch.bincount(group, minlength=groups)
    padded = (counts + SLICE - 1) // SLICE * SLICE
    ends, padded_ends = counts.cumsum(0), padded.cumsum(0)
    by_row = group[order]
    rows = place - (ends - counts)[by_row] + (padded_ends - padded)[by_row]
    inputs = torch.full((int(padded_ends[-1]),), -1, dtype=torch.int32, device=group.device)
    inputs[rows] = order.to(torch.int32)
    runs = torch.repeat_interleave(torch.arange(groups, device=group.device), padded // SLICE).to(torch.int32)
    return torch.cat([inputs, runs])


def split_order(order: Tensor | None, in_features: int) -> tuple[Tensor | None, Tensor | None]:
    """What `row_order` returned, as the input of each row and the group of each 16 rows; None where trivial."""
    if order is None or order.numel() == in_features:
        return order, None
    rows = order.numel() * SLICE // (SLICE + 1)
    return order[:rows], order[rows:]


def row_of(inputs: Tensor, in_features: int) -> Tensor:
    """The row of each input, int32 `[K]`, from the input of each row."""
    rows = torch.arange(inputs.numel(), dtype=torch.int32, device=inputs.device)
    held = inputs >= 0
    out = torch.empty(in_features, dtype=torch.int32, device=inputs.device)
    out[inputs[held].long()] = rows[held]
    return out


def unpack_tiles(tiles: Tensor, bits: int) -> Tensor:
    """Codes, uint8 `[64 * panels, 64 * k_tiles]`: outputs by rows, padding included."""
    panels, k_tiles, quarters, _ = tiles.shape
    n, k = torch.arange(16, device=tiles.device)[:, None], torch.arange(TILE, device=tiles.device)[None, :]
    lane = 4 * (n % 8) + k % 8 // 2
    part = k // 16
    element = k % 2 + 2 * (n // 8) + 4 * (k % 16 // 8)
    pair, half = element // 2, 16 * (element % 2)
    flat = tiles.flatten(0, 2)
    if bits == 4:
        codes = _field(flat, 4 * lane + part, 4 * pair + half, 15)
    elif bits == 8:
        codes = _field(flat, 128 * (part // 2) + 4 * lane + 2 * (part % 2) + element // 4, 8 * (element % 4), 255)
    else:
        codes = _field(flat, 2 * lane + part // 2, 2 * (4 * (part % 2) + pair) + half, 3)
        if bits == 3:
            codes = codes | _field(flat, 64 + lane, 4 * part + pair + half, 1) << 2
    by_tile = codes.unflatten(0, (panels, k_tiles, quarters))
    return by_tile.permute(0, 2, 3, 1, 4).reshape(panels * PANEL, k_tiles * TILE)


def _field(flat: Tensor, word: Tensor, shift: Tensor, mask: int) -> Tensor:
    """Fields `[tiles, 16, 64]` at `word`, `shift` of each tile's words."""
    word, shift = torch.broadcast_tensors(word, shift)
    return (flat[:, word] >> shift.to(torch.int32) & mask).to(torch.uint8)
