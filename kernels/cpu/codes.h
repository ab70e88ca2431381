// How codes meet activations: what one step of a product multiplies. Internal linkage, see isa.h.
//
// Floats: one code and one fp32 number, any instruction set.
//
// Pairs: two codes and two bf16 numbers, where vdpbf16ps does that. The integers code - zero are
// exact in bf16, which has 8 significant bits. A unit of codes, those of one word (three words with
// 3 bits), is taken as the pairs of its first and its second half, because that is how codes lie in
// the 16-bit halves of a lane (4 bits, lane n, step j):
//
//   bit   31      28 27                16 15      12 11                 0
//         | k + 7  | k + 6 | k + 5 | k + 4 | k + 3  | k + 2 | k + 1 | k  |     >> 4 j:
//         |                        | k+4+j |                        |k+j |     upper, lower half of
//         a pair
//
// With 2 and 4 bits a table of bf16 numbers, indexed by the low 5 bits of each half, decodes 32
// codes in one instruction.
#ifndef HF_GPTQ_CPU_CODES_H_
#define HF_GPTQ_CPU_CODES_H_

#include "decode.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// The codes of a Run, or of a part of one, in steps.
struct Stretch {
  int64_t begin, end;  // steps
  int64_t code;        // the first that step `begin` decodes; later steps follow on
  int64_t group;
  int64_t valid_begin, valid_end;  // codes of the run; others that are decoded meet zeros in x
};

// Codes of a stretch where nothing bounds them.
constexpr int64_t kUnbounded = INT64_MAX;

// Loads the words of a unit that begins in row `row` of `rows`, for each vector of each block.
template <int kUnitWords, int kBlocks, int kVectors>
HF_GPTQ_INLINE void load_unit(const uint32_t* const (&words)[kBlocks], int64_t row, int64_t rows,
                              int64_t row_stride, VecU (&unit)[kVectors][kUnitWords]) {
  static_assert(kVectors == kBlocks * kBlockVectors, "a unit for each vector");
  HF_GPTQ_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    HF_GPTQ_UNROLL
    for (int r = 0; r < kUnitWords; ++r) {
      // The last unit of a column may have fewer words; what is read twice meets zeros in x.
      const int64_t at = kUnitWords == 1 ? row : min64(row + r, rows - 1);
      const uint32_t* word = words[b] + at * row_stride;
      __builtin_prefetch(word + kPrefetchRows * row_stride);
      HF_GPTQ_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) {
        unit[b * kBlockVectors + v][r] = load(word + v * kLanes);
      }
    }
  }
}

// sum + codes * x of one step.
struct FloatProducts {
  static HF_GPTQ_INLINE VecF multiply_add(VecF codes, VecF x, VecF sum) {
    return fmadd(codes, x, sum);
  }
};

template <int kWidth>
struct Floats {
  using Products = FloatProducts;
  static constexpr int kBits = kWidth;
  static constexpr int kCodes = 1;  // per step
  static constexpr bool kFixed = false;
  static constexpr int64_t kMostCodes = kUnbounded;

  static int64_t steps(const Run& run) { return run.end - run.begin; }
  static int64_t first(const Run& run) { return run.begin; }

  // Calls sink(i, values) for steps i = 0 .. steps-1 from code `code` on.
  template <int kBlocks, class Sink>
  static HF_GPTQ_INLINE void decode(const hf_gptq_weight& /*w*/,
                                    const uint32_t* const (&words)[kBlocks], int64_t row_stride,
                                    int64_t code, int64_t steps,
                                    const VecF (&zero)[kBlocks * kBlockVectors], Sink&& sink) {
    hf_gptq::decode<kBits>(words, row_stride, code, code + steps, zero, sink);
  }

  // Writes row m of x, step i to packed[i * stride]; false without memory.
  static bool pack_row(const LinearArguments& a, int64_t m, float* packed, int64_t stride) {
    const int64_t K = a.weight.K;
    const int32_t* perm = a.weight.perm;
    float* row = static_cast<float*>(thread_scratch(K * sizeof(float)));
    if (!row) return false;
    to_float(a.x, a.dtype, m * a.x_row_stride, K, row);
    if (perm) {
      for (int64_t i = 0; i < K; ++i) packed[i * stride] = row[perm[i]];
    } else {
      for (int64_t i = 0; i < K; ++i) packed[i * stride] = row[i];
    }
    return true;
  }
};

#if defined(HF_GPTQ_SIMD_BF16)

// bf16 of an integer from -16 to 16.
constexpr uint16_t bf16_of(int value) {
  if (value == 0) return 0;
  const int magnitude = value < 0 ? -value : value;
  int exponent = 0;
  while (magnitude >> (exponent + 1)) ++exponent;
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (127 + exponent) << 7 |
                               (magnitude << (7 - exponent) & 0x7f));
}

// Entry i of the table: i - 16, or, for symmetric zeros, code - 2^(bits-1) of the code in the low
// bits of i, whatever the bits of the next code above it are.
template <int kBits, bool kSymmetric>
struct PairTable {
  alignas(64) uint16_t entries[32];
  constexpr PairTable() : entries() {
    for (int i = 0; i < 32; ++i) {
      entries[i] = bf16_of(kSymmetric ? i % (1 << kBits) - (1 << (kBits - 1)) : i - 16);
    }
  }
};

struct PairProducts {
  static HF_GPTQ_INLINE VecF multiply_add(VecF codes, VecF x, VecF sum) {
    return fmadd_pairs(codes, x, sum);
  }
};

// kSymmetric: 2 or 4 bits whose zeros are all 2^(bits-1).
template <int kWidth, bool kSymmetric>
struct Pairs {
  using Products = PairProducts;
  static constexpr int kBits = kWidth;
  static constexpr int kCodes = 2;
  static constexpr bool kFixed = false;
  static constexpr int64_t kMostCodes = kUnbounded;
  static constexpr int kUnit = codes_per_unit(kBits);
  static constexpr int kUnitWords = words_per_unit(kBits);
  static constexpr int kHalf = kUnit / 2;  // steps per unit
  static constexpr bool kLookup = kBits == 2 || kBits == 4;
  static constexpr uint32_t kMask = (uint32_t{1} << kBits) - 1;

  // A run takes whole units; the codes of a unit that are not the run's meet zeros in x.
  static int64_t steps(const Run& run) {
    return (ceil_div(run.end, kUnit) - run.begin / kUnit) * kHalf;
  }
  static int64_t first(const Run& run) { return run.begin / kUnit * kUnit; }

  // code - zero of code j of a unit, in fp32.
  static HF_GPTQ_INLINE VecF code(const VecU (&unit)[kUnitWords], int j, VecF biased) {
    const int r = j * kBits / 32;
    const int shift = j * kBits % 32;
    VecU word = unit[r] >> shift;
    if (shift + kBits > 32) word |= unit[(r + 1) % kUnitWords] << (32 - shift);
    return (VecF)((word & kMask) | magic_bits(0)) - biased;
  }

  // The codes of step j of a unit. `bias` is what prepare() makes of the zeros.
  static HF_GPTQ_INLINE VecF pair(const VecU (&unit)[kUnitWords], int j, VecF bias, VecU table) {
    if constexpr (kLookup) {
      VecU index = unit[0] >> (j * kBits);
      if (!kSymmetric) index = (index & (kMask * 0x10001u)) + (VecU)bias;
      return lookup_16(index, table);
    } else {
      const VecU lower = (VecU)code(unit, j, bias);
      return (VecF)((VecU)code(unit, j + kHalf, bias) | lower >> 16);
    }
  }

  static HF_GPTQ_INLINE VecF prepare(VecF zero) {
    const VecF biased = zero + splat(magic(0));
    if (!kLookup) return biased;
    // The integer zero lies in the low bits of 2^23 + zero.
    const VecU offset = splat(16u) - ((VecU)biased & 0xffffu);
    return (VecF)(offset | offset << 16);
  }

  template <int kBlocks, class Sink>
  static HF_GPTQ_INLINE void decode(const hf_gptq_weight& w,
                                    const uint32_t* const (&words)[kBlocks], int64_t row_stride,
                                    int64_t code, int64_t steps,
                                    const VecF (&zero)[kBlocks * kBlockVectors], Sink&& sink) {
    static_assert(kBlockVectors == 1, "a vector of pairs is one block");
    static constexpr PairTable<kBits, kLookup && kSymmetric> kTable;
    const int64_t rows = packed_words(w.K, kBits);
    VecU table;
    memcpy(&table, kTable.entries, sizeof table);
    VecF bias[kBlocks];
    HF_GPTQ_UNROLL
    for (int b = 0; b < kBlocks; ++b) bias[b] = prepare(zero[b]);
    for (int64_t step = 0; step < steps; step += kHalf) {
      const int64_t row = code_word(code + 2 * step, kBits);
      VecU unit[kBlocks][kUnitWords];
      load_unit(words, row, rows, row_stride, unit);
      HF_GPTQ_UNROLL
      for (int j = 0; j < kHalf; ++j) {
        VecF values[kBlocks];
        HF_GPTQ_UNROLL
        for (int b = 0; b < kBlocks; ++b) values[b] = pair(unit[b], j, bias[b], table);
        sink(step + j, values);
      }
    }
  }

  static bool pack_row(const LinearArguments& a, int64_t m, float* packed, int64_t stride) {
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + m * a.x_row_stride;
    const int64_t K = a.weight.K;
    if (const int32_t* perm = a.weight.perm) {
      uint16_t* row = static_cast<uint16_t*>(thread_scratch(K * sizeof(uint16_t)));
      if (!row) return false;
      for (int64_t i = 0; i < K; ++i) row[i] = x[perm[i]];
      x = row;
    }
    for (int64_t i = 0; i < a.runs.count; ++i) {
      const Run& run = a.runs.data[i];
      for (int64_t unit = first(run); unit < run.end; unit += kUnit) {
        const bool whole = unit >= run.begin && unit + kUnit <= run.end;
        for (int64_t k = unit; k < unit + kHalf; ++k, packed += stride) {
          const int64_t next = k + kHalf;
          const uint32_t lower = whole || (k >= run.begin && k < run.end) ? x[k] : 0;
          const uint32_t upper = whole || (next >= run.begin && next < run.end) ? x[next] : 0;
          *packed = bits_float(lower | upper << 16);
        }
      }
    }
    return true;
  }
};

#endif

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_CODES_H_
