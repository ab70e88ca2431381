// The exported functions: they validate, plan, and call the kernels of the selected instruction
// set.
#include <math.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "dispatch.h"
#include "hf_gptq.h"
#include "layout.h"
#include "parallel.h"
#include "scratch.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed formats are read as little-endian memory"
#endif

#define HF_GPTQ_STRINGIFY_(x) #x
#define HF_GPTQ_STRINGIFY(x) HF_GPTQ_STRINGIFY_(x)
#ifdef __clang__
#define HF_GPTQ_COMPILER "clang"
#else
#define HF_GPTQ_COMPILER "gcc"
#endif

namespace hf_gptq {
namespace {

// What rounds activations to 8 bits, where hf_gptq_set_activations asked for it; else null.
std::atomic<Linear> rounding_linear{nullptr};

bool is_bits(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

bool is_dtype(int dtype) { return dtype >= HF_GPTQ_FP32 && dtype <= HF_GPTQ_BF16; }

bool is_layout(int64_t block_stride, int64_t row_stride, int64_t R, int64_t N) {
  const bool canonical = block_stride == kBlockColumns && row_stride == N;
  const bool blocked = block_stride == kBlockColumns * R && row_stride == kBlockColumns;
  return canonical || blocked;
}

int validate(const hf_gptq_weight* w) {
  if (!w || !w->qweight || !w->scales) return HF_GPTQ_ERROR_NULL_POINTER;
  if (!is_bits(w->bits)) return HF_GPTQ_ERROR_BITS;
  if (!is_dtype(w->scale_dtype)) return HF_GPTQ_ERROR_DTYPE;
  if (w->K < 1 || w->N < 1 || w->G < 1) return HF_GPTQ_ERROR_SHAPE;
  if (!is_layout(w->block_stride, w->row_stride, packed_words(w->K, w->bits), w->N)) {
    return HF_GPTQ_ERROR_LAYOUT;
  }
  if (w->qzeros && w->zero_offset != 0 && w->zero_offset != 1) return HF_GPTQ_ERROR_ZERO_OFFSET;
  if (!w->g_idx) {
    if (w->group_size < 1) return HF_GPTQ_ERROR_SHAPE;
    if ((w->K - 1) / w->group_size >= w->G) return HF_GPTQ_ERROR_GROUP;  // that of the last feature
  }
  return HF_GPTQ_OK;
}

// The groups of K columns, and the diagonal of a [K, K] matrix.
int validate_columns(const int32_t* group, const float* U, int64_t U_row, int64_t K, int64_t G) {
  for (int64_t i = 0; i < K; ++i) {
    if (group[i] < 0 || group[i] >= G) return HF_GPTQ_ERROR_GROUP;
    const float pivot = U[i * U_row + i];
    if (!isfinite(pivot) || pivot == 0.0f) return HF_GPTQ_ERROR_PIVOT;
  }
  return HF_GPTQ_OK;
}

int validate_scales(const float* scales, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!isfinite(scales[i])) return HF_GPTQ_ERROR_SCALE_FINITE;
    if (scales[i] == 0.0f) return HF_GPTQ_ERROR_SCALE_ZERO;
  }
  return HF_GPTQ_OK;
}

int validate_joint(const JointArguments& a, int64_t G) {
  if (!a.values || !a.H || !a.metric || !a.scales || !a.zeros || !a.group || !a.codes) {
    return HF_GPTQ_ERROR_NULL_POINTER;
  }
  if (!is_bits(a.bits)) return HF_GPTQ_ERROR_BITS;
  if (a.N < 1 || a.B < 1 || a.B > kJointColumns || G < 1 || a.part < 1 || a.part > kJointRows ||
      a.H_row < a.B) {
    return HF_GPTQ_ERROR_SHAPE;
  }
  if (const int error = validate_columns(a.group, a.H, a.H_row, a.B, G)) return error;
  for (int64_t first = 0; first < a.N; first += a.part) {
    const int64_t rows = first + a.part < a.N ? a.part : a.N - first;
    const float* metric = a.metric + first * a.part;
    for (int64_t r = 0; r < rows; ++r) {
      const float pivot = metric[r * rows + r];
      if (!isfinite(pivot) || pivot <= 0.0f) return HF_GPTQ_ERROR_PIVOT;
    }
  }
  return validate_scales(a.scales, a.N * G);
}

// Writes the runs of a validated weight to `runs`, or only counts them if `runs` is null.
int find_runs(const hf_gptq_weight& w, Run* runs, int64_t* count) {
  int64_t found = 0;
  if (!w.perm && !w.g_idx) {
    // group_size may exceed K by so much that begin + group_size would overflow.
    const int64_t size = w.group_size < w.K ? w.group_size : w.K;
    for (int64_t begin = 0; begin < w.K; begin += size, ++found) {
      const int64_t end = begin + size < w.K ? begin + size : w.K;
      if (runs) runs[found] = {begin, end, found};
    }
    *count = found;
    return HF_GPTQ_OK;
  }
  int64_t previous = -1;
  for (int64_t i = 0; i < w.K; ++i) {
    const int64_t feature = w.perm ? w.perm[i] : i;
    if (feature < 0 || feature >= w.K) return HF_GPTQ_ERROR_PERM;
    const int64_t group = w.g_idx ? w.g_idx[feature] : feature / w.group_size;
    if (group < 0 || group >= w.G) return HF_GPTQ_ERROR_GROUP;
    if (group != previous) {
      if (runs) runs[found] = {i, i + 1, group};
      ++found;
      previous = group;
    } else if (runs) {
      runs[found - 1].end = i + 1;
    }
  }
  *count = found;
  return HF_GPTQ_OK;
}

// The runs of a weight, for the length of one call.
class RunList {
 public:
  explicit RunList(const hf_gptq_weight& w)
      : error_(find_runs(w, nullptr, &count_)), buffer_(count_ * sizeof(Run)) {
    if (error_ != HF_GPTQ_OK) return;
    if (!buffer_.data()) {
      error_ = HF_GPTQ_ERROR_OUT_OF_MEMORY;
    } else {
      error_ = find_runs(w, static_cast<Run*>(buffer_.data()), &count_);
    }
  }
  int error() const { return error_; }
  Runs runs() const { return {static_cast<const Run*>(buffer_.data()), count_}; }

 private:
  int64_t count_ = 0;
  int error_;
  Buffer buffer_;
};

// Asks for large pages for memory that is about to be written: a product reads it front to back,
// and at the end of a small page the hardware looks no further ahead. Only advice.
void use_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLargePage = uintptr_t{2} << 20;
  if (static_cast<uintptr_t>(bytes) < kLargePage) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

struct RepackArguments {
  const int32_t* src;
  int64_t src_block_stride, src_row_stride;
  int32_t* dst;
  int64_t dst_block_stride, dst_row_stride;
  int64_t R, N;
  const int32_t* perm;  // [K] or null
  int64_t K;
  int bits;
};

// Row perm[i] of the codes of one block becomes row i.
void permute_block(const RepackArguments& a, const int32_t* src, int32_t* dst, int64_t columns) {
  const uint32_t mask = (uint32_t{1} << a.bits) - 1;
  // The low word is written when the next is reached: a code of 3 bits may reach into it.
  uint64_t out[kBlockColumns] = {};
  int64_t word = 0;
  auto write = [&](int64_t r) {
    for (int64_t c = 0; c < columns; ++c) {
      dst[r * a.dst_row_stride + c] = static_cast<int32_t>(static_cast<uint32_t>(out[c]));
      out[c] >>= 32;
    }
  };
  for (int64_t i = 0; i < a.K; ++i) {
    for (; word < code_word(i, a.bits); ++word) write(word);
    const int64_t k = a.perm[i];
    const int shift = code_shift(k, a.bits), place = code_shift(i, a.bits);
    const int32_t* low = src + code_word(k, a.bits) * a.src_row_stride;
    const bool two = shift + a.bits > 32;
    for (int64_t c = 0; c < columns; ++c) {
      uint32_t code = static_cast<uint32_t>(low[c]) >> shift;
      if (two) code |= static_cast<uint32_t>(low[a.src_row_stride + c]) << (32 - shift);
      out[c] |= static_cast<uint64_t>(code & mask) << place;
    }
  }
  for (; word < a.R; ++word) write(word);
}

int repack_blocks(int64_t begin, int64_t end, const void* context) {
  const RepackArguments& a = *static_cast<const RepackArguments*>(context);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t left = a.N - block * kBlockColumns;
    const int64_t columns = left < kBlockColumns ? left : kBlockColumns;
    // A row stride of 16 is blocked, or canonical with N = 16 where there is no padding.
    const int64_t padding = a.dst_row_stride == kBlockColumns ? kBlockColumns - columns : 0;
    const int32_t* src =
        a.src + word_index(0, block * kBlockColumns, a.src_block_stride, a.src_row_stride);
    int32_t* dst =
        a.dst + word_index(0, block * kBlockColumns, a.dst_block_stride, a.dst_row_stride);
    if (a.perm) permute_block(a, src, dst, columns);
    for (int64_t r = 0; r < a.R; ++r) {
      if (!a.perm) memcpy(dst, src, columns * sizeof(int32_t));
      memset(dst + columns, 0, padding * sizeof(int32_t));
      src += a.src_row_stride;
      dst += a.dst_row_stride;
    }
  }
  return HF_GPTQ_OK;
}

}  // namespace
}  // namespace hf_gptq

using namespace hf_gptq;

extern "C" {

int32_t hf_gptq_abi_version(void) { return HF_GPTQ_ABI_VERSION; }

const char* hf_gptq_error_string(int error) {
  switch (error) {
    case HF_GPTQ_OK:
      return "ok";
    case HF_GPTQ_ERROR_NULL_POINTER:
      return "a required pointer is NULL";
    case HF_GPTQ_ERROR_BITS:
      return "bits must be 2, 3, 4 or 8";
    case HF_GPTQ_ERROR_DTYPE:
      return "dtype must be 0 (fp32), 1 (fp16) or 2 (bf16)";
    case HF_GPTQ_ERROR_SHAPE:
      return "a dimension, stride, group_size, blocksize, rounds, scale or zero_min is out of "
             "range";
    case HF_GPTQ_ERROR_LAYOUT:
      return "block_stride and row_stride must be (16, N) for the canonical layout or (16 * R, 16) "
             "for the blocked one; attention's q, k and v must be aligned";
    case HF_GPTQ_ERROR_ZERO_OFFSET:
      return "zero_offset must be 1 (format v1) or 0 (format v2)";
    case HF_GPTQ_ERROR_GROUP:
      return "a group index is outside [0, G), or the groups do not cover [0, K)";
    case HF_GPTQ_ERROR_PERM:
      return "an entry of perm is outside [0, K)";
    case HF_GPTQ_ERROR_OUT_OF_MEMORY:
      return "scratch memory could not be allocated";
    case HF_GPTQ_ERROR_PARALLEL_FOR:
      return "the registered parallel_for failed";
    case HF_GPTQ_ERROR_SCALE_ZERO:
      return "a scale is zero";
    case HF_GPTQ_ERROR_SCALE_FINITE:
      return "a scale is infinite or NaN";
    case HF_GPTQ_ERROR_PIVOT:
      return "a diagonal element of U or V is zero, infinite or NaN, or one of H or M is not "
             "positive and finite";
    case HF_GPTQ_ERROR_NOT_POSITIVE_DEFINITE:
      return "the matrix is not positive definite";
    case HF_GPTQ_ERROR_TORCH:
      return "libtorch is older than 2.13 or refused the op";
    case HF_GPTQ_ERROR_MODE:
      return "mode must be 0 (store), 1 (add) or 2 (add, symmetric)";
    case HF_GPTQ_ERROR_ACTIVATIONS:
      return "activations must be 0 (exact) or 1 (int8), and int8 needs AVX-512 "
             "with VNNI in use";
    default:
      return "unknown error code";
  }
}

const char* hf_gptq_build_info(void) {
  // clang-format off
  return "abi=" HF_GPTQ_STRINGIFY(HF_GPTQ_ABI_VERSION)
         ",compiler=" HF_GPTQ_COMPILER
#ifdef __clang__
         ",version=" HF_GPTQ_STRINGIFY(__clang_major__) "." HF_GPTQ_STRINGIFY(__clang_minor__)
         "." HF_GPTQ_STRINGIFY(__clang_patchlevel__)
#else
         ",version=" HF_GPTQ_STRINGIFY(__GNUC__) "." HF_GPTQ_STRINGIFY(__GNUC_MINOR__)
         "." HF_GPTQ_STRINGIFY(__GNUC_PATCHLEVEL__)
#endif
         ",isa=" HF_GPTQ_ISA_LIST
         ",sanitize=" HF_GPTQ_STRINGIFY(HF_GPTQ_SANITIZED);
  // clang-format on
}

const char* hf_gptq_cpu_isa(void) { return dispatch().kernels->isa; }

const char* hf_gptq_cpu_isa_error(void) { return dispatch().error; }

void hf_gptq_set_parallel_for(hf_gptq_parallel_for_t parallel_for) {
  set_parallel_for(parallel_for);
}

int hf_gptq_set_activations(int32_t activations) {
  const bool int8 = activations == HF_GPTQ_ACTIVATIONS_INT8;
  if (!int8 && activations != HF_GPTQ_ACTIVATIONS_EXACT) return HF_GPTQ_ERROR_ACTIVATIONS;
  if (int8 && !dispatch().linear_int8) return HF_GPTQ_ERROR_ACTIVATIONS;
  rounding_linear.store(int8 ? dispatch().linear_int8 : nullptr);
  return HF_GPTQ_OK;
}

int32_t hf_gptq_activations(void) {
  return rounding_linear.load() ? HF_GPTQ_ACTIVATIONS_INT8 : HF_GPTQ_ACTIVATIONS_EXACT;
}

int hf_gptq_linear(const hf_gptq_weight* weight, const void* x, int32_t x_dtype, int64_t M,
                   int64_t x_row_stride, const void* bias, void* y) {
  if (const int error = validate(weight)) return error;
  if (!is_dtype(x_dtype)) return HF_GPTQ_ERROR_DTYPE;
  if (M < 0) return HF_GPTQ_ERROR_SHAPE;
  if (M == 0) return HF_GPTQ_OK;
  if (!x || !y) return HF_GPTQ_ERROR_NULL_POINTER;
  const RunList list(*weight);
  if (list.error()) return list.error();
  const Linear int8 = rounding_linear.load(std::memory_order_relaxed);
  const Linear linear = int8 ? int8 : dispatch().kernels->linear;
  return linear({*weight, list.runs(), x, x_dtype, M, x_row_stride, bias, y});
}

int hf_gptq_dequantize(const hf_gptq_weight* weight, void* out, int32_t out_dtype,
                       int64_t out_row_stride) {
  if (const int error = validate(weight)) return error;
  if (!is_dtype(out_dtype)) return HF_GPTQ_ERROR_DTYPE;
  if (!out) return HF_GPTQ_ERROR_NULL_POINTER;
  if (out_row_stride < weight->K) return HF_GPTQ_ERROR_SHAPE;
  const RunList list(*weight);
  if (list.error()) return list.error();
  return dispatch().kernels->dequantize({*weight, list.runs(), out, out_dtype, out_row_stride});
}

int hf_gptq_linear_transposed(const hf_gptq_weight* weight, const void* x, int32_t x_dtype,
                              int64_t M, int64_t x_row_stride, void* y) {
  if (const int error = validate(weight)) return error;
  if (!is_dtype(x_dtype)) return HF_GPTQ_ERROR_DTYPE;
  if (M < 0) return HF_GPTQ_ERROR_SHAPE;
  if (M == 0) return HF_GPTQ_OK;
  if (!x || !y) return HF_GPTQ_ERROR_NULL_POINTER;
  const RunList list(*weight);
  if (list.error()) return list.error();
  return dispatch().kernels->transposed({*weight, list.runs(), x, x_dtype, M, x_row_stride, y});
}

int hf_gptq_repack(const int32_t* src, int64_t src_block_stride, int64_t src_row_stride,
                   int32_t* dst, int64_t dst_block_stride, int64_t dst_row_stride, int64_t R,
                   int64_t N, const int32_t* perm, int64_t K, int32_t bits) {
  if (!src || !dst) return HF_GPTQ_ERROR_NULL_POINTER;
  if (R < 1 || N < 1) return HF_GPTQ_ERROR_SHAPE;
  if (perm) {
    if (!is_bits(bits)) return HF_GPTQ_ERROR_BITS;
    if (K < 1 || R != packed_words(K, bits)) return HF_GPTQ_ERROR_SHAPE;
    for (int64_t i = 0; i < K; ++i) {
      if (perm[i] < 0 || perm[i] >= K) return HF_GPTQ_ERROR_PERM;
    }
  }
  if (!is_layout(src_block_stride, src_row_stride, R, N) ||
      !is_layout(dst_block_stride, dst_row_stride, R, N)) {
    return HF_GPTQ_ERROR_LAYOUT;
  }
  if (dst_row_stride == kBlockColumns) {
    use_large_pages(dst, column_blocks(N) * R * kBlockColumns * sizeof(int32_t));
  }
  const RepackArguments arguments{
      src, src_block_stride, src_row_stride, dst, dst_block_stride, dst_row_stride, R, N, perm, K,
      bits};
  // About 64 KiB of words per range: below that a thread costs more than the copy.
  return parallel_for(column_blocks(N), perm ? 1 : ceil_div(1024, R), repack_blocks, &arguments);
}

int hf_gptq_solve(float* W, const float* U, const float* scales, const float* zeros,
                  const int32_t* group, uint8_t* codes, double* loss, int64_t N, int64_t K,
                  int64_t G, int32_t bits, int64_t blocksize) {
  if (!W || !U || !scales || !zeros || !group || !codes) return HF_GPTQ_ERROR_NULL_POINTER;
  if (!is_bits(bits)) return HF_GPTQ_ERROR_BITS;
  if (N < 1 || K < 1 || G < 1 || blocksize < 1) return HF_GPTQ_ERROR_SHAPE;
  if (const int error = validate_columns(group, U, K, K, G)) return error;
  if (const int error = validate_scales(scales, N * G)) return error;
  return dispatch().kernels->solve(
      {W, U, scales, zeros, group, codes, loss, N, K, G, bits, blocksize});
}

int hf_gptq_scale_search(const float* W, const float* h, const int32_t* group_start, int64_t N,
                         int64_t K, int64_t G, int32_t bits, int32_t sym, const float* shrink,
                         int64_t T, int32_t scale_dtype, float* scales, float* zeros,
                         int32_t zero_min) {
  if (!W || !h || !group_start || !shrink || !scales || !zeros) return HF_GPTQ_ERROR_NULL_POINTER;
  if (!is_bits(bits)) return HF_GPTQ_ERROR_BITS;
  if (!is_dtype(scale_dtype)) return HF_GPTQ_ERROR_DTYPE;
  if (N < 1 || K < 1 || G < 1 || T < 1 || (!sym && zero_min != 0 && zero_min != 1)) {
    return HF_GPTQ_ERROR_SHAPE;
  }
  if (group_start[0] != 0 || group_start[G] != K) return HF_GPTQ_ERROR_GROUP;
  for (int64_t g = 0; g < G; ++g) {
    if (group_start[g] > group_start[g + 1]) return HF_GPTQ_ERROR_GROUP;
  }
  return dispatch().kernels->scale_search({W, h, group_start, N, K, G, bits, sym != 0, shrink, T,
                                           scale_dtype, scales, zeros, zero_min});
}

int hf_gptq_matmul(const void* A, int64_t a_row_stride, int64_t a_column_stride, const void* B,
                   int64_t b_row_stride, int64_t b_column_stride, int64_t M, int64_t N, int64_t K,
                   int32_t dtype, float* C, int64_t c_row_stride, int32_t mode) {
  const bool symmetric = mode == HF_GPTQ_MATMUL_ADD_SYMMETRIC;
  if (mode < HF_GPTQ_MATMUL_STORE || mode > HF_GPTQ_MATMUL_ADD_SYMMETRIC) return HF_GPTQ_ERROR_MODE;
  if (dtype != HF_GPTQ_FP32 && dtype != HF_GPTQ_BF16) return HF_GPTQ_ERROR_DTYPE;
  if (M < 0 || N < 0 || K < 0 || c_row_stride < N || (symmetric && M != N)) {
    return HF_GPTQ_ERROR_SHAPE;
  }
  if (M == 0 || N == 0) return HF_GPTQ_OK;
  if (!C || (K > 0 && (!A || !B))) return HF_GPTQ_ERROR_NULL_POINTER;
  const bool bf16 = dtype == HF_GPTQ_BF16;
  return dispatch().kernels->matmul({A, a_row_stride, a_column_stride, B, b_row_stride,
                                     b_column_stride, M, N, bf16 ? (K + 1) / 2 : K, C, c_row_stride,
                                     mode != HF_GPTQ_MATMUL_STORE, symmetric, symmetric,
                                     bf16 ? K : 0});
}

int hf_gptq_attention(const uint16_t* q, int64_t q_head, int64_t q_row, const uint16_t* k,
                      int64_t k_head, int64_t k_row, const uint16_t* v, int64_t v_head,
                      int64_t v_row, uint16_t* out, int64_t out_head, int64_t out_row,
                      int64_t heads, int64_t repeats, int64_t Tq, int64_t Tk, int64_t D,
                      float scale, int32_t causal) {
  const bool odd = (q_head | q_row | k_head | k_row | D) & 1;
  if (heads < 0 || repeats < 1 || heads % repeats || Tq < 1 || Tk < 1 || D < 2 || odd ||
      !(scale > 0.0f && scale <= 3.4e38f)) {
    return HF_GPTQ_ERROR_SHAPE;
  }
  if (heads == 0) return HF_GPTQ_OK;
  if (!q || !k || !v || !out) return HF_GPTQ_ERROR_NULL_POINTER;
  if ((reinterpret_cast<uintptr_t>(q) | reinterpret_cast<uintptr_t>(k)) % 4) {
    return HF_GPTQ_ERROR_LAYOUT;
  }
  return dispatch().kernels->attention({q, q_head, q_row, k, k_head, k_row, v, v_head, v_row, out,
                                        out_head, out_row, heads, repeats, Tq, Tk, D, scale,
                                        causal != 0});
}

int hf_gptq_factorize(const float* H, int64_t K, float* U) {
  if (!H || !U) return HF_GPTQ_ERROR_NULL_POINTER;
  if (K < 1) return HF_GPTQ_ERROR_SHAPE;
  return dispatch().kernels->factorize({H, K, U});
}

int hf_gptq_solve_symmetric(double* A, double* b, int64_t count, int64_t G) {
  if (count < 0 || G < 1) return HF_GPTQ_ERROR_SHAPE;
  if (count == 0) return HF_GPTQ_OK;
  if (!A || !b) return HF_GPTQ_ERROR_NULL_POINTER;
  return dispatch().kernels->solve_symmetric({A, b, count, G});
}

int hf_gptq_descend(const float* W, const float* H, const float* scales, const float* zeros,
                    const int32_t* group, uint8_t* codes, double* loss, int64_t N, int64_t K,
                    int64_t G, int32_t bits, int64_t rounds) {
  if (!W || !H || !scales || !zeros || !group || !codes) return HF_GPTQ_ERROR_NULL_POINTER;
  if (!is_bits(bits)) return HF_GPTQ_ERROR_BITS;
  if (N < 1 || K < 1 || G < 1 || rounds < 0) return HF_GPTQ_ERROR_SHAPE;
  if (const int error = validate_columns(group, H, K, K, G)) return error;
  for (int64_t k = 0; k < K; ++k) {
    if (H[k * K + k] < 0.0f) return HF_GPTQ_ERROR_PIVOT;
  }
  if (const int error = validate_scales(scales, N * G)) return error;
  return dispatch().kernels->descend(
      {W, H, scales, zeros, group, codes, loss, N, K, G, bits, rounds});
}

int hf_gptq_joint_solve(float* W, const float* U, int64_t U_row, const float* V,
                        const float* scales, const float* zeros, const int32_t* group,
                        uint8_t* codes, int64_t N, int64_t B, int64_t G, int64_t part,
                        int32_t bits) {
  const JointArguments arguments{W,     U,       U_row, V, scales, zeros, group,
                                 codes, nullptr, N,     B, part,   bits};
  if (const int error = validate_joint(arguments, G)) return error;
  return dispatch().kernels->joint(arguments);
}

int hf_gptq_joint_descend(float* R, const float* H, int64_t H_row, const float* M,
                          const float* scales, const float* zeros, const int32_t* group,
                          uint8_t* codes, float* changes, int64_t N, int64_t B, int64_t G,
                          int64_t part, int32_t bits) {
  const JointArguments arguments{R,     H,       H_row, M, scales, zeros, group,
                                 codes, changes, N,     B, part,   bits};
  if (!changes) return HF_GPTQ_ERROR_NULL_POINTER;
  if (const int error = validate_joint(arguments, G)) return error;
  for (int64_t c = 0; c < B; ++c) {
    if (H[c * H_row + c] < 0.0f) return HF_GPTQ_ERROR_PIVOT;
  }
  return dispatch().kernels->joint(arguments);
}

}  // extern "C"
