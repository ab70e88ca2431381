// From packed words to code - zero in fp32, one block of 16 columns at a time. Internal linkage,
// see isa.h.
#ifndef HF_GPTQ_CPU_DECODE_H_
#define HF_GPTQ_CPU_DECODE_H_

#include "convert.h"
#include "kernels.h"
#include "simd.h"

namespace hf_gptq {
namespace {

template <int kWidth>
struct Width {
  static constexpr int kBits = kWidth;
};

// run(Width<bits>()), for the widths there are.
template <class Run>
int with_width(int bits, Run run) {
  switch (bits) {
    case 2:
      return run(Width<2>());
    case 3:
      return run(Width<3>());
    case 4:
      return run(Width<4>());
    default:
      return run(Width<8>());
  }
}

// A code c that lies at bit p of a word becomes a float where it is: under the exponent of 2^(23 -
// p) its bits mean 2^(23 - p) + c, and subtracting 2^(23 - p) + zero leaves c - zero exactly. That
// holds for the places below the 23 bits of a mantissa. Three places are used, so that their
// constants stay in registers; the codes above them are shifted down together.
constexpr float magic(int place) { return static_cast<float>(int32_t{1} << (23 - place)); }
constexpr uint32_t magic_bits(int place) { return static_cast<uint32_t>(150 - place) << 23; }
constexpr int places(int bits) { return 23 / bits < 3 ? 23 / bits : 3; }

// Fetches what is read some rows after `word`, into the second level of the cache: the first waits
// for too few lines at a time to keep memory busy. Of blocks side by side fewer rows are as many
// lines.
template <int kBlocks>
HF_GPTQ_INLINE void prefetch_words(const uint32_t* word, int64_t row_stride) {
  __builtin_prefetch(word + (kBlocks > 1 ? 32 : 128) * row_stride, 0, 2);
}

// The words of one block: word (r, n % 16) at words[r * row_stride + n % 16].
struct BlockWords {
  const uint32_t* words;
  int64_t row_stride;
};

// The last block of a canonical weight with N % 16 != 0 has no 16 columns to load.
HF_GPTQ_INLINE bool is_ragged(const hf_gptq_weight& w, int64_t block) {
  return (block + 1) * kBlockColumns > w.N && w.row_stride != kBlockColumns;
}

// Bytes of the copy that block_words makes of a ragged block.
HF_GPTQ_INLINE int64_t ragged_bytes(const hf_gptq_weight& w) {
  return packed_words(w.K, w.bits) * kBlockColumns * sizeof(uint32_t);
}

// The words of a block; a ragged one is copied to `copy` (ragged_bytes) and padded with zeros.
inline BlockWords block_words(const hf_gptq_weight& w, int64_t block, uint32_t* copy) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(w.qweight) +
                          word_index(0, block * kBlockColumns, w.block_stride, w.row_stride);
  if (!is_ragged(w, block)) return {words, w.row_stride};
  const int64_t columns = w.N - block * kBlockColumns;
  for (int64_t r = 0; r < packed_words(w.K, w.bits); ++r) {
    for (int64_t c = 0; c < kBlockColumns; ++c) {
      copy[r * kBlockColumns + c] = c < columns ? words[r * w.row_stride + c] : 0;
    }
  }
  return {copy, kBlockColumns};
}

// The zeros of the 16 columns of a block in group g; columns beyond N get integers from
// 0 to 2^kBits.
template <int kBits>
HF_GPTQ_INLINE void load_zeros(const hf_gptq_weight& w, int64_t g, int64_t block, VecF* zeros) {
  if (!w.qzeros) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) zeros[v] = splat(static_cast<float>(1 << (kBits - 1)));
    return;
  }
  const int64_t column = block * kBlockColumns;
  // Eight codes are kBits whole bytes. The row is read no further than its last word.
  const int64_t row_bytes = packed_words(w.N, kBits) * sizeof(uint32_t);
  const uint8_t* row = reinterpret_cast<const uint8_t*>(w.qzeros) + g * row_bytes;
  uint64_t eight[2] = {0, 0};
  for (int i = 0; i < 2; ++i) {
    const int64_t offset = (column / 8 + i) * kBits;
    const int64_t available = row_bytes - offset;
    if (available >= kBits) {
      memcpy(&eight[i], row + offset, kBits);
    } else if (available > 0) {
      memcpy(&eight[i], row + offset, available);
    }
  }
  VecI codes[kBlockVectors];
  if constexpr (kBits < 8) {
    // Eight codes lie in 32 bits, which every lane shifts by its own place.
    HF_GPTQ_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) {
      VecU place = {}, second = {};
      HF_GPTQ_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        place[i] = (v * kLanes + i) % 8 * kBits;
        second[i] = i >= 8 ? 0xffffffffu : 0;
      }
      VecU word = splat(static_cast<uint32_t>(eight[v * kLanes / 8]));
      if (kLanes > 8) word = (word & ~second) | (splat(static_cast<uint32_t>(eight[1])) & second);
      codes[v] = (VecI)(word >> place & ((1u << kBits) - 1));
    }
  } else {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) {
      typedef uint8_t Narrow __attribute__((vector_size(kLanes)));
      Narrow narrow;
      memcpy(&narrow, reinterpret_cast<const uint8_t*>(eight) + v * kLanes, sizeof narrow);
      codes[v] = __builtin_convertvector(narrow, VecI);
    }
  }
  HF_GPTQ_UNROLL
  for (int v = 0; v < kBlockVectors; ++v) {
    zeros[v] = __builtin_convertvector(codes[v] + w.zero_offset, VecF);
  }
}

// Where the scales of `blocks` blocks of columns lie in group 0, if load_fp16 can read them there;
// null if not.
HF_GPTQ_INLINE const uint16_t* fp16_scales(const hf_gptq_weight& w, int64_t block, int blocks) {
  if (w.scale_dtype != HF_GPTQ_FP16 || (block + blocks) * kBlockColumns > w.N) return nullptr;
  return static_cast<const uint16_t*>(w.scales) + block * kBlockColumns;
}

// The scales of a block in group g; 0 beyond N. Short for whole blocks in fp16, where a stream
// comes by for every group.
inline void load_scales(const hf_gptq_weight& w, int64_t g, int64_t block, float* scale) {
  if (const uint16_t* half = fp16_scales(w, block, 1)) {
    HF_GPTQ_UNROLL
    for (int c = 0; c < kBlockColumns; c += kLanes) store(scale + c, load_fp16(half + g * w.N + c));
    return;
  }
  const int64_t column = block * kBlockColumns;
  const int64_t left = w.N - column;
  if (left < kBlockColumns) memset(scale, 0, kBlockColumns * sizeof(float));
  to_float(w.scales, w.scale_dtype, g * w.N + column, left < kBlockColumns ? left : kBlockColumns,
           scale);
}

// Fetches most of the scales and zeros of `blocks` blocks in group g. The rows of scales are too
// far apart for the hardware to foresee.
HF_GPTQ_INLINE void prefetch_group(const hf_gptq_weight& w, int64_t g, int64_t block, int blocks) {
  constexpr int64_t kLine = 64;
  const int64_t column = block * kBlockColumns, size = dtype_size(w.scale_dtype);
  const char* scales = static_cast<const char*>(w.scales) + (g * w.N + column) * size;
  for (int64_t i = 0; i < blocks * kBlockColumns * size; i += kLine) __builtin_prefetch(scales + i);
  if (w.qzeros) {
    __builtin_prefetch(w.qzeros + g * packed_words(w.N, w.bits) + code_word(column, w.bits));
  }
}

// Calls sink(k - begin, values) for k = begin .. end-1 in turn, where values[b * kBlockVectors + v]
// is code - zero of row k in vector v of block b. words[b] are kBlocks blocks with one row stride;
// zero is laid out as values.
template <int kBits, int kBlocks, class Sink>
HF_GPTQ_INLINE void decode(const uint32_t* const (&words)[kBlocks], int64_t row_stride,
                           int64_t begin, int64_t end, const VecF (&zero)[kBlocks * kBlockVectors],
                           Sink&& sink) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  constexpr int kUnit = codes_per_unit(kBits);
  constexpr int kUnitWords = words_per_unit(kBits);
  constexpr int kPlaces = places(kBits);
  constexpr uint32_t kMask = (uint32_t{1} << kBits) - 1;
  VecF biased[kPlaces][kVectors];
  HF_GPTQ_UNROLL
  for (int p = 0; p < kPlaces; ++p) {
    HF_GPTQ_UNROLL
    for (int i = 0; i < kVectors; ++i) biased[p][i] = zero[i] + splat(magic(p * kBits));
  }
  auto value = [&](VecU word, int p, int i) __attribute__((always_inline)) {
    return (VecF)((word & (kMask << (p * kBits))) | magic_bits(p * kBits)) - biased[p][i];
  };

  auto one = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t row = code_word(k, kBits) * row_stride;
    const int shift = code_shift(k, kBits);
    VecF values[kVectors];
    HF_GPTQ_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      HF_GPTQ_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) {
        const uint32_t* word = words[b] + row + v * kLanes;
        VecU code = load(word) >> shift;
        if (kBits == 3 && shift + kBits > 32) code |= load(word + row_stride) << (32 - shift);
        const int i = b * kBlockVectors + v;
        values[i] = value(code, 0, i);
      }
    }
    sink(k - begin, values);
  };

  int64_t k = begin;
  for (; k < end && k % kUnit != 0; ++k) one(k);
  for (; k + kUnit <= end; k += kUnit) {
    const int64_t row = code_word(k, kBits) * row_stride;
    VecU unit[kUnitWords][kVectors];
    HF_GPTQ_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      HF_GPTQ_UNROLL
      for (int r = 0; r < kUnitWords; ++r) {
        const uint32_t* word = words[b] + row + r * row_stride;
        prefetch_words<kBlocks>(word, row_stride);
        HF_GPTQ_UNROLL
        for (int v = 0; v < kBlockVectors; ++v) {
          unit[r][b * kBlockVectors + v] = load(word + v * kLanes);
        }
      }
    }
    HF_GPTQ_UNROLL
    for (int j = 0; j < kUnit; ++j) {
      const int r = j * kBits / 32;
      const int shift = j * kBits % 32;
      const int first = shift % kBits;  // bit of the first whole code of word r
      const int p = shift / kBits % kPlaces;
      VecF values[kVectors];
      HF_GPTQ_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        if (shift + kBits > 32) {
          values[i] =
              value(unit[r][i] >> shift | unit[(r + 1) % kUnitWords][i] << (32 - shift), 0, i);
        } else {
          const int down = first + shift / kBits / kPlaces * kPlaces * kBits;
          values[i] = value(down > 0 ? unit[r][i] >> down : unit[r][i], p, i);
        }
      }
      sink(k - begin + j, values);
    }
  }
  for (; k < end; ++k) one(k);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_DECODE_H_
