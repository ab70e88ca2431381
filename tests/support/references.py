"""Slow, obvious loops that the package is compared with. Nothing here imports the code under test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[L]` as one little-endian bit stream of uint32 words, bit by bit."""
    words = np.zeros(-(-len(codes) * bits // 32), dtype=np.uint32)
    for i, code in enumerate(codes):
        for b in range(bits):
            place = i * bits + b
            if (int(code) >> b) & 1:
                words[place // 32] |= np.uint32(1 << (place % 32))
    return words


def pack_weight(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[N, K]` to qweight `[R, N]` as int32."""
    return np.stack([pack_stream(row, bits) for row in codes], axis=1).view(np.int32)


def pack_zeros(zeros: np.ndarray, bits: int, offset: int) -> np.ndarray:
    """Zeros `[G, N]` to qzeros as int32; v1 (offset 1) stores zero - 1."""
    return np.stack([pack_stream(row - offset, bits) for row in zeros]).view(np.int32)


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float64 weight `[N, K]` from codes `[N, K]`, scales and zeros `[G, N]`, group `[K]`."""
    out = np.empty(codes.shape, dtype=np.float64)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = group[k]
            out[n, k] = (float(codes[n, k]) - float(zeros[g, n])) * float(scales[g, n])
    return out


def obq(
    weight: np.ndarray, hessian: np.ndarray, order: list[int], scales: np.ndarray, zeros: np.ndarray,
    group: np.ndarray, maxq: int,
) -> np.ndarray:  # fmt: skip
    """Optimal Brain Quantizer in a fixed order, float64, as in the paper: one weight at a time, and after each the
    inverse Hessian of the weights still free, by removing one row and column.

    weight `[N, K]`, hessian `[K, K]` damped, scales and zeros `[N, G]`, group `[K]`; returns codes `[N, K]`.
    """
    codes = np.zeros(weight.shape, dtype=np.int64)
    for n in range(weight.shape[0]):
        w = weight[n].astype(np.float64).copy()
        inverse = np.linalg.inv(hessian.astype(np.float64))
        for k in order:
            s, z = float(scales[n, group[k]]), float(zeros[n, group[k]])
            q = min(max(np.round(w[k] / s) + z, 0.0), float(maxq))
            codes[n, k] = int(q)
            error = w[k] - (q - z) * s
            w -= error / inverse[k, k] * inverse[:, k]
            inverse = inverse - np.outer(inverse[:, k], inverse[k, :]) / inverse[k, k]
    return codes


def best_scale_sym(weight: np.ndarray, importance: np.ndarray, bits: int, shrinks: list[float]) -> float:
    """Least weighted squared error over all candidates of one symmetric group, in float64; the error itself."""
    maxq, zero = 2**bits - 1, 2 ** (bits - 1)
    base = 2 * np.abs(weight).max() / maxq
    best = np.inf
    for t in shrinks:
        for sign in (1, -1):
            s = float(np.float16(sign * t * base))
            codes = np.clip(np.round(weight / s) + zero, 0, maxq)
            best = min(best, float((importance * (weight - (codes - zero) * s) ** 2).sum()))
    return best


def packed_windows(
    samples: list[list[int]], between: int, opening: list[int], count: int, seqlen: int, seed: int
) -> list[list[int]]:
    """Token ids joined by `between`, cut into whole windows that begin with `opening`, and `count` of them drawn."""
    stream: list[int] = []
    for sample in samples:
        for token in ([between] if stream else []) + sample:
            stream.append(token)
    windows = []
    while len(stream) >= seqlen - len(opening):
        window = list(opening)
        while len(window) < seqlen:
            window.append(stream[len(window) - len(opening)])
        del stream[: seqlen - len(opening)]
        windows.append(window)
    places = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(places[:count])
    return [window for i, window in enumerate(windows) if i in chosen]


def magnitude_divergence(weight: np.ndarray, scale: float, zero: float, bits: int) -> float:
    """Generalized Kullback-Leibler divergence of the magnitudes of a group from those after rounding, float64."""
    total = 0.0
    for w in weight.astype(np.float64):
        code = min(max(float(np.round(w / scale) + zero), 0.0), 2.0**bits - 1)
        p, q = abs(w), abs((code - zero) * scale)
        if q == 0:
            q = abs(scale) / 4
        total += (p * np.log(p / q) if p else 0.0) - p + q
    return total


def lp_error(weight: np.ndarray, scale: float, zero: float, bits: int, p: float) -> float:
    """Sum of |w - w^|^p over a group rounded to the nearest, float64."""
    total = 0.0
    for w in weight.astype(np.float64):
        code = min(max(float(np.round(w / scale) + zero), 0.0), 2.0**bits - 1)
        total += abs(w - (code - zero) * scale) ** p
    return total


def half_quadratic(
    weight: np.ndarray, scale: float, zero: float, bits: int, sym: bool, lowest: int, p: float, beta: float,
    growth: float, rounds: int, steps: list[float],
) -> tuple[float, float]:  # fmt: skip
    """Half-quadratic refinement of one group's fp16 scale and integer zero, one weight at a time, float64."""
    last = 2.0**bits - 1
    best = (lp_error(weight, scale, zero, bits, p), scale, zero)
    limit = lp_error(weight, scale, zero, bits, 2)

    def meet(s: float, z: float) -> None:
        nonlocal best
        value = lp_error(weight, s, z, bits, p)
        if value < best[0] and lp_error(weight, s, z, bits, 2) <= limit:
            best = (value, s, z)

    for _ in range(rounds):
        codes, targets = [], []
        for w in weight.astype(np.float64):
            code = min(max(float(np.round(w / scale) + zero), 0.0), last)
            error = w / scale - (code - zero)
            size = abs(error)
            outlier = np.sign(error) * max(size - size ** (p - 1) / beta, 0.0) if size else 0.0
            codes.append(code)
            targets.append(w / scale - outlier)
        if not sym:
            shift = sum(c - t for c, t in zip(codes, targets, strict=True)) / len(codes)
            zero = min(max(float(np.round(shift)), lowest), last)
        q = [c - zero for c in codes]
        square = sum(x * x for x in q)
        if square:
            scale = float(np.float16(scale * sum(x * t for x, t in zip(q, targets, strict=True)) / square))
        meet(scale, zero)
        beta *= growth
    around, zero = best[1:]
    for shift in (0,) if sym else (-1, 0, 1):
        for t in steps:
            meet(float(np.float16(around * t)), zero if sym else min(max(zero + shift, lowest), last))
    return best[1:]


def tile_place(n: int, k: int, bits: int, b: int) -> tuple[int, int]:
    """Word of its tile, and bit of that word, of bit `b` of the code at output `n`, input `k`."""
    lane, part = 4 * (n % 8) + k % 8 // 2, k % 64 // 16
    right, below, odd = k % 16 // 8, n % 16 // 8, k % 2
    pair = 2 * right + below  # register of the fragment
    if bits == 4:
        return 4 * lane + part, 4 * pair + 16 * odd + b
    if bits == 8:
        return 128 * (part // 2) + 4 * lane + 2 * (part % 2) + right, 8 * (2 * below + odd) + b
    if b < 2:
        return 2 * lane + part // 2, 8 * (part % 2) + 2 * pair + 16 * odd + b
    return 64 + lane, 4 * part + pair + 16 * odd


def pack_tiles(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[N, K]` in the layout of `kernels/include/fragments.h`, uint32 `[panels, k_tiles, 4, 32 * bits]`, bit by
    bit; each place of the result must be written exactly once."""
    n_count, k_count = codes.shape
    panels, k_tiles = -(-n_count // 64), -(-k_count // 64)
    words = np.zeros((panels, k_tiles, 4, 32 * bits), dtype=np.uint32)
    written = np.zeros_like(words)
    for n in range(panels * 64):
        for k in range(k_tiles * 64):
            code = int(codes[n, k]) if n < n_count and k < k_count else 0
            for b in range(bits):
                word, bit = tile_place(n, k, bits, b)
                place = (n // 64, k // 64, n % 64 // 16, word)
                assert not int(written[place]) >> bit & 1
                written[place] |= np.uint32(1 << bit)
                words[place] |= np.uint32((code >> b & 1) << bit)
    assert (written == 0xFFFFFFFF).all()
    return words


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once: the exact sum to odd in float64, then to float32."""
    product = a.astype(np.float64) * b.astype(np.float64)  # 48 bits, exact
    wide = c.astype(np.float64)
    total = product + wide
    rest = total - product
    error = (product - (total - rest)) + (wide - rest)  # what the addition lost, exactly
    even = total.view(np.int64) % 2 == 0
    to_odd = np.where((error != 0) & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return to_odd.astype(np.float32)


def flush(a: np.ndarray) -> np.ndarray:
    """float32 with zeros for subnormal numbers."""
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.float32(0), a)


def runs(group: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where places `[start, end)` of `order [K]` follow each other in one group."""
    edges = [i for i in range(1, len(order)) if group[order[i]] != group[order[i - 1]]]
    return zip([0, *edges], [*edges, len(order)], strict=True)


def parts(group: np.ndarray, order: np.ndarray, bits: int) -> Iterator[tuple[int, np.ndarray]]:
    """Group and inputs of every part: a run is cut every 256 places, counted from the first unit that it touches."""
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    for start, end in runs(group, order):
        for first in range(start // unit * unit, end, 256):
            yield group[order[start]], order[max(first, start) : min(first + 256, end)]


def product_of_pairs(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray, order: np.ndarray,
    bits: int,
) -> np.ndarray:  # fmt: skip
    """y `[N]` in float32 of one row as AVX512-BF16 sums it: codes in `order`, group by group, two at a time.

    x `[K]` float32 that are bf16, codes `[N, K]`, scales and zeros `[G, N]`, group `[K]`, order `[K]`.
    """
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    total = np.zeros(codes.shape[0], dtype=np.float32)
    for start, end in runs(group, order):
        g = group[order[start]]

        def step(sum_: np.ndarray, i: int, start: int = start, end: int = end, g: int = g) -> np.ndarray:
            if not start <= i < end:
                return sum_
            k = order[i]
            code = (codes[:, k].astype(np.float32) - zeros[g]).astype(np.float32)
            return flush(fused(np.broadcast_to(flush(x[k]), code.shape), code, sum_))

        sum_ = np.zeros(codes.shape[0], dtype=np.float32)
        for first in range(start // unit * unit, end, unit):
            for j in range(unit // 2):
                sum_ = step(sum_, first + j + unit // 2)
                sum_ = step(sum_, first + j)
        total = fused(sum_, scales[g].astype(np.float32), total)
    return total


def product_of_tiles(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray, order: np.ndarray,
    bits: int,
) -> np.ndarray:  # fmt: skip
    """y `[N]` in float32 of one row as AMX sums it: of sixteen pairs the lower halves, the upper halves, then both.

    Arguments as of `product_of_pairs`.
    """
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    total = np.zeros(codes.shape[0], dtype=np.float32)
    for start, end in runs(group, order):
        g = group[order[start]]
        for first in range(start // unit * unit, end, 256):
            lower = [u + j for u in range(first, min(first + 256, end), unit) for j in range(unit // 2)]
            sum_ = np.zeros(codes.shape[0], dtype=np.float32)
            for step in range(0, len(lower), 16):
                halves = []
                for above in (0, unit // 2):
                    half = np.zeros(codes.shape[0], dtype=np.float32)
                    for i in (i + above for i in lower[step : step + 16]):
                        if start <= i < end:
                            code = (codes[:, order[i]].astype(np.float32) - zeros[g]).astype(np.float32)
                            half = flush(fused(np.broadcast_to(flush(x[order[i]]), code.shape), code, half))
                    halves.append(half)
                sum_ = flush(sum_ + flush(halves[0] + halves[1]))
            total = fused(sum_, scales[g].astype(np.float32), total)
    return total


def product_of_integers(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray, order: np.ndarray,
    bits: int,
) -> np.ndarray:  # fmt: skip
    """y `[N]` in float32 of one row as AVX2 sums 16-bit activations: as integers under one power of two, by parts.

    x `[K]` float32 that are bf16 or fp16, finite; codes `[N, K]`, scales and zeros `[G, N]`, group `[K]`, order `[K]`.
    """
    total = np.zeros(codes.shape[0], dtype=np.float32)
    for g, inputs in parts(group, order, bits):
        values = x[inputs].astype(np.float64)
        exponent = int(np.frexp(np.abs(values).max())[1]) - 15 if values.any() else -126
        exponent = max(exponent, -126)
        scaled = np.ldexp(values, -exponent)
        high = np.rint(scaled)
        low = np.rint((scaled - high) * 2**15)
        if 4 * np.abs(low).sum() <= np.abs(high).sum():
            low[:] = 0
        differences = codes[:, inputs].astype(np.int64) - zeros[g].astype(np.int64)[:, None]
        sums = [(differences @ part.astype(np.int64)).astype(np.float32).astype(np.float64) for part in (high, low)]
        value = np.ldexp((sums[0] + sums[1] * 2.0**-15).astype(np.float32), exponent)
        total = fused(value.astype(np.float32), scales[g].astype(np.float32), total)
    return total


def product_of_bytes(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray, order: np.ndarray,
    bits: int,
) -> np.ndarray:  # fmt: skip
    """y `[N]` in float32 of one row with activations rounded to 8 bits: integers times max |x| / 127, by parts.

    x `[K]` float32, finite; codes `[N, K]`, scales and zeros `[G, N]`, group `[K]`, order `[K]`.
    """
    total = np.zeros(codes.shape[0], dtype=np.float32)
    for g, inputs in parts(group, order, bits):
        values = x[inputs].astype(np.float32)
        most = np.abs(values).max()
        scale = np.float32(most / np.float32(127)) if most >= 2.0**-119 else np.float32(0)
        inverse = np.float32(127) / most if most >= 2.0**-119 else np.float32(0)
        integers = np.rint(values * inverse).astype(np.int64)
        sums = (codes[:, inputs].astype(np.int64) - zeros[g].astype(np.int64)[:, None]) @ integers
        total = fused(sums.astype(np.float32) * scale, scales[g].astype(np.float32), total)
    return total
