// The instructions that the kernels use, each with its meaning on the CPU beside it.
//
// Activations and weights in flight are raw 16-bit words; the tags Half and Bfloat16 say what they
// mean.
#ifndef HF_GPTQ_PTX_H_
#define HF_GPTQ_PTX_H_

#include <stdint.h>
#include <string.h>

#ifdef HF_GPTQ_EMULATE
#include "emulate/emulator.h"
#include "emulate/runtime.h"
#define HF_GPTQ_SHARED(name) unsigned char* const name = emulate::shared_memory()
#else
#include <cuda_runtime.h>
#define HF_GPTQ_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#define HF_GPTQ_DEVICE static __device__ __forceinline__

namespace hf_gptq {

struct Half {};
struct Bfloat16 {};

// ---- numbers ------------------------------------------------------------------------------------

HF_GPTQ_DEVICE float bits_to_float(uint32_t bits) {
#ifdef HF_GPTQ_EMULATE
  float value;
  memcpy(&value, &bits, 4);
  return value;
#else
  return __uint_as_float(bits);
#endif
}

HF_GPTQ_DEVICE uint32_t float_to_bits(float value) {
#ifdef HF_GPTQ_EMULATE
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
#else
  return __float_as_uint(value);
#endif
}

HF_GPTQ_DEVICE float to_float(uint16_t value, Bfloat16) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}

HF_GPTQ_DEVICE float to_float(uint16_t value, Half) {
#ifdef HF_GPTQ_EMULATE
  const uint32_t sign = (value & 0x8000u) << 16;
  const uint32_t rest = value & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // A subnormal is scaled up by a multiplication that is exact.
  const float magnitude = bits_to_float(rest << 13) * bits_to_float(0x77800000u);  // 2^112
  return bits_to_float(sign | float_to_bits(magnitude));
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
#endif
}

// Rounded to nearest, ties to even.
HF_GPTQ_DEVICE uint16_t from_float(float value, Bfloat16) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

HF_GPTQ_DEVICE uint16_t from_float(float value, Half) {
#ifdef HF_GPTQ_EMULATE
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fffu;
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 rounds at bit 24 of fp16's smallest step
    const uint32_t rounded = float_to_bits(bits_to_float(rest) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
#else
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#endif
}

// Two numbers as one word, the first in the low half.
HF_GPTQ_DEVICE uint32_t pack_floats(float low, float high, Half type) {
#if !defined(HF_GPTQ_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  (void)type;
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return from_float(low, type) | static_cast<uint32_t>(from_float(high, type)) << 16;
#endif
}

HF_GPTQ_DEVICE uint32_t pack_floats(float low, float high, Bfloat16 type) {
#if !defined(HF_GPTQ_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  (void)type;
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return from_float(low, type) | static_cast<uint32_t>(from_float(high, type)) << 16;
#endif
}

// a - b in both halves.
HF_GPTQ_DEVICE uint32_t subtract_halves(uint32_t a, uint32_t b, Half type) {
#ifdef HF_GPTQ_EMULATE
  return pack_floats(to_float(a & 0xffffu, type) - to_float(b & 0xffffu, type),
                     to_float(a >> 16, type) - to_float(b >> 16, type), type);
#else
  (void)type;
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#endif
}

HF_GPTQ_DEVICE uint32_t subtract_halves(uint32_t a, uint32_t b, Bfloat16 type) {
#ifdef HF_GPTQ_EMULATE
  return pack_floats(to_float(a & 0xffffu, type) - to_float(b & 0xffffu, type),
                     to_float(a >> 16, type) - to_float(b >> 16, type), type);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  (void)type;
  return a - b;  // never run: the host refuses bf16 there
#else
  (void)type;
  uint32_t result;  // b * -1 + a: sm_80 has no bf16 subtraction
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  return result;
#endif
}

// Bytes of `a` (0..3) and `b` (4..7) picked by the nibbles of `selector`.
HF_GPTQ_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef HF_GPTQ_EMULATE
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> (8 * (selector >> 4 * i & 7u)) & 0xffu) << 8 * i;
  }
  return result;
#else
  return __byte_perm(a, b, selector);
#endif
}

// (a & mask) | bits, in one instruction: the compiler makes two where both are constants.
HF_GPTQ_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#ifdef HF_GPTQ_EMULATE
  return (a & mask) | bits;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
  return result;
#endif
}

// ---- memory -------------------------------------------------------------------------------------

HF_GPTQ_DEVICE uint32_t shared_address(const void* pointer) {
#ifdef HF_GPTQ_EMULATE
  (void)pointer;
  return 0;
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// Starts a copy of `Bytes` (4, 8 or 16, aligned so) into shared memory; only `filled` of them are
// read, the rest becomes zero. Before sm_80 it has finished on return.
template <int Bytes>
HF_GPTQ_DEVICE void copy_async(void* shared, const void* global, int filled) {
#ifdef HF_GPTQ_EMULATE
  emulate::copy_async(shared, global, Bytes, filled);
#elif __CUDA_ARCH__ >= 800
  if (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(filled)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(filled)
                 : "memory");
  }
#else
  if (filled == Bytes) {
    if (Bytes == 16) {
      *static_cast<uint4*>(shared) = __ldg(static_cast<const uint4*>(global));
    } else {
      for (int i = 0; i < Bytes / 4; ++i) {
        static_cast<uint32_t*>(shared)[i] = __ldg(static_cast<const uint32_t*>(global) + i);
      }
    }
  } else {
    for (int i = 0; i < Bytes / 2; ++i) {
      static_cast<uint16_t*>(shared)[i] =
          2 * i < filled ? __ldg(static_cast<const uint16_t*>(global) + i) : uint16_t(0);
    }
  }
#endif
}

// Closes the group of copies that this thread has started.
HF_GPTQ_DEVICE void commit_copies() {
#ifdef HF_GPTQ_EMULATE
  emulate::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `Pending` of this thread's latest groups are unfinished.
template <int Pending>
HF_GPTQ_DEVICE void wait_copies() {
#ifdef HF_GPTQ_EMULATE
  emulate::wait_copies(Pending);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Reads what no other block of this multiprocessor will read: it leaves L1 as it is.
template <int Words>
HF_GPTQ_DEVICE void load_once(uint32_t (&words)[Words], const uint32_t* address) {
  static_assert(Words == 1 || Words == 2 || Words == 4, "what one instruction loads");
#ifdef HF_GPTQ_EMULATE
  for (int i = 0; i < Words; ++i) words[i] = address[i];
#else
  if constexpr (Words == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(address));
  } else if constexpr (Words == 2) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(address));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(address));
  }
#endif
}

// ---- tensor cores -------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements. Lane 8i + j passes the address of row j of matrix i, 16
// bytes; register i of lane l receives elements 2 (l % 4) and + 1 of row l / 4 of matrix i.
HF_GPTQ_DEVICE void load_matrices(uint32_t (&registers)[4], const void* row) {
#ifdef HF_GPTQ_EMULATE
  struct Arguments {
    const void* row;
    uint32_t* registers;
  } mine{row, registers};
  emulate::collective("ldmatrix", mine, [](Arguments** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const void* from = all[8 * i + lane / 4]->row;
        if (reinterpret_cast<uintptr_t>(from) % 16) emulate::fail("ldmatrix: unaligned row");
        memcpy(&all[lane]->registers[i], static_cast<const char*>(from) + lane % 4 * 4, 4);
      }
    }
  });
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

#ifdef HF_GPTQ_EMULATE
struct MmaArguments {
  const uint32_t* a;
  uint32_t b[2];
  float* sum;
};

// sum += A B with A 16 x 16 and B 16 x 8, each sum in double and rounded once.
template <class T>
void emulated_mma(MmaArguments** all) {
  double A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) {
        A[g + r % 2 * 8][2 * t + half + r / 2 * 8] =
            to_float(static_cast<uint16_t>(all[lane]->a[r] >> 16 * half), T());
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int half = 0; half < 2; ++half) {
        B[2 * t + half + 8 * r][g] =
            to_float(static_cast<uint16_t>(all[lane]->b[r] >> 16 * half), T());
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int c = 0; c < 4; ++c) {
      const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
      double sum = all[lane]->sum[c];
      for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
      all[lane]->sum[c] = static_cast<float>(sum);
    }
  }
}
#endif

// sum += A B on the warp's tensor cores: A 16 x 16 (rows outputs), B 16 x 8 (columns tokens).
// Lane 4g + t holds of sum: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
HF_GPTQ_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 Half) {
#ifdef HF_GPTQ_EMULATE
  MmaArguments mine{a, {b0, b1}, sum};
  emulate::collective("mma.f16", mine, emulated_mma<Half>);
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // sm_75 has half the depth.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

HF_GPTQ_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 Bfloat16) {
#ifdef HF_GPTQ_EMULATE
  MmaArguments mine{a, {b0, b1}, sum};
  emulate::collective("mma.bf16", mine, emulated_mma<Bfloat16>);
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_PTX_H_
