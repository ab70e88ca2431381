// Intel AMX: eight registers that are tiles of 16 rows of 64 bytes, and their products. Inline
// assembly, because the intrinsics of some compilers do not say that they touch memory. Internal
// linkage, see isa.h.
#ifndef HF_GPTQ_CPU_TILES_H_
#define HF_GPTQ_CPU_TILES_H_

#include "simd.h"

namespace hf_gptq {
namespace {

constexpr int kTileSide = 16;  // rows of a tile, and fp32 numbers or pairs of bf16 in a row
constexpr int64_t kTileFloats = kTileSide * kTileSide;
constexpr int kTileCount = 8;

// What ldtilecfg reads.
struct TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(HF_GPTQ_EMULATE)

struct EmulatedTiles {
  TileConfig config;
  float data[kTileCount][kTileSide][kTileSide];
};
thread_local EmulatedTiles emulated_tiles;

HF_GPTQ_INLINE void configure_tiles(const TileConfig& config) {
  emulated_tiles.config = config;
  memset(emulated_tiles.data, 0, sizeof emulated_tiles.data);
}

HF_GPTQ_INLINE void release_tiles() { emulated_tiles.config = TileConfig(); }

template <int kTile>
HF_GPTQ_INLINE void zero_tile() {
  memset(emulated_tiles.data[kTile], 0, sizeof emulated_tiles.data[kTile]);
}

template <int kTile>
HF_GPTQ_INLINE void load_tile(const void* from, int64_t stride) {
  zero_tile<kTile>();
  const TileConfig& config = emulated_tiles.config;
  for (int r = 0; r < config.rows[kTile]; ++r) {
    memcpy(emulated_tiles.data[kTile][r], static_cast<const char*>(from) + r * stride,
           config.row_bytes[kTile]);
  }
}

template <int kTile>
HF_GPTQ_INLINE void store_tile(void* to, int64_t stride) {
  const TileConfig& config = emulated_tiles.config;
  for (int r = 0; r < config.rows[kTile]; ++r) {
    memcpy(static_cast<char*>(to) + r * stride, emulated_tiles.data[kTile][r],
           config.row_bytes[kTile]);
  }
}

HF_GPTQ_INLINE float flushed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}

HF_GPTQ_INLINE float half_of(float pair, int upper) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  bits = upper ? bits & 0xffff0000u : bits << 16;
  memcpy(&pair, &bits, sizeof pair);
  return flushed(pair);
}

// tdpbf16ps: the lower and the upper halves are summed apart, then together, then added.
template <int kSum, int kA, int kB>
HF_GPTQ_INLINE void multiply_tiles() {
  const TileConfig& config = emulated_tiles.config;
  for (int m = 0; m < config.rows[kSum]; ++m) {
    for (int n = 0; n < config.row_bytes[kSum] / 4; ++n) {
      float halves[2] = {0.0f, 0.0f};
      for (int k = 0; k < config.row_bytes[kA] / 4; ++k) {
        for (int h = 0; h < 2; ++h) {
          halves[h] = flushed(__builtin_fmaf(half_of(emulated_tiles.data[kA][m][k], h),
                                             half_of(emulated_tiles.data[kB][k][n], h), halves[h]));
        }
      }
      float& sum = emulated_tiles.data[kSum][m][n];
      sum = flushed(flushed(sum) + flushed(halves[0] + halves[1]));
    }
  }
}

#else

HF_GPTQ_INLINE void configure_tiles(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

HF_GPTQ_INLINE void release_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int kTile>
HF_GPTQ_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
HF_GPTQ_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0"
                   :
                   : "i"(kTile), "r"(from), "r"(stride)
                   : "memory");
}

template <int kTile>
HF_GPTQ_INLINE void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)"
                   :
                   : "i"(kTile), "r"(to), "r"(stride)
                   : "memory");
}

template <int kSum, int kA, int kB>
HF_GPTQ_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

#endif

// kRowTiles tiles of A, one above the other, times kBlocks tiles of B side by side.
//
//   kRowTiles  kBlocks   sums                A      B
//   2          2         0 1 / 2 3           4, 5   6, 7
//   1          4         0 1 2 3             4      5, 6, 7, 5
template <int kRowTiles, int kBlocks>
struct TileProduct {
  static_assert(kRowTiles * kBlocks <= 4, "of eight tiles");
  static constexpr int kA = 4;
  static constexpr int kB = kA + kRowTiles, kBTiles = kTileCount - kB;

  // Of row tiles of so many rows.
  static void configure(const int (&rows)[kRowTiles]) {
    TileConfig config;
    for (int tile = 0; tile < kTileCount; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = kTileSide;
    }
    for (int r = 0; r < kRowTiles; ++r) {
      config.rows[kA + r] = static_cast<uint8_t>(rows[r]);
      for (int b = 0; b < kBlocks; ++b) {
        config.rows[r * kBlocks + b] = static_cast<uint8_t>(rows[r]);
      }
    }
    configure_tiles(config);
  }

  template <int kTile = 0>
  static HF_GPTQ_INLINE void zero() {
    zero_tile<kTile>();
    if constexpr (kTile + 1 < kRowTiles * kBlocks) zero<kTile + 1>();
  }

  // Adds the products of one tile of A per row tile, A_apart floats apart, with one of B per block,
  // B_apart floats apart, whose rows are B_stride bytes apart.
  static HF_GPTQ_INLINE void add(const float* A, int64_t A_apart, const float* B, int64_t B_apart,
                                 int64_t B_stride) {
    load_tile<kA>(A, 64);
    if constexpr (kRowTiles > 1) load_tile<kA + 1>(A + A_apart, 64);
    add_block<0>(B, B_apart, B_stride);
  }

  // Sum (r, b) goes to C + r * row_apart + b * block_apart floats, rows `stride` bytes apart.
  template <int kTile = 0>
  static HF_GPTQ_INLINE void store(float* C, int64_t row_apart, int64_t block_apart,
                                   int64_t stride) {
    store_tile<kTile>(C + kTile / kBlocks * row_apart + kTile % kBlocks * block_apart, stride);
    if constexpr (kTile + 1 < kRowTiles * kBlocks) {
      store<kTile + 1>(C, row_apart, block_apart, stride);
    }
  }

 private:
  template <int kBlock>
  static HF_GPTQ_INLINE void add_block(const float* B, int64_t B_apart, int64_t B_stride) {
    constexpr int kTile = kB + kBlock % kBTiles;
    load_tile<kTile>(B + kBlock * B_apart, B_stride);
    multiply_tiles<kBlock, kA, kTile>();
    if constexpr (kRowTiles > 1) multiply_tiles<kBlocks + kBlock, kA + 1, kTile>();
    if constexpr (kBlock + 1 < kBlocks) add_block<kBlock + 1>(B, B_apart, B_stride);
  }
};

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_TILES_H_
