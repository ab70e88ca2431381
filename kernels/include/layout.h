// Layout arithmetic shared by the CPU and the CUDA kernels, so that a word has one address formula.
//
// The codes of column n form one little-endian bit stream over k, cut into 32-bit words:
//
//   bit      0    b    2b   3b            32
//            | k=0| k=1| k=2|  ...        |  ...          b = bits per code
//   word     |<------- r = 0 ------------>|<-- r = 1 --
//
// With 3 bits a code may straddle two words (k = 10: bits 30..32). The R words of the N columns are
// stored in one of two orders:
//
//   canonical  word (r, n) at  r * N + n
//   blocked    word (r, n) at  ((n / 16) * R + r) * 16 + n % 16,  ceil(N / 16) * 16 columns,
//   padding 0
//
// Both are  (n / 16) * block_stride + r * row_stride + n % 16  with
// (block_stride, row_stride) = (16, N) or (16 * R, 16).
//
// Every function has internal linkage: translation units compiled for different instruction sets
// must not share one copy.
#ifndef HF_GPTQ_LAYOUT_H_
#define HF_GPTQ_LAYOUT_H_

#include <stdint.h>

#ifdef __CUDACC__
#define HF_GPTQ_HD __host__ __device__
#else
#define HF_GPTQ_HD
#endif

namespace hf_gptq {

// Columns of one block: one 64-byte cache line of words.
constexpr int64_t kBlockColumns = 16;

HF_GPTQ_HD static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Words that hold `count` codes: R for a column (count = K), and the width of a row of qzeros
// (count = N).
HF_GPTQ_HD static constexpr int64_t packed_words(int64_t count, int bits) {
  return ceil_div(count * bits, 32);
}

HF_GPTQ_HD static constexpr int64_t code_word(int64_t k, int bits) { return k * bits / 32; }

HF_GPTQ_HD static constexpr int code_shift(int64_t k, int bits) {
  return static_cast<int>(k * bits % 32);
}

HF_GPTQ_HD static constexpr int64_t column_blocks(int64_t N) { return ceil_div(N, kBlockColumns); }

HF_GPTQ_HD static constexpr int64_t word_index(int64_t r, int64_t n, int64_t block_stride,
                                               int64_t row_stride) {
  return n / kBlockColumns * block_stride + r * row_stride + n % kBlockColumns;
}

// Codes after which the stream is at a word boundary again.
HF_GPTQ_HD static constexpr int codes_per_unit(int bits) { return bits == 3 ? 32 : 32 / bits; }

HF_GPTQ_HD static constexpr int words_per_unit(int bits) {
  return codes_per_unit(bits) * bits / 32;
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_LAYOUT_H_
