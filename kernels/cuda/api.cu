// The exported functions: they validate, choose a regime and launch.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "dequantize.h"
#include "hf_gptq_cuda.h"
#include "linear.h"
#include "repack.h"
#include "rules.h"

#define HF_GPTQ_STRINGIFY_(x) #x
#define HF_GPTQ_STRINGIFY(x) HF_GPTQ_STRINGIFY_(x)
#ifndef HF_GPTQ_CUDA_ARCH_LIST
#define HF_GPTQ_CUDA_ARCH_LIST "unknown"
#endif

namespace hf_gptq {
namespace {

thread_local char last_error[256];

int runtime_error(cudaError_t error, int code = HF_GPTQ_CUDA_ERROR_RUNTIME) {
  if (error == cudaSuccess) return HF_GPTQ_CUDA_OK;
  snprintf(last_error, sizeof last_error, "%s", cudaGetErrorString(error));
  return code;
}

bool is_bits(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

bool is_dtype(int dtype) { return dtype >= HF_GPTQ_FP32 && dtype <= HF_GPTQ_BF16; }

bool is_size(int64_t size) { return size >= 1 && size < int64_t{1} << 22; }

constexpr int64_t kMostOutputs = int64_t{65535} * kPanelN;  // blocks of a grid's y

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_shape(int64_t N, int64_t K, int64_t rows, int bits) {
  return is_size(N) && N <= kMostOutputs && is_size(K) && is_size(rows) && rows >= K &&
         is_bits(bits);
}

bool is_weight(const hf_gptq_cuda_weight* w) {
  return w && is_shape(w->N, w->K, w->rows, w->bits) && (w->perm || w->rows == w->K) &&
         is_aligned(w->tiles) && is_aligned(w->scales) && is_dtype(w->scale_dtype) && w->G >= 1 &&
         w->group_size >= 1 && (w->group_size % kSliceK == 0 || w->group_size >= w->rows) &&
         (w->group_map || ceil_div(w->rows, w->group_size) <= w->G) &&
         (!w->qzeros || w->zero_offset == 0 || w->zero_offset == 1);
}

int find_device(Device* device) {
  int number, major, minor;
  cudaError_t error = cudaGetDevice(&number);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, number);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->capability = 10 * major + minor;
  return runtime_error(error);
}

// Activations that the kernels cannot read where they are get a copy: permuted, or brought to
// 16-byte rows.
bool needs_copy(const hf_gptq_cuda_weight& w, bool x_plain) { return w.perm || !x_plain; }

int64_t copy_pitch(const hf_gptq_cuda_weight& w) { return ceil_div(w.rows, 8) * 8; }

int64_t align(int64_t bytes) { return ceil_div(bytes, 128) * 128; }

int64_t copy_bytes(const hf_gptq_cuda_weight& w, int64_t M, bool x_plain) {
  return needs_copy(w, x_plain) ? align(M * copy_pitch(w) * 2) : 0;
}

// A switch in the environment, read at every call: it costs less than a launch by far.
bool is_on(const char* name) {
  const char* value = getenv(name);
  return value && strcmp(value, "1") == 0;
}

int group_slices(const hf_gptq_cuda_weight& w) {
  const int64_t rows = w.group_size < w.rows ? w.group_size : k_tile_count(w.rows) * kTileK;
  return static_cast<int>(rows / kSliceK);
}

Regime regime_for(const Device& device, const hf_gptq_cuda_weight& w, int x_dtype, int64_t M,
                  int wanted) {
  if (x_dtype == HF_GPTQ_FP32 || (x_dtype == HF_GPTQ_BF16 && device.capability < 80)) {
    return kDense;
  }
  if (wanted >= 0) return static_cast<Regime>(wanted);
  return choose_regime(device, M, w.N, k_tile_count(w.rows), w.scale_dtype, group_slices(w),
                       is_on("HF_GPTQ_BATCH_INVARIANT"));
}

// Whether a wanted regime can compute M rows at all.
bool is_possible(const Device& device, const hf_gptq_cuda_weight& w, int regime, int64_t M) {
  return regime == -1 || regime == kDense || regime == kWide ||
         (regime == kNarrow && narrow_fits(device, M, w.scale_dtype, group_slices(w))) ||
         (regime == kHopper && device.capability == 90);
}

template <class Launch>
cudaError_t by_bits(int bits, Launch launch) {
  switch (bits) {
    case 2:
      return launch(std::integral_constant<int, 2>());
    case 3:
      return launch(std::integral_constant<int, 3>());
    case 4:
      return launch(std::integral_constant<int, 4>());
    default:
      return launch(std::integral_constant<int, 8>());
  }
}

}  // namespace
}  // namespace hf_gptq

using namespace hf_gptq;

extern "C" {

int32_t hf_gptq_cuda_abi_version(void) { return HF_GPTQ_CUDA_ABI_VERSION; }

const char* hf_gptq_cuda_error_string(int error) {
  switch (error) {
    case HF_GPTQ_CUDA_OK:
      return "ok";
    case HF_GPTQ_CUDA_ERROR_ARGUMENT:
      return "a pointer is NULL or unaligned, or a number is out of range";
    case HF_GPTQ_CUDA_ERROR_RUNTIME:
      return "the CUDA runtime refused the call";
    case HF_GPTQ_CUDA_ERROR_DEVICE:
      return "the kernels do not run on this device, or its driver is too old for them";
    case HF_GPTQ_CUDA_ERROR_SCRATCH:
      return "scratch or counters are smaller than the plan says";
    case HF_GPTQ_CUDA_ERROR_REGIME:
      return "no kernel computes this product; dequantize and use a dense product";
    default:
      return "unknown error code";
  }
}

const char* hf_gptq_cuda_last_error(void) { return last_error; }

const char* hf_gptq_cuda_build_info(void) {
  return "abi=" HF_GPTQ_STRINGIFY(HF_GPTQ_CUDA_ABI_VERSION)
#ifdef HF_GPTQ_EMULATE
      ",cuda=emulated"
#else
      ",cuda=" HF_GPTQ_STRINGIFY(__CUDACC_VER_MAJOR__) "." HF_GPTQ_STRINGIFY(__CUDACC_VER_MINOR__)
#endif
      ",arch=" HF_GPTQ_CUDA_ARCH_LIST;
}

int hf_gptq_cuda_check_device(void) {
  Device device;
  if (const int error = find_device(&device)) return error;
  if (device.capability < 75) {
    snprintf(last_error, sizeof last_error, "compute capability %d.%d; the kernels need 7.5",
             device.capability / 10, device.capability % 10);
    return HF_GPTQ_CUDA_ERROR_DEVICE;
  }
  cudaError_t error = load_half();
  if (error == cudaSuccess && device.capability >= 80) error = load_bfloat16();
  if (device.capability == 90) {
    if (error == cudaSuccess) error = load_hopper_half();
    if (error == cudaSuccess) error = load_hopper_bfloat16();
  }
  const void* const others[] = {reinterpret_cast<const void*>(gather_kernel),
                                reinterpret_cast<const void*>(unpack_kernel),
                                reinterpret_cast<const void*>(repack_kernel<2>),
                                reinterpret_cast<const void*>(repack_kernel<3>),
                                reinterpret_cast<const void*>(repack_kernel<4>),
                                reinterpret_cast<const void*>(repack_kernel<8>)};
  for (const void* kernel : others) {
    if (error == cudaSuccess) error = hf_gptq_load(kernel);
  }
  for (const int bits : {2, 3, 4, 8}) {
    if (error != cudaSuccess) break;
    error = by_bits(bits, [](auto constant) { return load_dequantize<constant.value>(); });
  }
  return runtime_error(error, HF_GPTQ_CUDA_ERROR_DEVICE);
}

int64_t hf_gptq_cuda_tile_words(int64_t N, int64_t rows, int32_t bits) {
  return is_shape(N, rows, rows, bits) ? packed_tile_words(N, rows, bits) : -1;
}

int hf_gptq_cuda_repack(const int32_t* qweight, const int32_t* perm, void* tiles, int64_t N,
                        int64_t K, int64_t rows, int32_t bits, void* stream) {
  if (!qweight || !tiles || !is_aligned(tiles) || !is_shape(N, K, rows, bits)) {
    return HF_GPTQ_CUDA_ERROR_ARGUMENT;
  }
  const int64_t lanes = packed_tile_words(N, rows, bits) / bits;
  return runtime_error(by_bits(bits, [&](auto constant) {
    return hf_gptq_launch(
        repack_kernel<constant.value>, dim3(static_cast<unsigned>(ceil_div(lanes, 256))), dim3(256),
        0, static_cast<cudaStream_t>(stream), reinterpret_cast<const uint32_t*>(qweight), perm,
        static_cast<uint32_t*>(tiles), N, K, rows, lanes);
  }));
}

int hf_gptq_cuda_unpack(const void* tiles, const int32_t* row_of, int32_t* qweight, int64_t N,
                        int64_t K, int64_t rows, int32_t bits, void* stream) {
  if (!qweight || !tiles || !is_shape(N, K, rows, bits)) return HF_GPTQ_CUDA_ERROR_ARGUMENT;
  const int64_t words = packed_words(K, bits) * N;
  return runtime_error(
      hf_gptq_launch(unpack_kernel, dim3(static_cast<unsigned>(ceil_div(words, 256))), dim3(256), 0,
                     static_cast<cudaStream_t>(stream), static_cast<const uint32_t*>(tiles), row_of,
                     reinterpret_cast<uint32_t*>(qweight), N, K, rows, bits));
}

int hf_gptq_cuda_plan(const hf_gptq_cuda_weight* weight, int32_t x_dtype, int64_t M,
                      int32_t x_plain, int32_t regime, hf_gptq_cuda_plan_t* plan) {
  if (!is_weight(weight) || !is_dtype(x_dtype) || M < 1 || M > int64_t{1} << 24 || !plan) {
    return HF_GPTQ_CUDA_ERROR_ARGUMENT;
  }
  Device device;
  if (const int error = find_device(&device)) return error;
  if (!is_possible(device, *weight, regime, M)) return HF_GPTQ_CUDA_ERROR_ARGUMENT;
  *plan = {0, 0, regime_for(device, *weight, x_dtype, M, regime)};
  if (plan->regime == kDense) return HF_GPTQ_CUDA_OK;
  plan->scratch_bytes = copy_bytes(*weight, M, x_plain);
  if (plan->regime == kWide) {
    const int chunks = chunk_count(weight->N, weight->rows);
    const int64_t at_once = M < kWideLaunchRows ? M : kWideLaunchRows;
    plan->scratch_bytes += wide_partials(at_once, weight->N, chunks) * 4;
    plan->counters = static_cast<int32_t>(wide_counters(at_once, weight->N, chunks));
  }
  return HF_GPTQ_CUDA_OK;
}

int hf_gptq_cuda_linear(const hf_gptq_cuda_weight* weight, const void* x, int32_t x_dtype,
                        int64_t M, int64_t x_row_stride, const void* bias, void* y, int32_t regime,
                        void* scratch, int64_t scratch_bytes, int32_t* counters, void* stream) {
  const bool x_plain = is_aligned(x) && x_row_stride % 8 == 0;
  hf_gptq_cuda_plan_t plan;
  if (const int error = hf_gptq_cuda_plan(weight, x_dtype, M, x_plain, regime, &plan)) {
    return error;
  }
  const hf_gptq_cuda_weight& w = *weight;
  if (!x || !y || !w.tiles || !w.scales || !is_aligned(w.tiles) || !is_aligned(scratch)) {
    return HF_GPTQ_CUDA_ERROR_ARGUMENT;
  }
  if (plan.regime == kDense) return HF_GPTQ_CUDA_ERROR_REGIME;
  if (scratch_bytes < plan.scratch_bytes || (plan.counters && !counters)) {
    return HF_GPTQ_CUDA_ERROR_SCRATCH;
  }
  Device device;
  if (const int error = find_device(&device)) return error;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);

  LinearArguments p = {};
  p.tiles = static_cast<const uint32_t*>(w.tiles);
  p.x = static_cast<const uint16_t*>(x);
  p.x_stride = x_row_stride;
  p.x_columns = static_cast<int>(w.rows);
  p.scales = w.scales;
  p.qzeros = reinterpret_cast<const uint32_t*>(w.qzeros);
  p.group_map = w.group_map;
  p.bias = static_cast<const uint16_t*>(bias);
  p.y = static_cast<uint16_t*>(y);
  p.counters = counters;
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(w.N);
  p.k_tiles = static_cast<int>(k_tile_count(w.rows));
  p.G = static_cast<int>(w.G);
  p.group_slices = group_slices(w);
  p.runs = static_cast<int>(ceil_div(w.rows, int64_t{kSliceK} * p.group_slices));
  p.zero_words = static_cast<int>(packed_words(w.N, w.bits));
  p.zero_offset = w.zero_offset;
  p.scale_dtype = w.scale_dtype;
  p.bits = w.bits;
  p.chunks = plan.regime == kHopper ? hopper_cut(device, M, w.N, p.k_tiles).chunks
                                    : chunk_count(w.N, w.rows);

  char* free_scratch = static_cast<char*>(scratch);
  if (needs_copy(w, x_plain)) {
    const int64_t pitch = copy_pitch(w);
    uint16_t* copy = reinterpret_cast<uint16_t*>(free_scratch);
    const dim3 grid(static_cast<unsigned>(M), static_cast<unsigned>(ceil_div(pitch, 256)));
    if (const int error =
            runtime_error(hf_gptq_launch(gather_kernel, grid, dim3(256), 0, queue, p.x, p.x_stride,
                                         w.perm, copy, w.K, w.rows, pitch))) {
      return error;
    }
    p.x = copy;
    p.x_stride = pitch;
    free_scratch += copy_bytes(w, M, x_plain);
  }
  p.partials = reinterpret_cast<float*>(free_scratch);
  const bool half = x_dtype == HF_GPTQ_FP16;
  const auto launch = plan.regime == kNarrow ? (half ? launch_narrow_half : launch_narrow_bfloat16)
                      : plan.regime == kWide ? (half ? launch_wide_half : launch_wide_bfloat16)
                                             : (half ? launch_hopper_half : launch_hopper_bfloat16);
  const int64_t at_once = plan.regime == kWide ? kWideLaunchRows : M;
  for (int64_t row = 0; row < M; row += at_once) {
    p.M = static_cast<int>(M - row < at_once ? M - row : at_once);
    if (const int error = runtime_error(launch(p, device, queue))) return error;
    p.x += at_once * p.x_stride;
    p.y += at_once * p.N;
  }
  return HF_GPTQ_CUDA_OK;
}

int hf_gptq_cuda_dequantize(const hf_gptq_cuda_weight* weight, void* out, int32_t out_dtype,
                            int64_t out_row_stride, void* stream) {
  if (!is_weight(weight) || !is_dtype(out_dtype) || !out || !weight->tiles || !weight->scales ||
      out_row_stride < weight->K) {
    return HF_GPTQ_CUDA_ERROR_ARGUMENT;
  }
  const hf_gptq_cuda_weight& w = *weight;
  DequantizeArguments p = {};
  p.tiles = static_cast<const uint32_t*>(w.tiles);
  p.scales = w.scales;
  p.qzeros = reinterpret_cast<const uint32_t*>(w.qzeros);
  p.perm = w.perm;
  p.group_map = w.group_map;
  p.out = out;
  p.out_stride = out_row_stride;
  p.N = w.N;
  p.K = w.K;
  p.rows = w.rows;
  p.k_tiles = k_tile_count(w.rows);
  p.group_slices = group_slices(w);
  p.runs = ceil_div(w.rows, int64_t{kSliceK} * p.group_slices);
  p.zero_words = static_cast<int>(packed_words(w.N, w.bits));
  p.zero_offset = w.zero_offset;
  p.scale_dtype = w.scale_dtype;
  p.out_dtype = out_dtype;
  return runtime_error(by_bits(w.bits, [&](auto constant) {
    return launch_dequantize<constant.value>(p, static_cast<cudaStream_t>(stream));
  }));
}

}  // extern "C"
