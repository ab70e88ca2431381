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
// But for 8 bits, a table of bf16 numbers, indexed by the low 5 bits of each half, decodes 32 codes
// in one instruction.
#ifndef HF_GPTQ_CPU_CODES_H_
#define HF_GPTQ_CPU_CODES_H_

#include "decode.h"
#include "interleave.h"
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

// Where nothing bounds the codes of a stretch, or the rows of stream().
constexpr int64_t kUnbounded = INT64_MAX;

// How a run is cut into steps of kCodes codes where it takes whole units; the codes of a unit that
// are not the run's meet zeros in x.
template <int kBits, int kCodes>
struct WholeUnits {
  static constexpr int kUnit = codes_per_unit(kBits);
  static int64_t first(const Run& run) { return run.begin / kUnit * kUnit; }
  static int64_t steps(const Run& run) {
    return (ceil_div(run.end, kUnit) - run.begin / kUnit) * (kUnit / kCodes);
  }
};

// x of the codes of a stretch, `width` floats of which those that are not the run's are 0: where it
// lies, or in `copy`.
inline const float* stretch_values(const float* x, const Stretch& s, int64_t width, float* copy) {
  if (s.valid_begin == s.code && s.valid_end - s.code == width) return x + s.code;
  memset(copy, 0, width * sizeof(float));
  copy_floats(x + s.valid_begin, s.valid_end - s.valid_begin, copy + (s.valid_begin - s.code));
  return copy;
}

// out[i]: 1 or -1 for an infinity, beside which the others are nothing: 0. out may be v.
inline void infinities(const float* v, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(v[i]);
    const bool infinite = (bits & 0x7fffffffu) == 0x7f800000u;
    out[i] = infinite ? bits_float((bits & 0x80000000u) | 0x3f800000u) : 0.0f;
  }
}

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
      prefetch_words<kBlocks>(word, row_stride);
      HF_GPTQ_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) {
        unit[b * kBlockVectors + v][r] = load(word + v * kLanes);
      }
    }
  }
}

// With 3 bits the second half of a unit begins 48 bits after the first: brings the two beside each
// other, 16 bits of each in a lane. With other widths they are.
template <int kBits>
HF_GPTQ_INLINE void arrange(VecU (&unit)[words_per_unit(kBits)]) {
  if constexpr (kBits == 3) {
    const VecU a = unit[0], b = unit[1], c = unit[2];
    unit[0] = (a & 0xffffu) | (b & 0xffff0000u);
    unit[1] = (a >> 16) | (c << 16);
    unit[2] = (b & 0xffffu) | (c & 0xffff0000u);
  }
}

// Where step j of an arranged unit begins in the halves of its word.
template <int kBits>
constexpr int half_shift(int j) {
  return j * kBits % 16;
}

// The codes of step j of an arranged unit, in the low bits of the halves of a lane; other codes may
// lie above them.
template <int kBits>
HF_GPTQ_INLINE VecU half_codes(const VecU (&unit)[words_per_unit(kBits)], int j) {
  constexpr int kWords = words_per_unit(kBits);
  const int word = kWords == 1 ? 0 : j * kBits / 16;
  const int shift = half_shift<kBits>(j);
  VecH half = (VecH)unit[word];
  if (shift > 0) half >>= shift;
  if (shift + kBits > 16) half |= (VecH)unit[(word + 1) % kWords] << (16 - shift);
  return (VecU)half;
}

// sum + codes * x of one step, *x in every lane.
struct FloatProducts {
  static HF_GPTQ_INLINE VecF multiply_add(VecF codes, const float* x, VecF sum) {
    return fmadd(codes, x, sum);
  }
};

template <int kWidth>
struct Floats {
  using Products = FloatProducts;
  static constexpr int kBits = kWidth;
  static constexpr int kCodes = 1;  // per step
  static constexpr bool kFixed = false, kBytes = false;
  // Rows up to which decoding them for every row block costs less than panels do; measured.
#if defined(HF_GPTQ_SIMD_AVX512F)
  static constexpr int64_t kMostStreamedRows = 48;
#elif defined(HF_GPTQ_SIMD_AVX2)
  static constexpr int64_t kMostStreamedRows = 4;
#else
  static constexpr int64_t kMostStreamedRows = 2;
#endif
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

  // Packs a row block: `rows` rows of x from m on. False without memory.
  static bool pack(const LinearArguments& a, int64_t m, int rows, int64_t steps, float* packed) {
    const int32_t* perm = a.weight.perm;
    if (a.dtype == HF_GPTQ_FP32 && !perm) {
      const float* x = static_cast<const float*>(a.x) + m * a.x_row_stride;
      interleave(x, a.x_row_stride, rows, steps, packed);
      return true;
    }
    const int64_t copies = perm ? rows + 1 : rows;
    float* copy = static_cast<float*>(thread_scratch(copies * steps * sizeof(float)));
    if (!copy) return false;
    float* natural = copy + rows * steps;
    for (int r = 0; r < rows; ++r) {
      float* row = copy + r * steps;
      to_float(a.x, a.dtype, (m + r) * a.x_row_stride, steps, perm ? natural : row);
      for (int64_t i = 0; perm && i < steps; ++i) row[i] = natural[perm[i]];
    }
    interleave(copy, steps, rows, steps, packed);
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
  static HF_GPTQ_INLINE VecF multiply_add(VecF codes, const float* x, VecF sum) {
    return fmadd_pairs(codes, x, sum);
  }
};

// kSymmetric: fewer than 8 bits, whose zeros are all 2^(bits-1).
template <int kWidth, bool kSymmetric>
struct Pairs : WholeUnits<kWidth, 2> {
  using Products = PairProducts;
  static constexpr int kBits = kWidth;
  static constexpr int kCodes = 2;
  static constexpr bool kFixed = false, kBytes = false;
  static constexpr int64_t kMostCodes = kUnbounded;
  static constexpr int kUnit = codes_per_unit(kBits);
  static constexpr int kUnitWords = words_per_unit(kBits);
  static constexpr int kHalf = kUnit / 2;  // steps per unit
  static constexpr bool kLookup = kBits < 8;
  static constexpr uint32_t kMask = (uint32_t{1} << kBits) - 1;
  // Codes of a byte, if it holds whole ones.
  static constexpr int kByte = 8 % kBits == 0 ? 8 / kBits : 1;
  static constexpr int64_t kMostStreamedRows = kBits == 2 || kBits == 4 ? kUnbounded : 96;

  // What the steps of a unit are taken from. Where zeros differ, their offset is added to two codes
  // at a time if they lie in the bytes of a half.
  struct Unit {
    VecU words[kLookup && !kSymmetric && kByte > 1 ? kByte : kUnitWords];
  };

  // `bias` is what prepare() makes of the zeros.
  static HF_GPTQ_INLINE Unit prepared(VecU (&unit)[kUnitWords], VecU bias) {
    Unit u;
    if constexpr (kLookup && !kSymmetric && kByte > 1) {
      HF_GPTQ_UNROLL
      for (int i = 0; i < kByte; ++i) {
        u.words[i] = ((i > 0 ? unit[0] >> (i * kBits) : unit[0]) & (kMask * 0x01010101u)) + bias;
      }
    } else {
      if constexpr (kLookup) arrange<kBits>(unit);
      HF_GPTQ_UNROLL
      for (int i = 0; i < kUnitWords; ++i) u.words[i] = unit[i];
    }
    return u;
  }

  // The codes of step j of a unit.
  static HF_GPTQ_INLINE VecF pair(const Unit& unit, int j, VecU bias, VecU table) {
    if constexpr (!kLookup) {
      // In fp32: under the exponent of 2^23 an integer is a float.
      auto code = [&](int k) __attribute__((always_inline)) {
        return (VecU)((VecF)((unit.words[0] >> (k * kBits) & kMask) | magic_bits(0)) - (VecF)bias);
      };
      return (VecF)(code(j + kHalf) | code(j) >> 16);
    } else if constexpr (kSymmetric) {
      return lookup_16(half_codes<kBits>(unit.words, j), table);
    } else if constexpr (kByte > 1) {
      const VecU word = unit.words[j % kByte];
      return lookup_16(j < kByte ? word : word >> 8, table);
    } else {
      return lookup_16((half_codes<kBits>(unit.words, j) & (kMask * 0x10001u)) + bias, table);
    }
  }

  static HF_GPTQ_INLINE VecU prepare(VecF zero) {
    const VecF biased = zero + splat(magic(0));
    if (!kLookup) return (VecU)biased;
    // The integer zero lies in the low bits of 2^23 + zero.
    const VecU offset = splat(16u) - ((VecU)biased & 0xffffu);
    const VecU both = offset | offset << 16;
    return kByte > 1 ? both | both << 8 : both;
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
    VecU bias[kBlocks];
    HF_GPTQ_UNROLL
    for (int b = 0; b < kBlocks; ++b) bias[b] = prepare(zero[b]);
    int64_t row = code_word(code, kBits);
    for (int64_t step = 0; step < steps; step += kHalf, row += kUnitWords) {
      VecU unit[kBlocks][kUnitWords];
      load_unit(words, row, rows, row_stride, unit);
      Unit units[kBlocks];
      HF_GPTQ_UNROLL
      for (int b = 0; b < kBlocks; ++b) units[b] = prepared(unit[b], bias[b]);
      HF_GPTQ_UNROLL
      for (int j = 0; j < kHalf; ++j) {
        VecF values[kBlocks];
        HF_GPTQ_UNROLL
        for (int b = 0; b < kBlocks; ++b) values[b] = pair(units[b], j, bias[b], table);
        sink(step + j, values);
      }
    }
  }

  // Where the 16-bit numbers of the steps of 32 codes come from.
  struct PairPlaces {
    alignas(64) uint16_t places[32];
    constexpr PairPlaces() : places() {
      for (int i = 0; i < 32; ++i) {
        places[i] = static_cast<uint16_t>(i / kUnit * kUnit + i % 2 * kHalf + i % kUnit / 2);
      }
    }
  };

  static HF_GPTQ_INLINE VecU pair_places() {
    static constexpr PairPlaces kPlaces;
    VecU places;
    memcpy(&places, kPlaces.places, sizeof places);
    return places;
  }

  // The steps of a run of one row of x.
  static float* pack_run(const uint16_t* x, const Run& run, float* packed) {
    const VecU places = pair_places();
    int64_t unit = Pairs::first(run);
    while (unit < run.end) {
      if (unit >= run.begin && unit + 32 <= run.end) {
        VecU numbers;
        memcpy(&numbers, x + unit, sizeof numbers);
        store(packed, lookup_16(places, numbers));
        packed += 16;
        unit += 32;
        continue;
      }
      for (int64_t k = unit; k < unit + kHalf; ++k) {
        const int64_t next = k + kHalf;
        const uint32_t lower = k >= run.begin && k < run.end ? x[k] : 0;
        const uint32_t upper = next >= run.begin && next < run.end ? x[next] : 0;
        *packed++ = bits_float(lower | upper << 16);
      }
      unit += kUnit;
    }
    return packed;
  }

  // As in Floats.
  static bool pack(const LinearArguments& a, int64_t m, int rows, int64_t steps, float* packed) {
    const int64_t K = a.weight.K;
    const int32_t* perm = a.weight.perm;
    float* copy = static_cast<float*>(
        thread_scratch(rows * steps * sizeof(float) + (perm ? K * sizeof(uint16_t) : 0)));
    if (!copy) return false;
    uint16_t* sorted = reinterpret_cast<uint16_t*>(copy + rows * steps);
    // Where units are of one group each, the runs are as one.
    const Run all{0, K, 0};
    const Runs runs = steps == Pairs::steps(all) ? Runs{&all, 1} : a.runs;
    if (runs.data == &all && rows > 1 && !perm && K % 32 == 0) {
      const uint16_t* x = static_cast<const uint16_t*>(a.x) + m * a.x_row_stride;
      const VecU places = pair_places();
      interleave_rows(rows, steps, packed,
                      [&](int r, int64_t i, int64_t /*left*/) __attribute__((always_inline)) {
                        VecU numbers;
                        memcpy(&numbers, x + r * a.x_row_stride + 2 * i, sizeof numbers);
                        return lookup_16(places, numbers);
                      });
      return true;
    }
    for (int r = 0; r < rows; ++r) {
      const uint16_t* x = static_cast<const uint16_t*>(a.x) + (m + r) * a.x_row_stride;
      if (perm) {
        for (int64_t i = 0; i < K; ++i) sorted[i] = x[perm[i]];
        x = sorted;
      }
      float* row = rows == 1 ? packed : copy + r * steps;
      for (int64_t i = 0; i < runs.count; ++i) row = pack_run(x, runs.data[i], row);
    }
    if (rows > 1) interleave(copy, steps, rows, steps, packed);
    return true;
  }
};

#endif

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_CODES_H_
