// The kernel for 5 rows and more; rules.h says to how many.
//
// A block takes 8 MT tokens, 256 outputs and one chunk of K; its eight warps take 32 outputs each
// and share the activations:
//
//                      outputs ->
//   tokens x chunk  | warp 0 | warp 1 | .. | warp 7 |
//
// The chunks of the same outputs and tokens are other blocks' work. Each stores its sums in fp32
// and draws a number; whoever draws the last one adds all chunks up, chunk 0 first, and sets the
// counter back, so that a launch finds what the one before it found. No sum depends on who is last.
#ifndef HF_GPTQ_WIDE_H_
#define HF_GPTQ_WIDE_H_

#include "launch.h"
#include "pipeline.h"

namespace hf_gptq {

struct alignas(16) Four {
  float value[4];
};

// Reads past L1, where another block's stores may be.
HF_GPTQ_DEVICE Four load_fresh(const Four* address) {
#ifdef HF_GPTQ_EMULATE
  return *address;
#else
  const float4 loaded = __ldcg(reinterpret_cast<const float4*>(address));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
#endif
}

template <class T, int Bits, int MT>
struct Wide {
  static constexpr int NT = kBlockN / kTileN / kWarps;
  static constexpr int kRows = 8 * MT;
  using Stage = WarpStage<Bits, NT>;
  using Sums = WarpSums<T, Bits, NT, MT>;
  static constexpr int kActivationBytes = kRows * kTileK * 2;
  static constexpr int kPieces = kRows * kTileK / 8;
  // The result on its way out; 8 more columns keep the rows apart in the banks.
  static constexpr int kOutputPitch = kBlockN + 8;
  static constexpr int kOutputBytes = kRows * kOutputPitch * 2;

  HF_GPTQ_HD static constexpr int stage_bytes(const LinearArguments& p) {
    return kActivationBytes + kWarps * Stage::words(p.scale_dtype, p.group_slices) * 4;
  }

  static __device__ __forceinline__ void fetch(const LinearArguments& p, unsigned char* stage,
                                               int first_row, int n_tile, int tile, GroupCursor at,
                                               bool first, int lane, int warp) {
#pragma unroll
    for (int i = 0; i < (kPieces + kThreads - 1) / kThreads; ++i) {
      const int piece = threadIdx.x + i * kThreads;
      if (piece < kPieces) fetch_piece(p, stage, piece / 8, piece % 8, first_row, tile);
    }
    if (n_tile * kTileN < p.N) {
      Stage::fetch(p, warp_stage(p, stage, warp), n_tile, tile, at, first, lane);
    }
  }

  static __device__ __forceinline__ uint32_t* warp_stage(const LinearArguments& p,
                                                         unsigned char* stage, int warp) {
    return reinterpret_cast<uint32_t*>(stage + kActivationBytes) +
           warp * Stage::words(p.scale_dtype, p.group_slices);
  }

  static __device__ __forceinline__ void run(const LinearArguments& p) {
    HF_GPTQ_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = blockIdx.x * kRows, chunk = blockIdx.z;
    const int n_tile = (blockIdx.y * kWarps + warp) * NT, n = n_tile * kTileN;
    const int bytes = stage_bytes(p);
    const int begin = static_cast<int>(chunk_begin(chunk, p.chunks, p.k_tiles));
    const int end = static_cast<int>(chunk_begin(chunk + 1, p.chunks, p.k_tiles));

    Sums sums;
    sums.clear();
    GroupCursor at(p, begin), ahead = at;
    int fetched = begin, write = 0, read = 0;
    for (; fetched < begin + p.stages - 1; ++fetched) {
      if (fetched < end) {
        fetch(p, shared + write * bytes, first_row, n_tile, fetched, ahead, fetched == begin, lane,
              warp);
        ahead.advance(p, kSlices);
      }
      commit_copies();
      ++write;
    }
    for (int tile = begin; tile < end; ++tile, ++fetched) {
      wait_stage(p.stages);
      __syncthreads();  // the stage has arrived for all, and all are done with the one before it
      if (fetched < end) {
        fetch(p, shared + write * bytes, first_row, n_tile, fetched, ahead, false, lane, warp);
        ahead.advance(p, kSlices);
      }
      commit_copies();
      if (n < p.N) {
        unsigned char* stage = shared + read * bytes;
        sums.add_tile(p, warp_stage(p, stage, warp), stage, n, at, tile == begin, lane);
      }
      at.advance(p, kSlices);
      if (++write == p.stages) write = 0;
      if (++read == p.stages) read = 0;
    }
    if (n < p.N) sums.flush();
    wait_copies<0>();
    __syncthreads();
    if (p.chunks > 1 && !add_chunks(p, sums, shared)) return;
    store(p, sums, shared, first_row, lane, warp);
  }

  // Hands this block's sums over. True in the block that arrives last: its sums are then the whole.
  static __device__ __forceinline__ bool add_chunks(const LinearArguments& p, Sums& sums,
                                                    unsigned char* shared) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    constexpr int kFours = NT * MT * kThreads;
    Four* partials = reinterpret_cast<Four*>(p.partials) + block * p.chunks * kFours;
    Four* mine = partials + blockIdx.z * kFours;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        const float (&t)[4] = sums.total[nt][mt];
        mine[(nt * MT + mt) * kThreads + threadIdx.x] = {{t[0], t[1], t[2], t[3]}};
      }
    }
    __threadfence();
    __syncthreads();
    int* ticket = reinterpret_cast<int*>(shared);
    if (threadIdx.x == 0) *ticket = atomicAdd(p.counters + block, 1);
    __syncthreads();
    if (*ticket != p.chunks - 1) return false;
    __threadfence();
    if (threadIdx.x == 0) p.counters[block] = 0;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        const Four* chunk = partials + (nt * MT + mt) * kThreads + threadIdx.x;
        Four sum = load_fresh(chunk);
        for (int c = 1; c < p.chunks; ++c) {
          const Four value = load_fresh(chunk + c * kFours);
          for (int i = 0; i < 4; ++i) sum.value[i] += value.value[i];
        }
        for (int i = 0; i < 4; ++i) sums.total[nt][mt][i] = sum.value[i];
      }
    }
    __syncthreads();  // `ticket` has been read by all
    return true;
  }

  // Rounds, and writes whole rows: in a fragment neighbouring outputs belong to different lanes.
  static __device__ __forceinline__ void store(const LinearArguments& p, const Sums& sums,
                                               unsigned char* shared, int first_row, int lane,
                                               int warp) {
    uint16_t* out = reinterpret_cast<uint16_t*>(shared);
    const int first_column = blockIdx.y * kBlockN;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int output = (warp * NT + nt) * kTileN + lane / 4 + 8 * half;
        const bool biased = p.bias && first_column + output < p.N;
        const float bias = biased ? to_float(p.bias[first_column + output], T()) : 0.0f;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float sum = sums.total[nt][mt][2 * half + i];
            if (p.bias) sum += bias;
            out[(8 * mt + lane % 4 * 2 + i) * kOutputPitch + output] = from_float(sum, T());
          }
        }
      }
    }
    __syncthreads();
    const int column = first_column + threadIdx.x;
    if (column >= p.N) return;
    for (int row = 0; row < kRows && first_row + row < p.M; ++row) {
      p.y[static_cast<int64_t>(first_row + row) * p.N + column] =
          out[row * kOutputPitch + threadIdx.x];
    }
  }
};

template <class T, int Bits, int MT>
__global__ void __launch_bounds__(kThreads, 1) wide_kernel(const LinearArguments p) {
  Wide<T, Bits, MT>::run(p);
}

template <class T, int Bits, int MT>
static cudaError_t launch_wide_tokens(LinearArguments& p, const Device& device,
                                      cudaStream_t stream) {
  using Kernel = Wide<T, Bits, MT>;
  const int stage_bytes = Kernel::stage_bytes(p);
  p.stages = fitting_stages(stage_bytes, device.shared_bytes);
  if (!p.stages) return cudaErrorInvalidValue;
  const int bytes = p.stages * stage_bytes;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.M, Kernel::kRows)),
                  static_cast<unsigned>(ceil_div(p.N, kBlockN)), p.chunks);
  return hf_gptq_launch(wide_kernel<T, Bits, MT>, grid, dim3(kThreads),
                        bytes > Kernel::kOutputBytes ? bytes : Kernel::kOutputBytes, stream, p);
}

template <class T, int Bits>
static cudaError_t launch_wide(LinearArguments& p, const Device& device, cudaStream_t stream) {
  switch (wide_token_tiles(p.M)) {
    case 1:
      return launch_wide_tokens<T, Bits, 1>(p, device, stream);
    case 2:
      return launch_wide_tokens<T, Bits, 2>(p, device, stream);
    case 4:
      return launch_wide_tokens<T, Bits, 4>(p, device, stream);
    default:
      return launch_wide_tokens<T, Bits, 8>(p, device, stream);
  }
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_WIDE_H_
