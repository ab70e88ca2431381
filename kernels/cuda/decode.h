// From packed codes to operand A of the tensor cores, by bit tricks alone.
//
// A code q in the low mantissa bits of a constant c is the number c + q exactly: c = 1024 (0x6400)
// in fp16, 128 (0x4300) in bf16. The zero point sits in a register as c + z, so that one
// subtraction gives the integer q - z, exactly, and an asymmetric weight costs what a symmetric one
// does. Codes of 8 bits exceed bf16's mantissa; they pass through fp32 with c = 2^23, and q - z, of
// at most 256, is exact in the upper half of the result.
#ifndef HF_GPTQ_DECODE_H_
#define HF_GPTQ_DECODE_H_

#include <type_traits>

#include "fragments.h"
#include "hf_gptq.h"
#include "ptx.h"

namespace hf_gptq {

HF_GPTQ_DEVICE constexpr uint32_t magic(Half) { return 0x64006400u; }
HF_GPTQ_DEVICE constexpr uint32_t magic(Bfloat16) { return 0x43004300u; }

// The words of one lane of a tile, in shared or global memory.
template <int Bits>
struct LaneWords {
  uint32_t word[Bits];

  static __device__ __forceinline__ LaneWords load(const uint32_t* tile, int lane) {
    LaneWords words;
    if constexpr (Bits == 4 || Bits == 8) {
      for (int plane = 0; plane < Bits / 4; ++plane) {
        const uint4 four = *reinterpret_cast<const uint4*>(tile + 128 * plane + 4 * lane);
        words.word[4 * plane] = four.x;
        words.word[4 * plane + 1] = four.y;
        words.word[4 * plane + 2] = four.z;
        words.word[4 * plane + 3] = four.w;
      }
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(tile + 2 * lane);
      words.word[0] = two.x;
      words.word[1] = two.y;
      if constexpr (Bits == 3) words.word[2] = tile[64 + lane];
    }
    return words;
  }

  // The same from global memory, of which nothing is read twice.
  static __device__ __forceinline__ LaneWords load_once(const uint32_t* tile, int lane) {
    LaneWords words;
    if constexpr (Bits == 4 || Bits == 8) {
#pragma unroll
      for (int plane = 0; plane < Bits / 4; ++plane) {
        uint32_t four[4];
        hf_gptq::load_once(four, tile + 128 * plane + 4 * lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) words.word[4 * plane + i] = four[i];
      }
    } else {
      uint32_t two[2];
      hf_gptq::load_once(two, tile + 2 * lane);
      words.word[0] = two[0];
      words.word[1] = two[1];
      if constexpr (Bits == 3) {
        uint32_t top[1];
        hf_gptq::load_once(top, tile + 64 + lane);
        words.word[2] = top[0];
      }
    }
    return words;
  }
};

namespace detail {

// Two codes that lie 16 bits apart, as c + q in both halves.
template <class T, int Bits>
HF_GPTQ_DEVICE uint32_t magic_pair(const LaneWords<Bits>& words, int slice, int pair) {
  if constexpr (Bits == 4) {
    return and_or(words.word[slice] >> 4 * pair, 0x000f000fu, magic(T()));
  } else if constexpr (Bits == 8) {
    // fp16 only: bytes 2 (pair % 2) and + 1 become the low bytes of two halves.
    return pick_bytes(words.word[2 * slice + pair / 2], magic(T()), pair % 2 ? 0x7372u : 0x7170u);
  } else {
    const int place = 4 * (slice % 2) + pair;
    uint32_t codes = and_or(words.word[slice / 2] >> 2 * place, 0x00030003u, magic(T()));
    if constexpr (Bits == 3) {
      const int top = 4 * slice + pair;
      const uint32_t moved = top >= 2 ? words.word[2] >> (top - 2) : words.word[2] << (2 - top);
      codes = and_or(moved, 0x00040004u, codes);
    }
    return codes;
  }
}

}  // namespace detail

template <class T, int Bits>
constexpr bool kByFloat = Bits == 8 && std::is_same<T, Bfloat16>::value;

// The register that `decode_slice` subtracts; zero is at most 2^Bits.
template <class T, int Bits>
HF_GPTQ_DEVICE uint32_t zero_register(uint32_t zero) {
  if constexpr (kByFloat<T, Bits>) {
    return 0x4b000000u + zero;  // 2^23 + zero
  } else {
    return magic(T()) + zero * 0x00010001u;
  }
}

// Operand A of slice `slice`: registers 0 and 2 hold rows g (zero point `zero_low`), 1 and 3 rows
// g + 8 (`zero_high`), g = lane / 4.
template <class T, int Bits>
HF_GPTQ_DEVICE void decode_slice(const LaneWords<Bits>& words, int slice, uint32_t zero_low,
                                 uint32_t zero_high, uint32_t (&a)[4]) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const uint32_t zero = pair % 2 ? zero_high : zero_low;
    if constexpr (kByFloat<T, Bits>) {
      const uint32_t word = words.word[2 * slice + pair / 2];
      const float base = bits_to_float(zero);
      const float low = bits_to_float(pick_bytes(word, 0x4b000000u, pair % 2 ? 0x7442u : 0x7440u));
      const float high = bits_to_float(pick_bytes(word, 0x4b000000u, pair % 2 ? 0x7443u : 0x7441u));
      a[pair] = pick_bytes(float_to_bits(low - base), float_to_bits(high - base), 0x7632u);
    } else {
      a[pair] = subtract_halves(detail::magic_pair<T, Bits>(words, slice, pair), zero, T());
    }
  }
}

// Scales and zeros as they come from the checkpoint.

HF_GPTQ_DEVICE float load_scale(const uint32_t* grid, int output, int scale_dtype) {
  if (scale_dtype == HF_GPTQ_FP32) return bits_to_float(grid[output]);
  const uint16_t value = reinterpret_cast<const uint16_t*>(grid)[output];
  return scale_dtype == HF_GPTQ_FP16 ? to_float(value, Half()) : to_float(value, Bfloat16());
}

// The field that begins at bit `shift` of words[0].
template <int Bits>
HF_GPTQ_DEVICE uint32_t load_field(const uint32_t* words, int shift) {
  uint32_t field = words[0] >> shift;
  if (Bits == 3 && shift > 32 - Bits) field |= words[1] << (32 - shift);
  return field & ((1u << Bits) - 1u);
}

// The field of qzeros of output `output` of a warp, whose first field begins at bit `skip`.
template <int Bits>
HF_GPTQ_DEVICE uint32_t load_zero(const uint32_t* words, int output, int skip) {
  const int bit = skip + output * Bits;
  return load_field<Bits>(words + bit / 32, bit % 32);
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_DECODE_H_
