"""Slow, obvious loops that the package is compared with. Nothing here imports the code under test."""

from __future__ import annotations

import numpy as np


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
