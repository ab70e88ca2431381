// Activations rounded to 8 bits, where that is asked for (hf_gptq_set_activations). Internal
// linkage, see isa.h.
//
// vpdpbusd adds four products of an unsigned and a signed byte to a sum, where vdpbf16ps adds two
// products. Up to 256 activations that meet one scale become integers of 7 bits and a sign times
// one number:
//
//   integer = rint(x / (max |x| / 127)),   |integer| <= 127
//
// Codes are the unsigned bytes. Zeros are subtracted from the sums, which are exact: below 2^24 in
// magnitude, the numbers that fp32 holds without gaps.
//
// A step multiplies four codes and four activations. The bytes of a word of 2, 4 or 8 bits are
// shifted together, so that step j takes the codes (4 bits, lane n, codes of one word)
//
//   bit   31   24     16      8      0
//         | 7 6 | 5 4 | 3 2 | 1 0 |     step 0: codes 0, 2, 4, 6; step 1: codes 1, 3, 5, 7
//
// and with 3 bits, arranged in halves of 16 codes (codes.h), codes 2 j, 2 j + 1 and the two 16
// further on.
#ifndef HF_GPTQ_CPU_BYTES_H_
#define HF_GPTQ_CPU_BYTES_H_

#include "codes.h"

namespace hf_gptq {
namespace {

// What belongs to the packed activations of a slab (linear_job.h), for each (row block, stretch,
// row).
struct ByteRows {
  float* scales;   // max |x| / 127
  float* offsets;  // symmetric: the bits of -2^(bits-1) * (sum of integers); else -(sum), in fp32
};

#if defined(HF_GPTQ_SIMD_VNNI)

struct ByteProducts {
  static HF_GPTQ_INLINE VecF multiply_add(VecF codes, const float* x, VecF sum) {
    return add_byte_products(codes, x, sum);
  }
};

// kSymmetric: every zero is 2^(bits-1).
template <int kWidth, bool kSymmetricZeros>
struct Bytes : WholeUnits<kWidth, 4> {
  using Products = ByteProducts;
  static constexpr int kBits = kWidth;
  static constexpr bool kSymmetric = kSymmetricZeros;
  static constexpr int kCodes = 4;
  static constexpr bool kFixed = false, kBytes = true;
  static constexpr int64_t kMostStreamedRows = kUnbounded;
  // Codes of a stretch, so that sums stay below 2^24.
  static constexpr int64_t kMostCodes = 256;
  static constexpr int kUnit = codes_per_unit(kBits);
  static constexpr int kUnitWords = words_per_unit(kBits);
  static constexpr int kUnitSteps = kUnit / 4;
  static constexpr uint32_t kMask = ((uint32_t{1} << kBits) - 1) * 0x01010101u;
  // Codes whose places are found together, see pack().
  static constexpr int64_t kPlaced = kBits == 3 ? 32 : 16;
  static_assert(kMostCodes * 127 * 256 < 1 << 24 && kMostCodes % kPlaced == 0, "what pack() takes");

  // The codes of step j of an arranged unit, one in each byte of a lane.
  static HF_GPTQ_INLINE VecF four(const VecU (&unit)[kUnitWords], int j) {
    if constexpr (kBits == 3) {
      const VecU even = half_codes<3>(unit, 2 * j) & 0x00070007u;
      const VecU odd = half_codes<3>(unit, 2 * j + 1) & 0x00070007u;
      return (VecF)(even | odd << 8);
    } else if constexpr (kBits == 8) {
      return (VecF)unit[0];
    } else {
      return (VecF)((j > 0 ? unit[0] >> (j * kBits) : unit[0]) & kMask);
    }
  }

  // Calls sink(i, codes) for steps i = 0 .. steps-1 from code `code` on.
  template <int kBlocks, class Sink>
  static HF_GPTQ_INLINE void walk(const hf_gptq_weight& w, const uint32_t* const (&words)[kBlocks],
                                  int64_t row_stride, int64_t code, int64_t steps, Sink&& sink) {
    static_assert(kBlockVectors == 1, "a vector of bytes is one block");
    const int64_t rows = packed_words(w.K, kBits);
    int64_t row = code_word(code, kBits);
    for (int64_t step = 0; step < steps; step += kUnitSteps, row += kUnitWords) {
      VecU unit[kBlocks][kUnitWords];
      load_unit(words, row, rows, row_stride, unit);
      HF_GPTQ_UNROLL
      for (int b = 0; b < kBlocks; ++b) arrange<kBits>(unit[b]);
      HF_GPTQ_UNROLL
      for (int j = 0; j < kUnitSteps; ++j) {
        VecF values[kBlocks];
        HF_GPTQ_UNROLL
        for (int b = 0; b < kBlocks; ++b) values[b] = four(unit[b], j);
        sink(step + j, values);
      }
    }
  }

  // sum of integers * (code - zero), from `sum`, which began at begin(offset).
  static HF_GPTQ_INLINE VecF begin(const float* offset) {
    return kSymmetric ? splat(*offset) : VecF{};
  }
  static HF_GPTQ_INLINE VecF less_zeros(VecF sum, VecF zero, const float* offset) {
    const VecF value = __builtin_convertvector((VecI)sum, VecF);
    return kSymmetric ? value : fmadd(zero, offset, value);
  }

  // Brings kPlaced integers, in the order of the codes, into that of the steps.
  static HF_GPTQ_INLINE void place(const int8_t* integers, int8_t* placed) {
    const __m128i* in = reinterpret_cast<const __m128i*>(integers);
    __m128i* out = reinterpret_cast<__m128i*>(placed);
    const __m128i a = _mm_loadu_si128(in);
    if constexpr (kBits == 3) {
      const __m128i b = _mm_loadu_si128(in + 1);
      _mm_storeu_si128(out, _mm_unpacklo_epi16(a, b));
      _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(a, b));
    } else {
      alignas(16) static constexpr int8_t kPlaces[3][16] = {
          {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},
          {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15},
          {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
      const int8_t* places = kPlaces[kBits == 2 ? 0 : kBits == 4 ? 1 : 2];
      _mm_storeu_si128(
          out, _mm_shuffle_epi8(a, _mm_load_si128(reinterpret_cast<const __m128i*>(places))));
    }
  }

  // x of one row, in fp32 and in the order of the codes, as integers: the steps of one stretch.
  static void pack(const float* x, const Stretch& s, float* steps, float* scale, float* offset) {
    const int64_t count = 4 * (s.end - s.begin), width = ceil_div(count, kPlaced) * kPlaced;
    alignas(64) float copy[kMostCodes];
    const float* v = stretch_values(x, s, width, copy);
    VecI most = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const VecI magnitude = (VecI)((VecU)load(v + i) & 0x7fffffffu);
      most = magnitude > most ? magnitude : most;
    }
    int32_t largest = 0;
    HF_GPTQ_UNROLL
    for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
    const float magnitude = bits_float(static_cast<uint32_t>(largest));
    *scale = magnitude / 127.0f;
    float inverse = 127.0f / magnitude;
    if (largest >= 0x7f800000) {
      // An infinity is 1 times infinity; what is NaN as well makes everything NaN.
      infinities(v, width, copy);
      v = copy;
      inverse = 1.0f;
    } else if (magnitude < 0x1p-119f) {
      *scale = inverse = 0.0f;
    }
    alignas(64) int8_t integers[kMostCodes], placed[kMostCodes];
    VecI sums = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      typedef int8_t Narrow __attribute__((vector_size(kLanes)));
      const VecI rounded = __builtin_convertvector(round_even(load(v + i) * splat(inverse)), VecI);
      sums += rounded;
      const Narrow narrow = __builtin_convertvector(rounded, Narrow);
      memcpy(integers + i, &narrow, sizeof narrow);
    }
    int32_t sum = 0;
    HF_GPTQ_UNROLL
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    *offset = kSymmetric ? bits_float(static_cast<uint32_t>(-sum * (1 << (kBits - 1))))
                         : static_cast<float>(-sum);
    for (int64_t i = 0; i < width; i += kPlaced) place(integers + i, placed + i);
    memcpy(steps, placed, count);
  }
};

#endif

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_BYTES_H_
