// Between the checkpoint's order and the tiles, and the activations of a permuted weight. These run
// when a model is loaded or saved, or on few bytes; they are simple before they are fast.
#ifndef HF_GPTQ_REPACK_H_
#define HF_GPTQ_REPACK_H_

#include "fragments.h"
#include "launch.h"

namespace hf_gptq {

// One thread per lane of a tile: gathers that lane's codes.
template <int Bits>
__global__ void __launch_bounds__(256)
    repack_kernel(const uint32_t* __restrict__ qweight,  // canonical [R, N]
                  const int32_t* __restrict__ perm,      // [rows] input of each row, -1: none; NULL
                  uint32_t* __restrict__ tiles, int64_t N, int64_t K, int64_t rows, int64_t lanes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= lanes) return;
  const int64_t k_tiles = k_tile_count(rows), tile = index / 32;
  const int lane = static_cast<int>(index % 32);
  const int64_t n0 = (tile / kPanelTiles / k_tiles * kPanelTiles + tile % kPanelTiles) * kTileN;
  const int64_t k0 = tile / kPanelTiles % k_tiles * kTileK;
  uint32_t* out = tiles + tile * tile_words(Bits);
  uint32_t words[Bits] = {};
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      const FragmentPlace place{lane, slice, element};
      const int64_t n = n0 + fragment_n(place), row = k0 + fragment_k(place);
      uint32_t code = 0;
      if (n < N && row < rows) {
        const int64_t k = perm ? perm[row] : row;
        if (k >= 0 && k < K) code = read_canonical(qweight, k, n, N, Bits);
      }
      // Lane 0's places number its own words: 4 and 8 bits 0..3 of each plane of 128.
      const CodePlace at = code_place({0, slice, element}, Bits);
      if (Bits == 3) {
        words[at.low_word] |= (code & 3u) << at.low_shift;
        words[2] |= code >> 2 << at.high_shift;
      } else {
        words[at.low_word / 128 * 4 + at.low_word % 128] |= code << at.low_shift;
      }
    }
  }
  if (Bits == 4 || Bits == 8) {
    for (int plane = 0; plane < Bits / 4; ++plane) {
      for (int i = 0; i < 4; ++i) out[128 * plane + 4 * lane + i] = words[4 * plane + i];
    }
  } else {
    out[2 * lane] = words[0];
    out[2 * lane + 1] = words[1];
    if (Bits == 3) out[64 + lane] = words[2];
  }
}

// One thread per canonical word.
static __global__ void __launch_bounds__(256)
    unpack_kernel(const uint32_t* __restrict__ tiles,
                  const int32_t* __restrict__ row_of,  // [K] row of each input, or NULL: itself
                  uint32_t* __restrict__ qweight, int64_t N, int64_t K, int64_t rows, int bits) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= packed_words(K, bits) * N) return;
  const int64_t r = index / N, n = index % N, k_tiles = k_tile_count(rows);
  uint32_t word = 0;
  for (int64_t k = 32 * r / bits; k < K && k * bits < 32 * (r + 1); ++k) {
    const int64_t row = row_of ? row_of[k] : k;
    const uint32_t* tile = tiles + tile_index(n / kTileN, row / kTileK, k_tiles) * tile_words(bits);
    const uint32_t code = read_code(tile, fragment_place(n, row), bits);
    const int64_t bit = k * bits - 32 * r;  // negative where the code begins in the word before
    word |= bit < 0 ? code >> -bit : code << bit;
  }
  qweight[index] = word;
}

// out[m, i] = x[m, perm[i]], 0 where perm is -1; without perm a copy that fills up with zeros.
static __global__ void __launch_bounds__(256)
    gather_kernel(const uint16_t* __restrict__ x, int64_t x_stride,
                  const int32_t* __restrict__ perm, uint16_t* __restrict__ out, int64_t K,
                  int64_t rows, int64_t pitch) {
  const int64_t i = static_cast<int64_t>(blockIdx.y) * 256 + threadIdx.x;
  if (i >= pitch) return;
  const int64_t m = blockIdx.x;
  int64_t k = i < rows ? (perm ? perm[i] : i) : -1;
  if (k >= K) k = -1;
  out[m * pitch + i] = k < 0 ? uint16_t(0) : x[m * x_stride + k];
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_REPACK_H_
