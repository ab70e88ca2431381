// Conversions between fp32 and the storage types, exact or rounded to nearest even. Internal
// linkage, see isa.h.
#ifndef HF_GPTQ_CPU_CONVERT_H_
#define HF_GPTQ_CPU_CONVERT_H_

#include "hf_gptq.h"
#include "simd.h"

namespace hf_gptq {
namespace {

HF_GPTQ_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

HF_GPTQ_INLINE float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

HF_GPTQ_INLINE float bf16_to_float(uint16_t b) { return bits_float(uint32_t{b} << 16); }

HF_GPTQ_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  // A NaN keeps its top bits and becomes quiet; rounding could carry it into infinity.
  const uint32_t nan = (u >> 16) | 0x40u;
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// float_to_bf16() of kLanes numbers.
HF_GPTQ_INLINE void floats_to_bf16(VecF x, uint16_t* dst) {
  typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
  const Narrow narrow = __builtin_convertvector(rounded_bf16(x) >> 16, Narrow);
  memcpy(dst, &narrow, sizeof narrow);
}

#if defined(HF_GPTQ_SIMD_AVX512F) || defined(HF_GPTQ_SIMD_AVX2)

HF_GPTQ_INLINE float fp16_to_float(uint16_t h) { return _cvtsh_ss(h); }
HF_GPTQ_INLINE uint16_t float_to_fp16(float x) {
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else

HF_GPTQ_INLINE float fp16_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t fraction = h & 0x3ffu;
  if (exponent == 31) {
    return bits_float(sign | 0x7f800000u | (fraction ? 0x400000u : 0u) | (fraction << 13));
  }
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

HF_GPTQ_INLINE uint16_t float_to_fp16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520, halfway to what would be the next number
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

#endif

HF_GPTQ_INLINE int64_t dtype_size(int dtype) { return dtype == HF_GPTQ_FP32 ? 4 : 2; }

HF_GPTQ_INLINE float round_to(float x, int dtype) {
  if (dtype == HF_GPTQ_FP16) return fp16_to_float(float_to_fp16(x));
  if (dtype == HF_GPTQ_BF16) return bf16_to_float(float_to_bf16(x));
  return x;
}

// kLanes numbers in fp16.
HF_GPTQ_INLINE VecF load_fp16(const uint16_t* p) {
#if defined(HF_GPTQ_SIMD_AVX512F) && !defined(HF_GPTQ_EMULATE)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  float v[kLanes];
#if defined(HF_GPTQ_SIMD_AVX512F) || defined(HF_GPTQ_SIMD_AVX2)
  HF_GPTQ_UNROLL
  for (int i = 0; i < kLanes; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
    _mm256_storeu_ps(v + i, _mm256_cvtph_ps(h));
  }
#else
  for (int i = 0; i < kLanes; ++i) v[i] = fp16_to_float(p[i]);
#endif
  return load(v);
#endif
}

// dst[i] = src[first + i], i < count; exact.
inline void to_float(const void* src, int dtype, int64_t first, int64_t count, float* dst) {
  if (dtype == HF_GPTQ_FP32) {
    copy_floats(static_cast<const float*>(src) + first, count, dst);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(src) + first;
  if (dtype == HF_GPTQ_BF16) {
    for (int64_t i = 0; i < count; ++i) dst[i] = bf16_to_float(half[i]);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, load_fp16(half + i));
  for (; i < count; ++i) dst[i] = fp16_to_float(half[i]);
}

// dst[first + i] = src[i], i < count; rounded to nearest even.
inline void from_float(const float* src, int64_t count, void* dst, int dtype, int64_t first) {
  if (dtype == HF_GPTQ_FP32) {
    copy_floats(src, count, static_cast<float*>(dst) + first);
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(dst) + first;
  if (dtype == HF_GPTQ_BF16) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) floats_to_bf16(load(src + i), half + i);
    for (; i < count; ++i) half[i] = float_to_bf16(src[i]);
    return;
  }
  int64_t i = 0;
#if defined(HF_GPTQ_SIMD_AVX512F) || defined(HF_GPTQ_SIMD_AVX2)
  for (; i + 8 <= count; i += 8) {
    const __m128i h =
        _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), h);
  }
#endif
  for (; i < count; ++i) half[i] = float_to_fp16(src[i]);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_CONVERT_H_
