// 16-bit activations as integers: what AVX2 multiplies fastest. Internal linkage, see isa.h.
//
// vpmaddwd adds 16 products of 16-bit integers to eight sums, where an fma does eight. So up to 256
// activations that meet one scale become integers under one power of two, of 15 bits and a sign:
//
//   x = (high + low / 2^15) * 2^e,   2^14 <= max |high| < 2^15,  |low| <= 2^14
//
// bf16 has 8 significant bits, so that low is 0 but for numbers 2^7 times smaller than the largest:
// a list names the steps that need it. What is below 2^-31 of the largest is rounded away, and low
// altogether where it makes up less than 2^-17 of x, far below the rounding of the result: numbers
// of one magnitude need no list. Sums of integers are exact, whatever their order.
//
// A step multiplies two codes and two activations, which lie as those of Pairs (codes.h).
#ifndef HF_GPTQ_CPU_FIXED_H_
#define HF_GPTQ_CPU_FIXED_H_

#include "codes.h"

namespace hf_gptq {
namespace {

// The packed activations of a slab (linear_job.h).
struct FixedRows {
  float* high;      // as LinearJob::x lies
  float* low;       // as high
  float* scales;    // 2^e for each (row block, stretch, row)
  int32_t* sums;    // for each (row block, stretch): of high for each row, then of low
  uint8_t* list;    // for each row block, for each stretch from its first step on: steps with a low
  int32_t* listed;  // how many, for each (row block, stretch)
};

#if defined(HF_GPTQ_SIMD_AVX2)

struct FixedProducts {
  static HF_GPTQ_INLINE VecF multiply_add(VecF codes, const float* x, VecF sum) {
    const VecF every = splat(*x);
    // _mm256_add_epi32(_mm256_madd_epi16(codes, x), sum), for which GCC computes the products of
    // many sums first and has no registers left for the sums.
    VecF products;
    __asm__ volatile(
        "vpmaddwd %[x], %[codes], %[products]\n\t"
        "vpaddd %[products], %[sum], %[sum]"
        : [sum] "+x"(sum), [products] "=&x"(products)
        : [codes] "x"(codes), [x] "x"(every));
    return sum;
  }
  // Sums of the high parts, and of the low ones, in fp32.
  static HF_GPTQ_INLINE VecF value(VecF high) { return _mm256_cvtepi32_ps((__m256i)high); }
  static HF_GPTQ_INLINE VecF value(VecF high, VecF low) {
    return fmadd(value(low), splat(0x1p-15f), value(high));
  }
};

// kSymmetricZeros: zeros are all 2^(bits-1).
template <int kWidth, bool kSymmetricZeros>
struct Fixed : WholeUnits<kWidth, 2> {
  using Products = FixedProducts;
  static constexpr int kBits = kWidth;
  static constexpr bool kSymmetric = kSymmetricZeros;
  static constexpr int kCodes = 2;
  static constexpr bool kFixed = true, kBytes = false;
  static constexpr int64_t kMostStreamedRows = kUnbounded;
  static constexpr int kUnit = codes_per_unit(kBits);
  static constexpr int kUnitWords = words_per_unit(kBits);
  static constexpr int kHalf = kUnit / 2;
  // Codes of a stretch: sums of 256 products of 15 and 8 bits and a sign fit 32 bits, and a list's
  // entry 8.
  static constexpr int64_t kMostCodes = 256;
  static_assert(kMostCodes % 16 == 0 && kMostCodes % kUnit == 0, "what pack() takes");
  static constexpr uint32_t kMask = ((uint32_t{1} << kBits) - 1) * 0x10001u;

  // Whether step j may be taken 2^kBits times as large, by the shift of the step before it.
  static constexpr bool is_raised(int j) {
    return kBits < 8 && j % 2 == 1 && half_shift<kBits>(j - 1) + 2 * kBits <= 16 &&
           half_shift<kBits>(j) > 0;
  }

  // The codes of step j of a unit, one in each half of a lane; `raised`, times 2^kBits.
  static HF_GPTQ_INLINE VecU pair(const VecU (&unit)[kUnitWords], int j, bool raised) {
    if (raised) return half_codes<kBits>(unit, j - 1) & (kMask << kBits);
    const VecU codes = half_codes<kBits>(unit, j);
    return half_shift<kBits>(j) + kBits == 16 ? codes : codes & kMask;
  }

  // Calls sink(i, place, codes) for steps i = 0 .. steps-1 from code `code` on. With kPlaces = 2
  // the codes at place 1 are 2^kBits times as large, which spares a shift.
  template <int kPlaces, int kBlocks, class Sink>
  static HF_GPTQ_INLINE void walk(const hf_gptq_weight& w, const uint32_t* const (&words)[kBlocks],
                                  int64_t row_stride, int64_t code, int64_t steps, Sink&& sink) {
    constexpr int kVectors = kBlocks * kBlockVectors;
    const int64_t rows = packed_words(w.K, kBits);
    int64_t row = code_word(code, kBits);
    for (int64_t step = 0; step < steps; step += kHalf, row += kUnitWords) {
      VecU unit[kVectors][kUnitWords];
      load_unit(words, row, rows, row_stride, unit);
      HF_GPTQ_UNROLL
      for (int i = 0; i < kVectors; ++i) arrange<kBits>(unit[i]);
      HF_GPTQ_UNROLL
      for (int j = 0; j < kHalf; ++j) {
        const bool raised = kPlaces == 2 && is_raised(j);
        VecF values[kVectors];
        HF_GPTQ_UNROLL
        for (int i = 0; i < kVectors; ++i) values[i] = (VecF)pair(unit[i], j, raised);
        sink(step + j, raised ? 1 : 0, values);
      }
    }
  }

  // The codes of one step, in both halves of each lane, of one vector of columns.
  static HF_GPTQ_INLINE VecU one(const uint32_t* words, int64_t row_stride, int64_t rows,
                                 int64_t code, int64_t step) {
    const int64_t unit = code + 2 * (step / kHalf * kHalf);
    if constexpr (kUnitWords == 1) {
      const VecU word = load(words + code_word(unit, kBits) * row_stride);
      return (VecU)((VecH)word >> static_cast<int>(step % kHalf * kBits)) & kMask;
    }
    auto field = [&](int64_t k) __attribute__((always_inline)) {
      const int64_t row = min64(code_word(k, kBits), rows - 1);
      const int shift = code_shift(k, kBits);
      VecU c = load(words + row * row_stride) >> shift;
      if (kBits == 3 && shift + kBits > 32) {
        c |= load(words + min64(row + 1, rows - 1) * row_stride) << (32 - shift);
      }
      return c & ((1u << kBits) - 1);
    };
    return field(unit + step % kHalf) | field(unit + step % kHalf + kHalf) << 16;
  }

  // lower + upper / 2^kBits: the sums of walk()'s two places.
  static HF_GPTQ_INLINE VecF joined(VecF lower, VecF upper) {
    return (VecF)((VecI)lower + ((VecI)upper >> kBits));
  }

  // sum - zero * sum_x.
  static HF_GPTQ_INLINE VecF less_zeros(VecF sum, VecF zero, int32_t sum_x) {
    if constexpr (kSymmetric) return (VecF)((VecI)sum - sum_x * (1 << (kBits - 1)));
    return (VecF)((VecI)sum - __builtin_convertvector(zero, VecI) * sum_x);
  }

  static int32_t total(__m256i v) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
  }

  // Writes `count` integers, which are in the order of the codes, in that of the steps.
  static HF_GPTQ_INLINE void to_steps(const int16_t* integers, int64_t count, float* packed) {
    alignas(32) int16_t placed[kMostCodes];
    const __m128i* in = reinterpret_cast<const __m128i*>(integers);
    __m128i* out = reinterpret_cast<__m128i*>(placed);
    constexpr int kEights = kHalf / 8;  // vectors of a half unit
    for (int64_t i = 0; i < ceil_div(count, 8); i += kEights > 0 ? 2 * kEights : 1) {
      if constexpr (kEights > 0) {
        HF_GPTQ_UNROLL
        for (int j = 0; j < kEights; ++j) {
          const __m128i first = _mm_load_si128(in + i + j);
          const __m128i second = _mm_load_si128(in + i + kEights + j);
          _mm_store_si128(out + i + 2 * j, _mm_unpacklo_epi16(first, second));
          _mm_store_si128(out + i + 2 * j + 1, _mm_unpackhi_epi16(first, second));
        }
      } else {
        const __m128i order =
            kHalf == 4 ? _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
                       : _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        _mm_store_si128(out + i, _mm_shuffle_epi8(_mm_load_si128(in + i), order));
      }
    }
    memcpy(packed, placed, count * sizeof(int16_t));
  }

  // x of one row, in fp32 and in the order of the codes, as integers: the steps of one stretch.
  // Returns whether any low is not 0.
  static bool pack(const float* x, const Stretch& s, float* high, float* low, float* scale,
                   int32_t* sum_high, int32_t* sum_low) {
    alignas(32) float copy[kMostCodes];
    alignas(32) int16_t parts[2][kMostCodes];
    const int64_t count = 2 * (s.end - s.begin), width = ceil_div(count, 16) * 16;
    const float* v = stretch_values(x, s, width, copy);
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < width; i += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + i));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    uint32_t largest = 0;
    for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
    int exponent = static_cast<int>(largest >> 23) - 127 - 14;
    if (exponent < -126) exponent = -126;
    *scale = bits_float(static_cast<uint32_t>(exponent + 127) << 23);
    float inverse = bits_float(static_cast<uint32_t>(127 - exponent) << 23);
    if (largest >= 0x7f800000u) {
      // An infinity is 1 times infinity.
      infinities(v, width, copy);
      v = copy;
      *scale = bits_float(largest);
      inverse = 1.0f;
    }
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i magnitudes[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t i = 0; i < width; i += 16) {
      __m256i integers[2][2];
      for (int h = 0; h < 2; ++h) {
        const __m256 scaled =
            _mm256_mul_ps(_mm256_loadu_ps(v + i + 8 * h), _mm256_set1_ps(inverse));
        integers[0][h] = _mm256_cvtps_epi32(scaled);
        const __m256 rest = _mm256_sub_ps(scaled, _mm256_cvtepi32_ps(integers[0][h]));
        integers[1][h] = _mm256_cvtps_epi32(_mm256_mul_ps(rest, _mm256_set1_ps(32768.0f)));
      }
      for (int p = 0; p < 2; ++p) {
        sums[p] = _mm256_add_epi32(sums[p], _mm256_add_epi32(integers[p][0], integers[p][1]));
        magnitudes[p] = _mm256_add_epi32(
            magnitudes[p],
            _mm256_add_epi32(_mm256_abs_epi32(integers[p][0]), _mm256_abs_epi32(integers[p][1])));
        const __m256i packed =
            _mm256_permute4x64_epi64(_mm256_packs_epi32(integers[p][0], integers[p][1]), 0xd8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts[p] + i), packed);
      }
    }
    const int32_t low_magnitude = total(magnitudes[1]);
    const bool negligible = 4 * low_magnitude <= total(magnitudes[0]);
    if (negligible && low_magnitude > 0) {
      memset(parts[1], 0, width * sizeof(int16_t));
      sums[1] = _mm256_setzero_si256();
    }
    *sum_high = total(sums[0]);
    *sum_low = total(sums[1]);
    to_steps(parts[0], count, high);
    to_steps(parts[1], count, low);
    return !negligible;
  }
};

#endif

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_FIXED_H_
