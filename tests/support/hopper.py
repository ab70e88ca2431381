"""The Hopper kernel's own source on the CPU: one launch in the emulator of its instructions."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import Structure, byref, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p, create_string_buffer
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated_cuda import FLAGS
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SLICE = 16

PRELUDE = """
#include "hopper.h"
template <class Launch>
int emulated(const hf_gptq::LinearArguments& p, uint64_t seed, int multiprocessors, char* message, Launch launch) {
  emulate::settings.seed = seed;
  emulate::settings.compute_capability = 90;
  emulate::settings.multiprocessors = multiprocessors;
  emulate::settings.shared_bytes = 227 * 1024;
  const int code = launch(p, hf_gptq::Device{90, multiprocessors, 227 * 1024});
  strncpy(message, emulate::error.c_str(), 255);
  return code;
}
#define EXPORT extern "C" __attribute__((visibility("default")))
"""


class Arguments(Structure):
    """`struct LinearArguments` of `kernels/cuda/linear.h`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "tiles", "x", "scales", "qzeros", "group_map", "bias", "y", "partials", "counters",
        )),
        ("x_stride", c_int64),
        *((name, c_int32) for name in (
            "M", "N", "x_columns", "k_tiles", "G", "runs", "group_slices", "zero_words", "zero_offset",
            "scale_dtype", "bits", "chunks", "stages",
        )),
    )  # fmt: skip


def start_build(source: str, target: Path) -> subprocess.Popen[bytes]:
    """Begin to compile C++ text into the shared library `target`."""
    file = target.with_suffix(".cpp")
    file.write_text(PRELUDE + source)
    return subprocess.Popen(["g++", *FLAGS, "-shared", "-o", str(target), str(file)])


@dataclass
class Problem:
    """A random layer and its input, with the product in float64.

    Args:
        M, N, K: sizes; any.
        group_size: inputs per group, a multiple of 16, or at least K.
        bits: width of a code.
        dtype: of x, bias and y.
        scale_dtype: of the scales.
        symmetric: no zeros are given.
        chunks: parts of K that are summed apart.
        group_map: whether groups lie in a shuffled order.
        padding: elements between rows of x.
    """

    M: int
    N: int
    K: int
    group_size: int
    bits: int = 4
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype = torch.float16
    symmetric: bool = False
    bias: bool = True
    chunks: int = 1
    group_map: bool = False
    padding: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.K)
        M, N, K, bits = self.M, self.N, self.K, self.bits
        groups = -(-K // self.group_size)
        self.codes = torch.randint(0, 2**bits, (N, K), generator=random)
        fields = torch.randint(0, 2**bits, (groups, N), generator=random)
        zeros = torch.full_like(fields, 2 ** (bits - 1)) if self.symmetric else fields + 1
        sign = torch.randint(0, 2, (groups, N), generator=random) * 2 - 1
        self.scales = ((0.5 + torch.rand(groups, N, generator=random)) * sign / 64).to(self.scale_dtype)
        # Row m is the same whatever M is.
        self.x = torch.randn(512, K, generator=random)[:M].to(self.dtype)
        self.offset = torch.randn(N, generator=random).to(self.dtype) if self.bias else None
        order = torch.randperm(groups, generator=random) if self.group_map else torch.arange(groups)
        self.order = order.to(torch.int32)
        group = order[torch.arange(K) // self.group_size]
        weight = ((self.codes.T - zeros[group]) * self.scales.double()[group]).T
        self.exact = self.x.double() @ weight.T + (0 if self.offset is None else self.offset.double())
        self.magnitude = self.x.double().abs() @ weight.abs().T
        self.fields, self.groups = _pack_rows(fields, bits), groups

    def run(self, function: object, seed: int = 0, multiprocessors: int = 3) -> tuple[Tensor, str]:
        """y from a driver's function, and what the emulator complains of."""
        pitch = (self.K + 7) // 8 * 8 + self.padding
        x = torch.full((self.M, pitch), torch.nan, dtype=self.dtype)
        x[:, : self.K] = self.x
        y = torch.full((self.M, self.N), torch.nan, dtype=self.dtype)
        tiles = _aligned(pack_tiles(self.codes, self.bits))
        x = _aligned(x)
        p = Arguments(
            tiles.data_ptr(), x.data_ptr(), self.scales.data_ptr(),
            None if self.symmetric else self.fields.data_ptr(),
            self.order.data_ptr() if self.group_map else None,
            None if self.offset is None else self.offset.data_ptr(), y.data_ptr(),
            None, None, pitch, self.M, self.N, self.K, -(-self.K // 64),
            self.groups, self.groups, min(self.group_size, -(-self.K // 64) * 64) // SLICE,
            self.fields.shape[1], 1, DTYPES[self.scale_dtype], self.bits, self.chunks, 0,
        )  # fmt: skip
        message = create_string_buffer(256)
        function.argtypes = (c_void_p, c_int, c_uint64, c_int, c_char_p)  # type: ignore[attr-defined]
        code = function(byref(p), DTYPES[self.dtype], seed, multiprocessors, message)  # type: ignore[operator]
        text = message.value.decode()
        assert (code != 0) == bool(text)
        return y, text

    def wrong(self, y: Tensor) -> Tensor:
        """Where y is further from the exact product than one rounding and fp32 sums allow, or is not a number."""
        rounding = 2**-11 if self.dtype == torch.float16 else 2**-8
        allowed = rounding * self.exact.abs() + 4 * 2**-24 * self.magnitude + 1e-6
        return ~((y.double() - self.exact).abs() <= allowed)


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] in the layout of `kernels/include/fragments.h`, written from its text; int32 words."""
    N, K = codes.shape
    k_tiles = -(-K // 64)
    padded = torch.zeros(-(-N // 64) * 64, k_tiles * 64, dtype=torch.int64)
    padded[:N, :K] = codes
    n, k = torch.arange(padded.shape[0])[:, None], torch.arange(padded.shape[1])[None, :]
    tile = (n // 64 * k_tiles + k // 64) * 4 + n // 16 % 4
    lane, part = 4 * (n % 8) + k % 8 // 2, k % 64 // 16
    element = k % 2 + 2 * (n // 8 % 2) + 4 * (k // 8 % 2)
    pair, half = element // 2, 16 * (element % 2)
    words = torch.zeros(padded.shape[0] // 16 * k_tiles * 32 * bits, dtype=torch.int64)

    def put(word: Tensor, shift: Tensor, value: Tensor) -> None:
        # Fields do not overlap, so adding is or-ing.
        words.index_add_(0, (tile * 32 * bits + word).flatten(), (value << shift).flatten())

    if bits == 4:
        put(4 * lane + part, 4 * pair + half, padded)
    elif bits == 8:
        put(128 * (part // 2) + 4 * lane + 2 * (part % 2) + element // 4, (8 * (element % 4)).expand_as(padded), padded)
    else:
        put(2 * lane + part // 2, 2 * (4 * (part % 2) + pair) + half, padded & 3)
        if bits == 3:
            put(64 + lane, 4 * part + pair + half, padded >> 2)
    return _as_int32(words)


def _pack_rows(fields: Tensor, bits: int) -> Tensor:
    """Fields [G, N] packed along N as one stream of bits, int32 [G, ceil(N bits / 32)]."""
    words = torch.zeros(fields.shape[0], -(-fields.shape[1] * bits // 32) + 1, dtype=torch.int64)
    for n in range(fields.shape[1]):
        word, shift = divmod(n * bits, 32)
        value = fields[:, n] << shift
        words[:, word] += value & 0xFFFFFFFF
        words[:, word + 1] += value >> 32
    return _as_int32(words[:, :-1]).contiguous()


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _aligned(tensor: Tensor) -> Tensor:
    """A copy at an address that is a multiple of 64."""
    size = tensor.element_size()
    room = torch.empty(tensor.numel() + 64 // size, dtype=tensor.dtype)
    skip = -room.data_ptr() % 64 // size
    return room[skip : skip + tensor.numel()].view_as(tensor).copy_(tensor)


def load(path: Path) -> ctypes.CDLL:
    """The driver library at `path`."""
    return ctypes.CDLL(str(path))
