// C ABI of libhf_gptq_cuda: GPTQ-quantized linear layers on NVIDIA GPUs.
//
// Conventions
//   * Every function that can fail returns 0 or a positive hf_gptq_cuda_error; nothing throws.
//   * Pointers are device pointers of the current device unless said otherwise, aligned to their
//     element; `tiles`, `scales` and scratch to 16 bytes.
//   * Work is queued on `stream`, a cudaStream_t; nothing waits for it and nothing is allocated, so
//     every call that queues work can be captured in a CUDA graph.
//   * Results are the same bits from run to run.
#ifndef HF_GPTQ_CUDA_H_
#define HF_GPTQ_CUDA_H_

#include "hf_gptq.h"

#ifdef __cplusplus
extern "C" {
#endif

#define HF_GPTQ_CUDA_ABI_VERSION 1

enum hf_gptq_cuda_error {
  HF_GPTQ_CUDA_OK = 0,
  HF_GPTQ_CUDA_ERROR_ARGUMENT = 1,  // a pointer is NULL, or a number is out of range
  HF_GPTQ_CUDA_ERROR_RUNTIME = 2,   // the CUDA runtime refused; hf_gptq_cuda_last_error says why
  HF_GPTQ_CUDA_ERROR_DEVICE = 3,    // no code for this device, or its driver is too old
  HF_GPTQ_CUDA_ERROR_SCRATCH = 4,   // scratch is smaller than hf_gptq_cuda_plan said
  HF_GPTQ_CUDA_ERROR_REGIME = 5,    // the plan's regime is HF_GPTQ_CUDA_DENSE: dequantize instead
};

// A quantized weight in the tile layout of fragments.h. Row i of the codes belongs to input
// feature perm[i]; runs of group_size rows share a row of scales and zeros:
//
//   weight[n, perm[i]] = (code[i, n] - zero[g, n]) * scale[g, n],  i = 0 .. rows-1
//   g                  = group_map[i / group_size]
typedef struct hf_gptq_cuda_weight {
  const void* tiles;         // hf_gptq_cuda_tile_words(N, rows, bits) words
  const void* scales;        // [G, N], scale_dtype
  const int32_t* qzeros;     // [G, ceil(N * bits / 32)] as in hf_gptq.h, or NULL: 2^(bits-1)
  const int32_t* perm;       // [rows], -1 for a row of padding; NULL: perm[i] = i and rows = K
  const int32_t* group_map;  // [ceil(rows / group_size)], or NULL: group_map[j] = j
  int64_t N;                 // output features, below 2^22
  int64_t K;                 // input features, below 2^22
  int64_t rows;              // >= K, below 2^22
  int64_t G;                 // rows of scales
  int64_t group_size;        // a multiple of 16, or at least `rows`
  int32_t bits;              // 2, 3, 4 or 8
  int32_t scale_dtype;       // hf_gptq_dtype
  int32_t zero_offset;       // 1 for checkpoint format v1, 0 for v2; read only with qzeros
  int32_t reserved;          // 0
} hf_gptq_cuda_weight;

enum hf_gptq_cuda_regime {
  HF_GPTQ_CUDA_DENSE = 0,   // no kernel of ours would be faster: dequantize, then a dense product
  HF_GPTQ_CUDA_NARROW = 1,  // mma.sync, few rows
  HF_GPTQ_CUDA_WIDE = 2,    // mma.sync; the same bits as NARROW row by row
  HF_GPTQ_CUDA_HOPPER = 3,  // wgmma
};

// How a product will be computed, and the scratch that it needs.
typedef struct hf_gptq_cuda_plan_t {
  int64_t scratch_bytes;  // of device memory, contents arbitrary
  int32_t counters;       // int32 of device memory, zero before the call and again after it
  int32_t regime;         // hf_gptq_cuda_regime
} hf_gptq_cuda_plan_t;

HF_GPTQ_API int32_t hf_gptq_cuda_abi_version(void);

// Static text for an error code; never NULL.
HF_GPTQ_API const char* hf_gptq_cuda_error_string(int error);

// What the CUDA runtime said when this thread last met HF_GPTQ_CUDA_ERROR_RUNTIME or _DEVICE.
HF_GPTQ_API const char* hf_gptq_cuda_last_error(void);

// "abi=1,cuda=13.0,arch=75+80+90a".
HF_GPTQ_API const char* hf_gptq_cuda_build_info(void);

// Whether the kernels run on the current device. Loads them, so that no later call has to.
HF_GPTQ_API int hf_gptq_cuda_check_device(void);

// Words of a packed weight, padding included.
HF_GPTQ_API int64_t hf_gptq_cuda_tile_words(int64_t N, int64_t rows, int32_t bits);

// Canonical words [ceil(K * bits / 32), N] to tiles; row i receives input perm[i].
HF_GPTQ_API int hf_gptq_cuda_repack(const int32_t* qweight, const int32_t* perm,  // [rows] or NULL
                                    void* tiles, int64_t N, int64_t K, int64_t rows, int32_t bits,
                                    void* stream);

// The inverse; input k is taken from row row_of[k].
HF_GPTQ_API int hf_gptq_cuda_unpack(const void* tiles, const int32_t* row_of,  // [K] or NULL
                                    int32_t* qweight, int64_t N, int64_t K, int64_t rows,
                                    int32_t bits, void* stream);

// How hf_gptq_cuda_linear will compute M rows of `x_dtype` (fp16 or bf16; fp32 is always DENSE).
// `x_plain`: x is aligned to 16 bytes and its row stride a multiple of 8. `regime` chooses one
// (for tests and measurements), or -1 for the rules. Reads no device memory.
// HF_GPTQ_BATCH_INVARIANT=1 in the environment changes the rules, so that a row has the same bits
// whatever M is.
HF_GPTQ_API int hf_gptq_cuda_plan(const hf_gptq_cuda_weight* weight, int32_t x_dtype, int64_t M,
                                  int32_t x_plain, int32_t regime, hf_gptq_cuda_plan_t* plan);

// y[M, N] = x[M, K] W^T + bias.
HF_GPTQ_API int hf_gptq_cuda_linear(const hf_gptq_cuda_weight* weight, const void* x,
                                    int32_t x_dtype, int64_t M,
                                    int64_t x_row_stride,  // elements
                                    const void* bias,      // [N] in x_dtype, or NULL
                                    void* y,               // [M, N] in x_dtype
                                    int32_t regime,        // as given to hf_gptq_cuda_plan
                                    void* scratch, int64_t scratch_bytes, int32_t* counters,
                                    void* stream);

// The dense weight, out[n, k] = weight[n, k] computed in fp32 and rounded once.
HF_GPTQ_API int hf_gptq_cuda_dequantize(const hf_gptq_cuda_weight* weight, void* out,
                                        int32_t out_dtype, int64_t out_row_stride, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // HF_GPTQ_CUDA_H_
