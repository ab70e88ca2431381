// C ABI of libhf_gptq: GPTQ-quantized linear layers and the GPTQ solver on the CPU.
//
// Conventions
//   * Every function that can fail returns 0 or a positive hf_gptq_error; nothing throws.
//   * Arrays are row-major and contiguous unless a stride is an argument. Pointers need only the
//     alignment of their element. Outputs must not overlap inputs.
//   * Functions are thread-safe. Work runs on the calling thread, or on the loop given to
//     hf_gptq_set_parallel_for; results never depend on the number of threads.
//   * Floating point is IEEE 754 in the default rounding mode. The library never changes the
//     rounding mode or the flush-to-zero flags of a thread.
#ifndef HF_GPTQ_H_
#define HF_GPTQ_H_

#include <stdint.h>

#if defined(__GNUC__)
#define HF_GPTQ_API __attribute__((visibility("default")))
#else
#define HF_GPTQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define HF_GPTQ_ABI_VERSION 9

enum hf_gptq_dtype {
  HF_GPTQ_FP32 = 0,
  HF_GPTQ_FP16 = 1,
  HF_GPTQ_BF16 = 2,
};

// What hf_gptq_matmul does with C.
enum hf_gptq_matmul_mode {
  HF_GPTQ_MATMUL_STORE = 0,          // C = A B
  HF_GPTQ_MATMUL_ADD = 1,            // C += A B
  HF_GPTQ_MATMUL_ADD_SYMMETRIC = 2,  // C += A B, where C and A B are known to be symmetric, M = N:
                                     // only what is on and below the diagonal is read and
                                     // computed, then mirrored above it. C is exactly symmetric,
                                     // for about half the work
};

// What hf_gptq_linear does with activations.
enum hf_gptq_activations {
  HF_GPTQ_ACTIVATIONS_EXACT = 0,  // takes them as they are
  HF_GPTQ_ACTIVATIONS_INT8 = 1,   // rounds them to 8 bits
};

enum hf_gptq_error {
  HF_GPTQ_OK = 0,
  HF_GPTQ_ERROR_NULL_POINTER = 1,   // a required pointer is NULL
  HF_GPTQ_ERROR_BITS = 2,           // bits is not 2, 3, 4 or 8
  HF_GPTQ_ERROR_DTYPE = 3,          // a dtype is not an hf_gptq_dtype
  HF_GPTQ_ERROR_SHAPE = 4,          // a dimension, stride, group_size, blocksize, rounds, scale
                                    // or zero_min is out of range
  HF_GPTQ_ERROR_LAYOUT = 5,         // the strides are neither canonical nor blocked; attention: 4
                                    // does not divide an address
  HF_GPTQ_ERROR_ZERO_OFFSET = 6,    // zero_offset is not 0 or 1
  HF_GPTQ_ERROR_GROUP = 7,          // a group index is outside [0, G), or group_start is not a
                                    // non-decreasing sequence from 0 to K
  HF_GPTQ_ERROR_PERM = 8,           // an entry of perm is outside [0, K)
  HF_GPTQ_ERROR_OUT_OF_MEMORY = 9,  // scratch memory could not be allocated
  HF_GPTQ_ERROR_PARALLEL_FOR = 10,  // the registered parallel_for returned non-zero
  HF_GPTQ_ERROR_SCALE_ZERO = 11,    // solve, descend: a scale is zero
  HF_GPTQ_ERROR_SCALE_FINITE = 12,  // solve, descend: a scale is infinite or NaN
  HF_GPTQ_ERROR_PIVOT = 13,         // solve: a diagonal element of U is zero, infinite or NaN;
                                    // descend, joint: one of H, M or V is not positive and finite
  HF_GPTQ_ERROR_NOT_POSITIVE_DEFINITE = 14,  // factorize: H is not, or not in fp32
  HF_GPTQ_ERROR_MODE = 15,                   // matmul: mode is not an hf_gptq_matmul_mode
  HF_GPTQ_ERROR_TORCH = 16,                  // register_torch_op: libtorch lacks a function (older
                                             // than 2.13) or refused the op
  HF_GPTQ_ERROR_ACTIVATIONS = 17,            // set_activations: not an hf_gptq_activations, or
                                             // one that the instruction set in use has no product
                                             // for
};

// A quantized weight matrix of N outputs and K inputs:
//
//   weight[n, feature(i)] = (code[i, n] - zero[g, n]) * scale[g, n],  i = 0 .. K-1
//   feature(i) = perm ? perm[i] : i
//   g          = g_idx ? g_idx[feature(i)] : feature(i) / group_size
//
// The kernels walk i upwards in runs of equal g. With rows sorted by group a run is a whole group;
// in any other order the result is right and the speed is lost.
typedef struct hf_gptq_weight {
  const int32_t* qweight;  // codes, R = ceil(K * bits / 32) words per column; see layout.h
  int64_t block_stride;    // words: 16 (canonical) or 16 * R (blocked)
  int64_t row_stride;      // words: N (canonical) or 16 (blocked)
  const void* scales;      // [G, N], scale_dtype
  const int32_t* qzeros;   // [G, ceil(N * bits / 32)], codes along n packed as in layout.h:
                           // zero = field + zero_offset, not masked (15 + 1 = 16).
                           // NULL: every zero is 2^(bits-1)
  const int32_t* g_idx;    // [K] group of each input feature, or NULL: feature / group_size
  const int32_t* perm;     // [K] input feature held by each row of codes, a permutation, or NULL
  int64_t K;               // input features, >= 1
  int64_t N;               // output features, >= 1
  int64_t G;               // groups, >= 1; without g_idx at least ceil(K / group_size)
  int64_t group_size;      // >= 1; read only if g_idx is NULL. The last group may be ragged
  int32_t bits;            // 2, 3, 4 or 8
  int32_t scale_dtype;     // hf_gptq_dtype
  int32_t zero_offset;     // 1 for checkpoint format v1, 0 for v2; read only with qzeros
  int32_t reserved;        // 0
} hf_gptq_weight;

// The version of this header. A caller refuses a library whose version differs from its own.
HF_GPTQ_API int32_t hf_gptq_abi_version(void);

// Static text for an error code; never NULL.
HF_GPTQ_API const char* hf_gptq_error_string(int error);

// "abi=3,compiler=gcc,version=12.2.0,isa=avx512f+avx2+portable,sanitize=0".
HF_GPTQ_API const char* hf_gptq_build_info(void);

// The instruction set in use: "avx512bf16", "avx512f", "avx2" (with FMA and F16C) or "portable". It
// is the best one that was compiled in and that this CPU has, or the one named by the environment
// variable HF_GPTQ_ISA; "amx" (AMX-BF16 beside "avx512bf16", Linux) is taken where it is named
// only. The choice is made once, at the first call that needs it.
HF_GPTQ_API const char* hf_gptq_cpu_isa(void);

// NULL, or why the value of HF_GPTQ_ISA could not be honoured and the best one is used instead.
HF_GPTQ_API const char* hf_gptq_cpu_isa_error(void);

// The loop that runs fn(b, e, ctx) over disjoint ranges that cover [begin, end), on any threads,
// and returns 0 when all are done. It has the signature of libtorch's torch_parallel_for.
typedef int (*hf_gptq_parallel_for_t)(int64_t begin, int64_t end, int64_t grain,
                                      void (*fn)(int64_t, int64_t, void*), void* ctx);

// Sets the loop for the whole process; NULL (the initial state) runs on the calling thread.
HF_GPTQ_API void hf_gptq_set_parallel_for(hf_gptq_parallel_for_t parallel_for);

// The address of a function that libtorch exports, or NULL.
typedef void* (*hf_gptq_lookup_t)(const char* name);

// Makes hf_gptq_linear the op hf_gptq::linear of the loaded libtorch for tensors on the CPU, for
// the rest of the process. Python has defined the op, and hf_gptq::linear_checked of the same
// schema, which is called with what hf_gptq_linear does not take as it lies, and raises where
// something is wrong: (Tensor x, Tensor? bias, Tensor qweight, Tensor scales, Tensor? qzeros,
// Tensor? g_idx, Tensor? perm, int bits, int group_size, int zero_offset) -> Tensor.
HF_GPTQ_API int hf_gptq_register_torch_op(hf_gptq_lookup_t lookup);

// Sets what hf_gptq_linear does with activations, for the whole process; exact at first. With int8,
// for which the processor must have AVX-512 with VNNI ("amx", "avx512bf16" or "avx512f" in use),
// activations of every type are rounded to 8 bits, which is faster where many rows are multiplied.
// Other functions stay as they are.
HF_GPTQ_API int hf_gptq_set_activations(int32_t activations);

// What was set, an hf_gptq_activations.
HF_GPTQ_API int32_t hf_gptq_activations(void);

// y = x @ weight^T + bias.
//
// x converts exactly to fp32; in fp32, for each (m, n):
//   total = 0
//   for each run:  sum = 0;  for each i of the run, upwards:  sum = fma(x, code - zero, sum)
//                  total = fma(sum, scale, total)
//   y = round_to_nearest_even(total + bias)
// avx512f and, for fp32 activations, avx2 give the same bits; "portable" rounds product and sum of
// each fma separately.
//
// "avx2" takes bf16 and fp16 activations as integers. A run is cut into parts of 256 codes, counted
// from the beginning of its first unit (below). For each part, with e the least integer >= -126 for
// which every |x| < 2^(e + 15):
//   high = rint(x / 2^e);  low = rint((x / 2^e - high) * 2^15)
//   if 4 * (sum of |low|) <= sum of |high|:  low = 0
//   sum = fma(fp32(sum of low * (code - zero)), 2^-15, fp32(sum of high * (code - zero))) * 2^e
//   total = fma(sum, scale, total)
// The sums of integers are exact. x is exact down to 2^-22 of the largest of its part, bf16 being 8
// bits wide, but for what makes up less than 2^-17 of the part in all. A part that holds infinities
// is the sum of their signs * (code - zero), times infinity; one that holds a NaN is NaN.
//
// "avx512bf16" takes bf16 activations two at a time; a code - zero is exact in bf16 too. With a
// unit of U codes, 16, 32, 8, 4 for 2, 3, 4, 8 bits, the sum of a run is
//   for each unit u of codes u * U .. u * U + U - 1 that holds codes of the run, upwards:
//     for j = 0 .. U/2 - 1:  with i = u * U + j:
//       sum = fma(x of i + U/2, code - zero, sum);  sum = fma(x of i, code - zero, sum)
// where x is 0 for codes that are not the run's, and the fma takes subnormal numbers for zero and
// rounds subnormal results to zero. Here and with "avx2", a weight whose runs divide units so often
// that there are more than K pairs is computed as by avx512f; that does not depend on x.
//
// "amx" cuts a run into parts of 256 codes, counted from the beginning of its first unit. The pairs
// of a part, in the order of "avx512bf16", are taken by sixteens, the last of which may be fewer:
//   for each sixteen:  lower = upper = 0
//     for each pair:  lower = fma(x of i, code - zero, lower)
//                     upper = fma(x of i + U/2, code - zero, upper)
//     sum = sum + (lower + upper)
//   total = fma(sum, scale, total)
// where all but the last takes subnormal numbers for zero and rounds subnormal results to zero. A
// weight whose parts are so short that there would be more than K pairs in whole sixteens is
// computed as by avx512bf16.
//
// With HF_GPTQ_ACTIVATIONS_INT8, x converts exactly to fp32, and a run is cut into parts of 256
// codes, counted from the beginning of its first unit. For each part, with m the largest |x|:
//   q = rint(x * fp32(127 / m));  0 if m < 2^-119
//   sum = fp32(sum of q * (code - zero)) * fp32(m / 127);  total = fma(sum, scale, total)
// The sums of integers are exact. Infinities and NaN as with "avx2". A weight for which more than
// 2 K codes would be multiplied is computed as with HF_GPTQ_ACTIVATIONS_EXACT.
//
// A row of y has the same bits whatever M is and whatever the other rows are (payloads of NaN
// excepted).
HF_GPTQ_API int hf_gptq_linear(const hf_gptq_weight* weight,
                               const void* x,         // [M, K], x_dtype, rows x_row_stride apart
                               int32_t x_dtype,       // hf_gptq_dtype of x, bias and y
                               int64_t M,             // >= 0
                               int64_t x_row_stride,  // elements
                               const void* bias,      // [N], x_dtype, or NULL
                               void* y);              // out [M, N], x_dtype

// y = x @ weight, for gradients by the activations: in fp32, the products of the dense weight as
// hf_gptq_dequantize rounds it to fp32, summed over n as hf_gptq_matmul sums over its k; y rounded
// to nearest even. "avx512bf16" rounds the dense weight to bf16 where x is, and sums pairs; it
// takes subnormal numbers for zero; "amx" sums these by sixteens as above. A row of y has the same
// bits whatever M is and whatever the other rows are.
HF_GPTQ_API int hf_gptq_linear_transposed(const hf_gptq_weight* weight,
                                          const void* x,         // [M, N], rows x_row_stride apart
                                          int32_t x_dtype,       // hf_gptq_dtype of x and y
                                          int64_t M,             // >= 0
                                          int64_t x_row_stride,  // elements
                                          void* y);              // out [M, K], x_dtype

// out[n, feature(i)] = round_to_nearest_even(fp32(code - zero) * fp32(scale)).
HF_GPTQ_API int hf_gptq_dequantize(const hf_gptq_weight* weight,
                                   void* out,                // out [N, K], out_dtype
                                   int32_t out_dtype,        // hf_gptq_dtype
                                   int64_t out_row_stride);  // elements, >= K

// Copies R x N words between the canonical and the blocked layout, either way; the padding columns
// of a blocked dst become 0. With perm, code i of each column of dst is code perm[i] of src.
HF_GPTQ_API int hf_gptq_repack(const int32_t* src,        // words, see layout.h
                               int64_t src_block_stride,  // 16 or 16 * R
                               int64_t src_row_stride,    // N or 16
                               int32_t* dst,              // out, words
                               int64_t dst_block_stride,  // 16 or 16 * R
                               int64_t dst_row_stride,    // N or 16
                               int64_t R, int64_t N,      // >= 1
                               const int32_t* perm,       // [K], entries in [0, K), or NULL
                               int64_t K,                 // >= 1 with R = ceil(K * bits / 32);
                               int32_t bits);             // K and bits are read only with perm

// C = A B or C += A B in fp32, transposes being a matter of strides. For each (m, n), as avx512f
// and avx2 do it:
//
//   C[m, n] = 0                                                  if C is not added to
//   for k0 = 0, 256, 512, .. below K:
//     sum = 0;  for k = k0 .. min(k0 + 256, K) - 1:  sum = fma(A[m, k], B[k, n], sum)
//     C[m, n] += sum
//
// "portable" rounds product and sum of each fma separately. An element of C has the same bits
// whatever M, N, the strides and the number of threads are.
//
// In bf16 numbers are taken in pairs, k = 2 i and 2 i + 1, each for one k above, so that a sum is
// of 512 products: that of the odd k is added first, then that of the even; a number that is
// missing is 0. Products of bf16 are exact in fp32. "avx512bf16" treats subnormal numbers as zero.
HF_GPTQ_API int hf_gptq_matmul(const void* A,            // [M, K]
                               int64_t a_row_stride,     // elements from A[m, k] to A[m + 1, k]
                               int64_t a_column_stride,  // elements from A[m, k] to A[m, k + 1]
                               const void* B,            // [K, N]
                               int64_t b_row_stride,     // elements
                               int64_t b_column_stride,  // elements
                               int64_t M, int64_t N, int64_t K,  // >= 0
                               int32_t dtype,         // of A and B: HF_GPTQ_FP32 or HF_GPTQ_BF16
                               float* C,              // [M, N], see hf_gptq_matmul_mode
                               int64_t c_row_stride,  // elements, >= N
                               int32_t mode);         // hf_gptq_matmul_mode

// Softmax attention in bf16, out = softmax(scale * q k^T) v head by head. q and k are read in pairs
// of numbers, whose addresses 4 must divide. Scores are fp32 sums of exact products; powers and
// what they weigh are fp32, rounded once in the end. A query has the same bits whatever the other
// queries are, and the keys and values that it does not see, as long as those are finite.
HF_GPTQ_API int hf_gptq_attention(const uint16_t* q,                            // [heads, Tq, D]
                                  int64_t q_head_stride, int64_t q_row_stride,  // elements, even
                                  const uint16_t* k,  // [heads / repeats, Tk, D]
                                  int64_t k_head_stride, int64_t k_row_stride,  // elements, even
                                  const uint16_t* v,                            // as k
                                  int64_t v_head_stride, int64_t v_row_stride,  // elements
                                  uint16_t* out,                                // as q
                                  int64_t out_head_stride, int64_t out_row_stride,  // elements
                                  int64_t heads, int64_t repeats,     // heads of q per head of k
                                  int64_t Tq, int64_t Tk, int64_t D,  // >= 1; D even
                                  float scale,                        // positive and finite
                                  int32_t causal);  // query i sees keys 0 .. i only

// The upper triangular U with H^-1 = U^T U, in fp32: H = R R^T with R upper triangular, U = R^-1.
//
// Rows are finished from the last to the first, in blocks of 192 and in them in groups of 12. An
// element receives what each block below it contributes as one sum, as in hf_gptq_matmul; then the
// groups below it in its own block as one sum; then the rows below it in its group, one by one.
// avx512f and avx2 give the same bits; "portable" rounds product and sum of each fma separately.
// U may be H itself. HF_GPTQ_ERROR_NOT_POSITIVE_DEFINITE leaves U undefined.
HF_GPTQ_API int hf_gptq_factorize(const float* H,  // [K, K]; above the diagonal never read
                                  int64_t K,       // >= 1
                                  float* U);       // out [K, K], zeros below the diagonal

// Solves `count` symmetric systems A x = b in fp64, each by itself: Gaussian elimination without
// pivoting, every operation rounded by itself, the same bits for every instruction set. A system
// that has a zero pivot gives infinities or NaN.
HF_GPTQ_API int hf_gptq_solve_symmetric(double* A,  // [count, G, G], destroyed; below the diagonal
                                                    // never read
                                        double* b,  // inout [count, G]; x in the end
                                        int64_t count,  // >= 0
                                        int64_t G);     // >= 1

// The GPTQ column loop (Frantar et al., 2022). Independently for each row r, in fp32, every
// operation rounded by itself (no fma):
//
//   for i = 0 .. K-1:
//     s = scales[r, group[i]];  z = zeros[r, group[i]]
//     q = clamp(rint(W[r, i] / s) + z, 0, 2^bits - 1)
//     e = (W[r, i] - (q - z) * s) / U[i, i]
//     W[r, j] -= e * U[i, j]   for j = i+1 .. K-1
//     codes[r, i] = q;  loss[r] += e * e
//
// Columns are updated in blocks, but each W[r, j] receives its updates in ascending i: codes and
// loss have the same bits for every blocksize, thread count and instruction set.
HF_GPTQ_API int hf_gptq_solve(float* W,              // [N, K], columns in solve order; destroyed
                              const float* U,        // [K, K], upper Cholesky factor of the inverse
                                                     // Hessian; below the diagonal never read
                              const float* scales,   // [N, G], finite and non-zero, any sign
                              const float* zeros,    // [N, G], integers in [0, 2^bits]
                              const int32_t* group,  // [K], group of each column
                              uint8_t* codes,        // out [N, K], in solve order
                              double* loss,          // out [N], summed in fp64, or NULL
                              int64_t N, int64_t K, int64_t G,  // >= 1
                              int32_t bits,                     // 2, 3, 4 or 8
                              int64_t blocksize);  // >= 1; columns per lazy update, a matter of
                                                   // speed (128 is good; more than 256 acts as 256)

// Cyclic coordinate descent on the codes: each step gives one weight the code that is best while
// all others keep theirs, so that loss = (w - w_hat) H (w - w_hat)^T never grows but for rounding.
// Independently for each row r, in fp32, operations other than fma rounded by themselves:
//
//   w_hat[k] = (codes[r, k] - z) * s  with  s = scales[r, group[k]],  z = zeros[r, group[k]]
//   R        = (W[r, :] - w_hat) H, for each j:
//     R[j] = 0;  for k0 = 0, 128, 256, .. below K:
//       sum = 0;  for k = k0 .. min(k0 + 128, K) - 1:  sum = fma(W[r, k] - w_hat[k], H[k, j], sum)
//       R[j] += sum
//   repeat `rounds` times, or until a round changes nothing:
//     for k = 0 .. K-1:
//       q     = clamp(rint((w_hat[k] + R[k] / H[k, k]) / s) + z, 0, 2^bits - 1)
//       delta = (q - codes[r, k]) * s;  if delta is not 0:
//         codes[r, k] = q
//         R[j] = fma(-delta, H[k, j], R[j])   for j = 0 .. K-1
//   loss[r] = sum over k, upwards in fp64, of (W[r, k] - w_hat[k]) * R[k]
//
// avx512f and avx2 give the same bits; "portable" rounds product and sum of each fma separately.
HF_GPTQ_API int hf_gptq_descend(const float* W,        // [N, K], the weights wanted
                                const float* H,        // [K, K], symmetric positive definite
                                const float* scales,   // [N, G], finite and non-zero, any sign
                                const float* zeros,    // [N, G], integers in [0, 2^bits]
                                const int32_t* group,  // [K], group of each column
                                uint8_t* codes,        // inout [N, K]
                                double* loss,          // out [N], or NULL
                                int64_t N, int64_t K, int64_t G,  // >= 1
                                int32_t bits,                     // 2, 3, 4 or 8
                                int64_t rounds);  // >= 0; 0 computes the loss and nothing else

// The next two take a block of columns, for all rows. Rows come in parts of `part`, and what the
// rows of a part are off by is felt together: the loss of errors E is tr(M E H E^T), M symmetric
// and positive definite. Matrices are transposed, columns of the weight one after the other. In
// fp32, operations other than fma rounded by themselves; s and z stand for the scale and zero of
// row n in the column's group. avx512f and avx2 give the same bits, for any number of threads;
// "portable" rounds product and sum of each fma separately.
//
// The GPTQ column loop where a column is rounded row by row, the rows still free making good what
// the metric says they can. V is the upper Cholesky factor of the inverse of M:
//
//   for c = 0 .. B-1:
//     t = W[c, :]
//     for n = 0 .. part-1:
//       q = clamp(rint(t[n] / s) + z, 0, 2^bits - 1);  w_hat[n] = (q - z) * s;  codes[c, n] = q
//       t[m] = fma((w_hat[n] - t[n]) / V[n, n], V[n, m], t[m])   for m = n+1 .. part-1
//     e = (W[c, :] - w_hat) / U[c, c]
//     W[j, :] = fma(-U[c, j], e, W[j, :])   for j = c+1 .. B-1
//     W[c, :] = e
//
// The columns after the block are the caller's: W[j, :] -= sum over c of U[c, j] * W[c, :].
HF_GPTQ_API int hf_gptq_joint_solve(
    float* W,              // inout [B, N], columns in solve order
    const float* U,        // [B, B], rows U_row apart, as in hf_gptq_solve
    int64_t U_row,         // >= B
    const float* V,        // the parts' [n, n] one after the other, n = part but for the last
    const float* scales,   // [G, N], finite and non-zero, any sign
    const float* zeros,    // [G, N], integers in [0, 2^bits]
    const int32_t* group,  // [B], group of each column
    uint8_t* codes,        // out [B, N]
    int64_t N, int64_t B, int64_t G, int64_t part,  // >= 1; part up to 1024, B up to 256
    int32_t bits);                                  // 2, 3, 4 or 8

// One round of coordinate descent: each step gives one weight the code that is best while all
// others keep theirs. R is E H, transposed.
//
//   for c = 0 .. B-1:
//     v = 0;  for n = 0 .. part-1:  v[m] = fma(R[c, n] / H[c, c], M[n, m], v[m])   for all m
//     for n = 0 .. part-1:
//       w_hat = (codes[c, n] - z) * s
//       q     = clamp(rint((w_hat + v[n] / M[n, n]) / s) + z, 0, 2^bits - 1)
//       d[n]  = (codes[c, n] - q) * s;  if q is another:
//         codes[c, n] = q;  v[m] = fma(d[n], M[n, m], v[m])   for all m
//     changes[c, :] = d;  if not all 0:  R[j, :] = fma(H[c, j], d, R[j, :])   for j = 0 .. B-1
//
// The columns outside the block are the caller's: R[j, :] += sum over c of H[c, j] * changes[c, :].
HF_GPTQ_API int hf_gptq_joint_descend(
    float* R,              // inout [B, N]
    const float* H,        // [B, B], rows H_row apart; its diagonal positive
    int64_t H_row,         // >= B
    const float* M,        // as V above
    const float* scales,   // [G, N], finite and non-zero, any sign
    const float* zeros,    // [G, N], integers in [0, 2^bits]
    const int32_t* group,  // [B], group of each column
    uint8_t* codes,        // inout [B, N]
    float* changes,        // out [B, N]
    int64_t N, int64_t B, int64_t G, int64_t part,  // as above
    int32_t bits);                                  // 2, 3, 4 or 8

// Grid search for the scale and zero of each row and group, in fp32, each operation rounded by
// itself:
//
//   error(s, z) = sum_k h[k] * (w - (clamp(rint(w / s) + z, 0, maxq) - z) * s)^2
//
// with maxq = 2^bits - 1 and w the group's weights. Candidates, for t in shrink in turn:
//   sym:   base = 2 * max|w| / maxq;  s = round(base * t), then s = round(-base * t);
//          z = 2^(bits-1)
//   asym:  lo = min(w, 0), hi = max(w, 0);  s = round((hi - lo) * t / maxq);
//          z = clamp(rint(-lo * t / s), zero_min, maxq)
// where round() is to scale_dtype. A candidate whose |s| is zero, subnormal or not finite in
// scale_dtype is skipped; if none is left, s is the smallest normal number of scale_dtype, and z
// as above with t = 1. The smallest error wins, the first among equals. A group of zeros has s = 1
// and z = 2^(bits-1) (sym) or zero_min (asym). Term k is added to partial sum k % 16 (k counted
// from the group's first column), and the 16 sums are added pairwise: the result is the same for
// every thread count and instruction set.
HF_GPTQ_API int hf_gptq_scale_search(const float* W,  // [N, K], finite
                                     const float* h,  // [K], weight of each squared error, >= 0
                                     const int32_t* group_start,  // [G + 1], columns of group g are
                                                                  // group_start[g] .. [g + 1] - 1
                                     int64_t N, int64_t K, int64_t G,  // >= 1
                                     int32_t bits,                     // 2, 3, 4 or 8
                                     int32_t sym,          // 0: asymmetric, else symmetric
                                     const float* shrink,  // [T], fractions of the full range, > 0
                                     int64_t T,            // >= 1
                                     int32_t scale_dtype,  // hf_gptq_dtype
                                     float* scales,        // out [N, G], values of scale_dtype
                                     float* zeros,         // out [N, G], integers
                                     int32_t zero_min);    // 0 or 1; read only if asymmetric

#ifdef __cplusplus
}
#endif

#endif  // HF_GPTQ_H_
