// Host side of the Hopper kernel, for one type of activations; included where it is instantiated.
#ifndef HF_GPTQ_HOPPER_LAUNCH_H_
#define HF_GPTQ_HOPPER_LAUNCH_H_

#include "hopper.h"
#include "hopper_kernel.h"

namespace hf_gptq {
namespace hopper {

template <class T, int Bits, int Tokens, int Chunk>
cudaError_t launch(const Problem& problem, const Device& device, cudaStream_t stream) {
  using S = Shared<Bits, Tokens, Chunk>;
  const LinearArguments& p = problem.p;
  TensorMap x;
  const cudaError_t error = make_tensor_map(&x, p.x, p.x_columns, p.M, p.x_stride, Tokens, T());
  if (error != cudaSuccess) return error;
  const int64_t items = static_cast<int64_t>(problem.token_tiles) * problem.output_tiles * p.chunks;
  const int64_t clusters = hopper_clusters(device, p.chunks);
  const int64_t blocks = items < clusters * p.chunks ? items : clusters * p.chunks;
  return launch_clusters(linear_kernel<T, Bits, Tokens, Chunk>, p.chunks,
                         dim3(static_cast<unsigned>(blocks)), dim3(kThreads), S::kBytes, stream, x,
                         problem);
}

// A chunk is what shares scales and zeros: as many slices as a stage and a group allow. One group
// for all of K is a group of any size.
template <class T, int Bits, int Tokens>
cudaError_t launch_chunks(const Problem& problem, const Device& device, cudaStream_t stream) {
  const int slices = problem.p.runs == 1 ? kSlices : problem.p.group_slices;
  if (slices % 4 == 0) return launch<T, Bits, Tokens, 4>(problem, device, stream);
  if (slices % 2 == 0) return launch<T, Bits, Tokens, 2>(problem, device, stream);
  return launch<T, Bits, Tokens, 1>(problem, device, stream);
}

template <class T, int Bits>
cudaError_t launch_tokens(const LinearArguments& p, const Device& device, cudaStream_t stream) {
  const int tokens = hopper_cut(device, p.M, p.N, p.k_tiles, p.chunks).tokens;
  const int element = p.scale_dtype == HF_GPTQ_FP32 ? 4 : 2;
  const bool bulk_grid = reinterpret_cast<uintptr_t>(p.scales) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(p.qzeros) % 16 == 0 &&
                         p.N * element % 16 == 0 && (!p.qzeros || p.zero_words % 4 == 0);
  const Problem problem{p, static_cast<int>(ceil_div(p.M, tokens)),
                        static_cast<int>(ceil_div(p.N, kBlockOutputs)), bulk_grid};
  return tokens == 64 ? launch_chunks<T, Bits, 64>(problem, device, stream)
                      : launch_chunks<T, Bits, 128>(problem, device, stream);
}

template <class T>
cudaError_t launch_bits(const LinearArguments& p, const Device& device, cudaStream_t stream) {
  switch (p.bits) {
    case 2:
      return launch_tokens<T, 2>(p, device, stream);
    case 3:
      return launch_tokens<T, 3>(p, device, stream);
    case 4:
      return launch_tokens<T, 4>(p, device, stream);
    default:
      return launch_tokens<T, 8>(p, device, stream);
  }
}

template <class T, int Bits>
cudaError_t load_bits() {
  const void* const kernels[] = {reinterpret_cast<const void*>(linear_kernel<T, Bits, 64, 4>),
                                 reinterpret_cast<const void*>(linear_kernel<T, Bits, 64, 2>),
                                 reinterpret_cast<const void*>(linear_kernel<T, Bits, 64, 1>),
                                 reinterpret_cast<const void*>(linear_kernel<T, Bits, 128, 4>),
                                 reinterpret_cast<const void*>(linear_kernel<T, Bits, 128, 2>),
                                 reinterpret_cast<const void*>(linear_kernel<T, Bits, 128, 1>)};
  for (const void* kernel : kernels) {
    const cudaError_t error = hf_gptq_load(kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t load() {
  cudaError_t error = load_bits<T, 2>();
  if (error == cudaSuccess) error = load_bits<T, 3>();
  if (error == cudaSuccess) error = load_bits<T, 4>();
  if (error == cudaSuccess) error = load_bits<T, 8>();
  return error;
}

}  // namespace hopper
}  // namespace hf_gptq

#endif  // HF_GPTQ_HOPPER_LAUNCH_H_
