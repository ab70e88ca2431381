// Vectors of the instruction set at hand, on the vector extensions of GCC and Clang; intrinsics
// only for what the extensions cannot say. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_SIMD_H_
#define HF_GPTQ_CPU_SIMD_H_

#include <stdint.h>
#include <string.h>

// HF_GPTQ_EMULATE: AVX-512 computed with AVX2, to test it on processors that have none (emulate.h).
#if defined(HF_GPTQ_SIMD_AVX512F) || defined(HF_GPTQ_SIMD_AVX2)
#include <immintrin.h>
#endif

#include "layout.h"

#define HF_GPTQ_INLINE inline __attribute__((always_inline))
// Short loops over registers must be gone before register allocation.
#ifdef __clang__
#define HF_GPTQ_UNROLL _Pragma("unroll")
#else
#define HF_GPTQ_UNROLL _Pragma("GCC unroll 32")
#endif

namespace hf_gptq {
namespace {

#if defined(HF_GPTQ_SIMD_AVX512F)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(HF_GPTQ_SIMD_AVX2)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 16;  // SSE2; NEON has more
#endif
// Vectors across one block of columns.
constexpr int kBlockVectors = kBlockColumns / kLanes;

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(4 * kLanes)));  // the halves of lanes

// Four lanes, whatever the instruction set, for transposing. i, j, k, l number those of a, then
// b's.
typedef float Vec4 __attribute__((vector_size(16)));
#ifdef __clang__
#define HF_GPTQ_SHUFFLE_4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t VecI4 __attribute__((vector_size(16)));
#define HF_GPTQ_SHUFFLE_4(a, b, i, j, k, l) __builtin_shuffle(a, b, (VecI4){i, j, k, l})
#endif

HF_GPTQ_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

HF_GPTQ_INLINE VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}

HF_GPTQ_INLINE VecU load(const uint32_t* p) {
  VecU v;
  memcpy(&v, p, sizeof v);
  return v;
}

HF_GPTQ_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }

HF_GPTQ_INLINE VecU splat(uint32_t x) { return VecU{} + x; }

// The bf16 nearest to every lane, ties to even, in its upper half; what the lower half holds is
// undefined. A NaN keeps its top bits and becomes quiet.
HF_GPTQ_INLINE VecU rounded_bf16(VecF x) {
  const VecU u = (VecU)x, rounded = u + 0x7fffu + ((u >> 16) & 1u);
#if defined(HF_GPTQ_SIMD_AVX512F) && !defined(HF_GPTQ_EMULATE)
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return (VecU)_mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)u,
                                    _mm512_set1_epi32(0x400000));
#else
  const VecU is_nan = (VecU)((u & 0x7fffffffu) > 0x7f800000u);
  return (rounded & ~is_nan) | ((u | 0x400000u) & is_nan);
#endif
}

#if defined(HF_GPTQ_SIMD_AVX512F) && defined(HF_GPTQ_EMULATE)
}  // namespace
}  // namespace hf_gptq
#include "emulate.h"
namespace hf_gptq {
namespace {
#elif defined(HF_GPTQ_SIMD_AVX512F)

HF_GPTQ_INLINE VecF splat(float x) { return _mm512_set1_ps(x); }
HF_GPTQ_INLINE VecF fmadd(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
HF_GPTQ_INLINE VecF round_even(VecF a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a > b ? a : b and a < b ? a : b: b if either is NaN.
HF_GPTQ_INLINE VecF maximum(VecF a, VecF b) { return _mm512_max_ps(a, b); }
HF_GPTQ_INLINE VecF minimum(VecF a, VecF b) { return _mm512_min_ps(a, b); }
// Whether a and b differ in any lane; NaN differs from everything.
HF_GPTQ_INLINE bool differs(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }

#elif defined(HF_GPTQ_SIMD_AVX2)

HF_GPTQ_INLINE VecF splat(float x) { return _mm256_set1_ps(x); }
HF_GPTQ_INLINE VecF fmadd(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
HF_GPTQ_INLINE VecF round_even(VecF a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HF_GPTQ_INLINE VecF maximum(VecF a, VecF b) { return _mm256_max_ps(a, b); }
HF_GPTQ_INLINE VecF minimum(VecF a, VecF b) { return _mm256_min_ps(a, b); }
HF_GPTQ_INLINE bool differs(VecF a, VecF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0;
}

#else

HF_GPTQ_INLINE VecF splat(float x) { return VecF{x, x, x, x}; }
// Without fma hardware a fused operation is a library call per element; two roundings instead.
HF_GPTQ_INLINE VecF fmadd(VecF a, VecF b, VecF c) { return a * b + c; }
// 2^23 + |a| has no fraction bits left, so the addition rounds |a| to an integer.
HF_GPTQ_INLINE VecF round_even(VecF a) {
  const VecU sign = (VecU)a & 0x80000000u;
  const VecF magnitude = (VecF)((VecU)a ^ sign);
  const VecF limit = splat(8388608.0f);
  const VecF rounded = (VecF)((VecU)((magnitude + limit) - limit) | sign);
  return magnitude < limit ? rounded : a;
}
HF_GPTQ_INLINE VecF maximum(VecF a, VecF b) { return a > b ? a : b; }
HF_GPTQ_INLINE VecF minimum(VecF a, VecF b) { return a < b ? a : b; }
HF_GPTQ_INLINE bool differs(VecF a, VecF b) {
  const VecI d = a != b;
  return (d[0] | d[1] | d[2] | d[3]) != 0;
}

#endif

// fmadd(a, *b in every lane, c). With AVX-512 the multiplication takes b from memory itself: a
// vector of its own would take a place among the two instructions a cycle that do arithmetic.
#if defined(HF_GPTQ_SIMD_AVX512F) && !defined(HF_GPTQ_EMULATE)
HF_GPTQ_INLINE VecF fmadd(VecF a, const float* b, VecF c) {
  __asm__("vfmadd231ps %[b]%{1to16%}, %[a], %[c]" : [c] "+v"(c) : [a] "v"(a), [b] "m"(*b));
  return c;
}
#else
HF_GPTQ_INLINE VecF fmadd(VecF a, const float* b, VecF c) { return fmadd(a, splat(*b), c); }
#endif

// c + a.upper * b.upper, then + a.lower * b.lower, for lanes that are pairs of bf16; *b in every
// lane.
#if defined(HF_GPTQ_SIMD_BF16) && defined(HF_GPTQ_EMULATE)
// In emulate.h.
#elif defined(HF_GPTQ_SIMD_BF16)
HF_GPTQ_INLINE VecF fmadd_pairs(VecF a, const float* b, VecF c) {
  __asm__("vdpbf16ps %[b]%{1to16%}, %[a], %[c]" : [c] "+v"(c) : [a] "v"(a), [b] "m"(*b));
  return c;
}
// Pairs of bf16, rounded to nearest even, subnormal numbers taken for zero.
HF_GPTQ_INLINE VecF bf16_pairs(VecF lower, VecF upper) {
  alignas(64) static constexpr uint16_t kPlaces[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(upper, lower);
  return (VecF)_mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), both);
}
// In each 16-bit half of a lane, the entry of the table that its low 5 bits name.
HF_GPTQ_INLINE VecF lookup_16(VecU index, VecU table) {
  return (VecF)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table);
}
#else
HF_GPTQ_INLINE VecF upper_bf16(VecF a) { return (VecF)((VecU)a & 0xffff0000u); }
HF_GPTQ_INLINE VecF lower_bf16(VecF a) { return (VecF)((VecU)a << 16); }
HF_GPTQ_INLINE VecF fmadd_pairs(VecF a, const float* b, VecF c) {
  const VecF x = splat(*b);
  return fmadd(lower_bf16(a), lower_bf16(x), fmadd(upper_bf16(a), upper_bf16(x), c));
}
#endif

// sum + the products of the four unsigned bytes of a lane of codes and the four signed bytes of *x.
#if defined(HF_GPTQ_SIMD_VNNI) && defined(HF_GPTQ_EMULATE)
// In emulate.h.
#elif defined(HF_GPTQ_SIMD_VNNI)
HF_GPTQ_INLINE VecF add_byte_products(VecF codes, const float* x, VecF sum) {
  __asm__("vpdpbusd %[x]%{1to16%}, %[codes], %[sum]"
          : [sum] "+v"(sum)
          : [codes] "v"(codes), [x] "m"(*x));
  return sum;
}
#endif

// For short copies of unknown length, where GCC may choose a string instruction over vectors.
HF_GPTQ_INLINE void copy_floats(const float* src, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = src[i];
}

// clamp(rint(w / s) + z, 0, top) for quotient = w / s; 0 for NaN.
HF_GPTQ_INLINE VecF quantize(VecF quotient, VecF zero, VecF top) {
  return minimum(maximum(round_even(quotient) + zero, VecF{}), top);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_SIMD_H_
