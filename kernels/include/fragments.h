// The layout that tensor cores read, and the schedule of the sum over K. Shared by the CUDA
// kernels, their emulation on the CPU and the tests.
//
// Weights are operand A of the product Y^T = W X^T, whose register fragments are the same for
// mma.m16n8k16 and, warp by warp, for wgmma.m64nMk16. A tile of 16 outputs x 64 inputs is what one
// warp takes at a time: four k16 slices of eight codes per lane.
//
//   lane = 4 * (n % 8) + (k % 8) / 2         one slice of A, 16 x 16:
//   slice = k % 64 / 16                             k 0..7          k 8..15
//   element = k % 2                          n 0..7   elements 0, 1   elements 4, 5
//           + 2 * (n / 8 % 2)                n 8..15  elements 2, 3   elements 6, 7
//           + 4 * (k / 8 % 2)
//
// Register r of a fragment holds elements 2r (low half) and 2r + 1 (high half). So that one mask
// takes out both halves at once, the codes of a pair lie 16 bits apart. Words of a tile, p = e / 2:
//
//   bits  words  code of (lane, slice, element e)
//   4     128    word 4 lane + slice,                               bit 4p + 16 (e % 2)
//   8     256    word 128 (slice / 2) + 4 lane + 2 (slice % 2) + e / 4, bit 8 (e % 4)
//   2     64     word 2 lane + slice / 2,                           bit 2 (4 (slice % 2) + p)
//                                                                       + 16 (e % 2)
//   3     96     low two bits as above, then the top bit:
//                word 64 + lane,                                    bit 4 slice + p + 16 (e % 2)
//
// So a lane's share of a 4-bit tile is one 16-byte load, and a warp's 512 contiguous bytes.
//
// Tiles of 64 outputs (a panel, what a warpgroup takes) lie together:
//
//   tile (n_tile, k_tile) is number  ((n_tile / 4) * k_tiles + k_tile) * 4 + n_tile % 4
//
// N is padded to 64 and K to 64, with codes 0.
#ifndef HF_GPTQ_FRAGMENTS_H_
#define HF_GPTQ_FRAGMENTS_H_

#include "layout.h"

namespace hf_gptq {

constexpr int kTileN = 16;
constexpr int kTileK = 64;
constexpr int kSliceK = 16;
constexpr int kSlices = kTileK / kSliceK;
constexpr int kPanelTiles = 4;
constexpr int kPanelN = kTileN * kPanelTiles;
constexpr int kElements = 8;  // codes per lane and slice

HF_GPTQ_HD static constexpr int tile_words(int bits) { return 32 * bits; }

HF_GPTQ_HD static constexpr int64_t panel_count(int64_t N) { return ceil_div(N, kPanelN); }

HF_GPTQ_HD static constexpr int64_t k_tile_count(int64_t K) { return ceil_div(K, kTileK); }

// Words of a whole weight, padding included.
HF_GPTQ_HD static constexpr int64_t packed_tile_words(int64_t N, int64_t K, int bits) {
  return panel_count(N) * kPanelTiles * k_tile_count(K) * tile_words(bits);
}

HF_GPTQ_HD static constexpr int64_t tile_index(int64_t n_tile, int64_t k_tile, int64_t k_tiles) {
  return (n_tile / kPanelTiles * k_tiles + k_tile) * kPanelTiles + n_tile % kPanelTiles;
}

// Where a weight lies in the fragments of its tile, and back.
struct FragmentPlace {
  int lane, slice, element;
};

HF_GPTQ_HD static constexpr FragmentPlace fragment_place(int64_t n, int64_t k) {
  return {static_cast<int>(n % 8 * 4 + k % 8 / 2), static_cast<int>(k % kTileK / kSliceK),
          static_cast<int>(k % 2 + 2 * (n / 8 % 2) + 4 * (k / 8 % 2))};
}

HF_GPTQ_HD static constexpr int fragment_n(FragmentPlace place) {
  return place.lane / 4 + 8 * (place.element / 2 % 2);
}

HF_GPTQ_HD static constexpr int fragment_k(FragmentPlace place) {
  return place.slice * kSliceK + place.lane % 4 * 2 + place.element % 2 + place.element / 4 * 8;
}

// Where the bits of a code lie in its tile: `low` holds the code (its low two bits when bits is 3),
// `high` the top bit of a 3-bit code.
struct CodePlace {
  int low_word, low_shift, high_word, high_shift;
};

HF_GPTQ_HD static constexpr CodePlace code_place(FragmentPlace place, int bits) {
  const int lane = place.lane, slice = place.slice, e = place.element;
  const int pair = e / 2, half = 16 * (e % 2);
  if (bits == 4) return {4 * lane + slice, 4 * pair + half, 0, 0};
  if (bits == 8) {
    return {128 * (slice / 2) + 4 * lane + 2 * (slice % 2) + e / 4, 8 * (e % 4), 0, 0};
  }
  return {2 * lane + slice / 2, 2 * (4 * (slice % 2) + pair) + half, 64 + lane,
          4 * slice + pair + half};
}

HF_GPTQ_HD static constexpr uint32_t read_code(const uint32_t* tile, FragmentPlace place,
                                               int bits) {
  const CodePlace at = code_place(place, bits);
  if (bits == 3) {
    return (tile[at.low_word] >> at.low_shift & 3u) | (tile[at.high_word] >> at.high_shift & 1u)
                                                          << 2;
  }
  return tile[at.low_word] >> at.low_shift & ((1u << bits) - 1u);
}

// The code of (n, k) from the checkpoint's order: words [R, N] down each column.
HF_GPTQ_HD static constexpr uint32_t read_canonical(const uint32_t* words, int64_t k, int64_t n,
                                                    int64_t N, int bits) {
  const int64_t r = code_word(k, bits);
  const int shift = code_shift(k, bits);
  uint32_t code = words[r * N + n] >> shift;
  if (shift + bits > 32) code |= words[(r + 1) * N + n] << (32 - shift);
  return code & ((1u << bits) - 1u);
}

// The schedule. K is cut into chunks of whole tiles; the number of chunks depends on K and N alone.
// A chunk's sum is built upwards in k, one group after the other, and the result is the sum of the
// chunks, upwards from chunk 0. Every kernel on mma.sync keeps to that, whatever M is.
//
// A block of the wide kernel takes kBlockN outputs and one chunk, so the rule fills a large chip
// with one block per multiprocessor.
constexpr int kBlockN = 256;
constexpr int kMaxChunks = 8;
constexpr int kTargetBlocks = 128;

HF_GPTQ_HD static constexpr int chunk_count(int64_t N, int64_t K) {
  int chunks = 1;
  while (chunks < kMaxChunks && ceil_div(N, kBlockN) * chunks * 2 <= kTargetBlocks &&
         k_tile_count(K) >= chunks * 4) {
    chunks *= 2;
  }
  return chunks;
}

// First tile of a chunk; chunk_begin(chunks, ..) is the number of tiles.
HF_GPTQ_HD static constexpr int64_t chunk_begin(int64_t chunk, int64_t chunks, int64_t k_tiles) {
  return chunk * k_tiles / chunks;
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_FRAGMENTS_H_
