// The AVX-512 instructions of simd.h, computed with AVX2: a test build (HF_GPTQ_EMULATE_AVX512)
// runs the kernels of avx512f and avx512bf16, and those with VNNI, with the same results on a
// processor that has neither. Everything else is GCC's vectors, which it splits by itself. Included
// by simd.h only.
#ifndef HF_GPTQ_CPU_EMULATE_H_
#define HF_GPTQ_CPU_EMULATE_H_

#include <immintrin.h>

namespace hf_gptq {
namespace {

struct Halves {
  __m256 half[2];
};

HF_GPTQ_INLINE Halves halves(VecF a) {
  Halves h;
  memcpy(&h, &a, sizeof h);
  return h;
}

HF_GPTQ_INLINE VecF whole(const Halves& h) {
  VecF a;
  memcpy(&a, &h, sizeof a);
  return a;
}

HF_GPTQ_INLINE VecF splat(float x) {
  const __m256 half = _mm256_set1_ps(x);
  return whole({{half, half}});
}

HF_GPTQ_INLINE VecF fmadd(VecF a, VecF b, VecF c) {
  const Halves x = halves(a), y = halves(b), z = halves(c);
  return whole({{_mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]),
                 _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1])}});
}

HF_GPTQ_INLINE VecF round_even(VecF a) {
  const Halves x = halves(a);
  return whole({{_mm256_round_ps(x.half[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                 _mm256_round_ps(x.half[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}});
}

HF_GPTQ_INLINE VecF maximum(VecF a, VecF b) { return a > b ? a : b; }
HF_GPTQ_INLINE VecF minimum(VecF a, VecF b) { return a < b ? a : b; }

HF_GPTQ_INLINE bool differs(VecF a, VecF b) {
  const Halves x = halves(a), y = halves(b);
  return (_mm256_movemask_ps(_mm256_cmp_ps(x.half[0], y.half[0], _CMP_NEQ_UQ)) |
          _mm256_movemask_ps(_mm256_cmp_ps(x.half[1], y.half[1], _CMP_NEQ_UQ))) != 0;
}

#if defined(HF_GPTQ_SIMD_BF16)

// A subnormal number becomes a zero of its sign.
HF_GPTQ_INLINE VecF flush(VecF a) {
  const VecU bits = (VecU)a;
  const VecU normal = (VecU)((bits & 0x7f800000u) != 0u);
  return (VecF)(bits & (normal | 0x80000000u));
}

// vdpbf16ps: two fused multiply-adds, that of the upper halves first, each rounded to nearest even,
// subnormal inputs and results taken for zero.
HF_GPTQ_INLINE VecF fmadd_pairs(VecF a, const float* x, VecF c) {
  const VecF b = splat(*x);
  const VecF a_upper = flush((VecF)((VecU)a & 0xffff0000u)), a_lower = flush((VecF)((VecU)a << 16));
  const VecF b_upper = flush((VecF)((VecU)b & 0xffff0000u)), b_lower = flush((VecF)((VecU)b << 16));
  const VecF upper = flush(fmadd(a_upper, b_upper, flush(c)));
  return flush(fmadd(a_lower, b_lower, upper));
}

// vcvtne2ps2bf16, and the two of a pair brought together.
HF_GPTQ_INLINE VecF bf16_pairs(VecF lower, VecF upper) {
  return (VecF)(rounded_bf16(flush(lower)) >> 16 | (rounded_bf16(flush(upper)) & 0xffff0000u));
}

// vpermw.
HF_GPTQ_INLINE VecF lookup_16(VecU index, VecU table) {
  uint16_t places[32], entries[32], out[32];
  memcpy(places, &index, sizeof places);
  memcpy(entries, &table, sizeof entries);
  for (int i = 0; i < 32; ++i) out[i] = entries[places[i] & 31];
  VecF result;
  memcpy(&result, out, sizeof result);
  return result;
}

#endif

#if defined(HF_GPTQ_SIMD_VNNI)

// vpdpbusd.
HF_GPTQ_INLINE VecF add_byte_products(VecF codes, const float* x, VecF sum) {
  uint8_t unsigned_bytes[64];
  int8_t signed_bytes[4];
  memcpy(unsigned_bytes, &codes, sizeof unsigned_bytes);
  memcpy(signed_bytes, x, sizeof signed_bytes);
  VecI total = (VecI)sum;
  for (int i = 0; i < 64; ++i) total[i / 4] += unsigned_bytes[i] * signed_bytes[i % 4];
  return (VecF)total;
}

#endif

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_EMULATE_H_
