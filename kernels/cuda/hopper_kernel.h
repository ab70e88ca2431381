// Y = X W^T + bias on Hopper's warpgroup tensor cores (sm_90a), for many tokens.
//
// The product is taken as Y^T = W X^T: weights are operand A of wgmma, decoded into registers as
// exact integers (code - zero); X is operand B, a tile of tokens in shared memory.
//
//   a block's tile:  256 outputs x Tokens tokens, 64 inputs a stage
//
//              X^T, shared by both consumers
//              [64 k x Tokens]   <- one tensor copy per stage, 128-byte swizzle
//            +------------------+
//   W  0..127|   consumer 0     |  a consumer is a warpgroup: two m64 halves, one after the other
//            +------------------+
//   W 128..255   consumer 1     |
//            +------------------+
//
//   producer warpgroup: each warp issues the copies of a panel of W; warp 0 also those of X, and
//   warp 1 those of scales and zeros, as the checkpoint has them. Where their rows do not begin at
//   multiples of 16 bytes, every warp copies its panel's, element by element.
//   full[stage]: the copies' bytes and the four warps that issued them.
//   empty[stage]: the eight warps of the consumers.
//
// X comes by a tensor map because one instruction then swizzles it and fills ragged edges with
// zeros; row by row, copies could do neither, and threads that copy would need a proxy fence per
// stage. The packed weights need no map: what a panel gives to a stage lies together.
//
// Order of a sum, the same for every M and grid (how many splits there are: hopper_cut):
//   part  = sum over a chunk of Chunk * 16 inputs on the tensor cores, from 0, in fp32
//   total = fma(part, scale of the chunk's group, total), chunks upwards in k
//   y     = total of split 0 + total of split 1 + .. + bias, rounded once
//
// Why the scale comes after the product, for every group size: it costs Tokens / 2 fma a thread and
// chunk, at Chunk = 4 and 128 tokens 64 issue slots beside 256 cycles of the tensor core, and about
// 50 go to decoding, beside the other consumer's products. In the weight it would cost
// half of that, but round every weight to 11 or 8 bits, and in fp16 lose small scales to
// subnormals. At groups of 16 the fma are 256 in 256 cycles and bound the kernel; it is right
// there, but not at its best.
//
// Splits of K are the blocks of a cluster, who add their sums up in each other's shared memory: no
// workspace, no atomics, and all of them share the work.
//
// Tiles go to blocks in turn (a persistent grid), so the copies of the next tile begin during the
// epilogue of this one. The order of tiles does not matter to the result.
#ifndef HF_GPTQ_HOPPER_KERNEL_H_
#define HF_GPTQ_HOPPER_KERNEL_H_

#include <math.h>

#include "decode.h"
#include "fragments.h"
#include "hf_gptq.h"
#include "hopper_ptx.h"
#include "linear.h"

namespace hf_gptq {
namespace hopper {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kProducers = 4;  // warps, of one warpgroup
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kConsumerThreads = 128 * kConsumers;
constexpr int kConsumerN = 128;                // outputs of a consumer
constexpr int kHalves = kConsumerN / kPanelN;  // m64 products of a consumer
constexpr int kBlockOutputs = kConsumerN * kConsumers;
constexpr int kSharedLimit = 227 * 1024;  // dynamic shared memory of a block on sm_90

// The work: tiles of outputs x tokens, each cut into p.chunks parts of K, 1, 2, 4 or 8 (hopper_cut
// takes up to 4): as many as a cluster has blocks.
struct Problem {
  LinearArguments p;
  int token_tiles, output_tiles;
  bool bulk_grid;  // scales and zeros can be copied sixteen bytes at a time
};

// Bytes of a stage and how many there are.
template <int Bits, int Tokens, int Chunk>
struct Shared {
  static constexpr int kChunks = kSlices / Chunk;  // of a stage
  static constexpr int kX = Tokens * kTileK * 2;
  static constexpr int kPanel = kPanelTiles * tile_words(Bits) * 4;
  static constexpr int kW = kBlockOutputs / kPanelN * kPanel;
  static constexpr int kScales = kBlockOutputs * 4;  // at most, of a chunk
  static constexpr int kZeros = kBlockOutputs * Bits / 8;
  static constexpr int kGrid = kScales + kZeros;
  // Stages begin at multiples of 1024 bytes, the period of the swizzle.
  static constexpr int kStage = (kX + kW + kChunks * kGrid + 1023) / 1024 * 1024;
  // A consumer's outputs on their way to memory: a row per token. The 16 bytes more put the rows of
  // an 8 x 8 matrix into different banks.
  static constexpr int kRow = kConsumerN * 2 + 16;
  static constexpr int kOut = Tokens * kRow;
  static constexpr int kControl = 256;  // barriers
  static constexpr int kRest = kConsumers * kOut + kControl + 1024;
  static constexpr int kFit = (kSharedLimit - kRest) / kStage;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kStages * kStage + kRest;
  static_assert(kStages >= 3, "too few stages to hide the latency of memory");
  static_assert(kConsumers * kOut >= Tokens / 8 * 16 * kConsumerThreads, "a half in fp32 must fit");
};

// A tile and a part of K. The parts of a tile are neighbours and go to the blocks of one cluster;
// of the tiles, tokens vary fastest, so that neighbours share weights.
struct Item {
  int tile, split;
  int64_t token, output;
  int begin, end;  // tiles of K
};

HF_GPTQ_DEVICE Item item_of(const Problem& problem, int number, int tokens) {
  Item item;
  item.split = number % problem.p.chunks;
  item.tile = number / problem.p.chunks;
  item.token = static_cast<int64_t>(item.tile % problem.token_tiles) * tokens;
  item.output = static_cast<int64_t>(item.tile / problem.token_tiles) * kBlockOutputs;
  item.begin = static_cast<int>(chunk_begin(item.split, problem.p.chunks, problem.p.k_tiles));
  item.end = static_cast<int>(chunk_begin(item.split + 1, problem.p.chunks, problem.p.k_tiles));
  return item;
}

// The ring of stages, as producers and consumers walk it.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The row of scales and zeros of a chunk; `run` is the last one asked for, `row` its answer.
HF_GPTQ_DEVICE int grid_row(const LinearArguments& p, int slice, int& run, int& row) {
  int wanted = slice / p.group_slices;
  if (wanted >= p.runs) wanted = p.runs - 1;
  if (wanted != run) {
    run = wanted;
    row = p.group_map ? p.group_map[run] : run;
  }
  return row;
}

// Copies a row's scales and zeros of a panel into the grid of 256 outputs from `first`, element by
// element, with a warp.
template <int Bits, int kScales>
HF_GPTQ_DEVICE void copy_grid(const LinearArguments& p, unsigned char* grid, int row, int first,
                              int panel, int lane) {
  for (int i = panel * kPanelN + lane; i < (panel + 1) * kPanelN && first + i < p.N; i += 32) {
    const int64_t from = static_cast<int64_t>(row) * p.N + first + i;
    if (p.scale_dtype == HF_GPTQ_FP32) {
      reinterpret_cast<float*>(grid)[i] = static_cast<const float*>(p.scales)[from];
    } else {
      reinterpret_cast<uint16_t*>(grid)[i] = static_cast<const uint16_t*>(p.scales)[from];
    }
  }
  constexpr int kWords = kPanelN * Bits / 32;
  const int word = panel * kWords + lane;
  if (p.qzeros && lane < kWords && first * Bits / 32 + word < p.zero_words) {
    reinterpret_cast<uint32_t*>(grid + kScales)[word] =
        p.qzeros[static_cast<int64_t>(row) * p.zero_words + first * Bits / 32 + word];
  }
}

// What warp `warp` of the producers does, stage after stage: it copies its panel of W, and besides
// warp 0 X, and warp 1 the scales and zeros of all. Issuing a copy takes a hundred cycles and more,
// so that one warp alone does not keep up.
template <int Bits, int Tokens, int Chunk, bool BulkGrid>
HF_GPTQ_DEVICE void produce(const TensorMap* x, const Problem& problem, unsigned char* stages,
                            uint32_t full, uint32_t empty, int warp) {
  using S = Shared<Bits, Tokens, Chunk>;
  const LinearArguments& p = problem.p;
  const int lane = threadIdx.x % 32;
  const int items = problem.token_tiles * problem.output_tiles * p.chunks;
  const int element = p.scale_dtype == HF_GPTQ_FP32 ? 4 : 2;
  const uint32_t window = window_address(stages);
  int run = -1, row = 0;
  Turn turn;
  for (int number = blockIdx.x; number < items; number += gridDim.x) {
    const Item item = item_of(problem, number, Tokens);
    const int first = static_cast<int>(item.output), outputs = p.N - first;
    const bool has_panel = warp * kPanelN < outputs;
    const int zero_words = p.qzeros ? p.zero_words - first * Bits / 32 : 0;
    const uint32_t scale_bytes = (outputs < kBlockOutputs ? outputs : kBlockOutputs) * element;
    const uint32_t zero_bytes = zero_words * 4 < S::kZeros ? zero_words * 4 : S::kZeros;
    const uint32_t bytes = (has_panel ? S::kPanel : 0) + (warp == 0 ? S::kX : 0) +
                           (BulkGrid && warp == 1 ? S::kChunks * (scale_bytes + zero_bytes) : 0);
#pragma unroll 1  // few registers
    for (int k_tile = item.begin; k_tile < item.end; ++k_tile) {
      if (!BulkGrid) {
        mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
        unsigned char* grid = stages + turn.stage * S::kStage + S::kX + S::kW;
        for (int chunk = 0; chunk < S::kChunks && has_panel; ++chunk, grid += S::kGrid) {
          copy_grid<Bits, S::kScales>(
              p, grid, grid_row(p, k_tile * kSlices + chunk * Chunk, run, row), first, warp, lane);
        }
        __syncwarp();
      }
      if (lane == 0) {  // alone: another lane could come to the barrier a phase too late
        const uint32_t stage = window + turn.stage * S::kStage, done = full + 8 * turn.stage;
        if (BulkGrid) mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
        mbarrier_arrive_expect_tx(done, bytes);
        if (warp == 0) {
          tensor_copy(stage, x, k_tile * kTileK, static_cast<int32_t>(item.token), done);
        }
        if (has_panel) {
          const int64_t tile = tile_index(first / kTileN + warp * kPanelTiles, k_tile, p.k_tiles);
          bulk_copy(stage + S::kX + warp * S::kPanel, p.tiles + tile * tile_words(Bits), S::kPanel,
                    done);
        }
        for (int chunk = 0; BulkGrid && warp == 1 && chunk < S::kChunks; ++chunk) {
          const uint32_t grid = stage + S::kX + S::kW + chunk * S::kGrid;
          const int64_t from = grid_row(p, k_tile * kSlices + chunk * Chunk, run, row);
          bulk_copy(grid,
                    static_cast<const unsigned char*>(p.scales) + (from * p.N + first) * element,
                    scale_bytes, done);
          if (p.qzeros) {
            bulk_copy(grid + S::kScales, p.qzeros + from * p.zero_words + first * Bits / 32,
                      zero_bytes, done);
          }
        }
      }
      __syncwarp();
      turn.next(S::kStages);
    }
  }
}

// Adds a chunk of one stage to the sums of one m64 half.
//
//   words   this lane's codes of the warp's tile
//   b       descriptor of X at the chunk's first slice
//   grid    the chunk's scales and zeros; the lane's outputs are `output` and output + 8
template <class T, int Bits, int Tokens, int Chunk>
HF_GPTQ_DEVICE void multiply_chunk(const LinearArguments& p, float (&total)[Tokens / 2],
                                   float (&part)[Tokens / 2], const LaneWords<Bits>& words,
                                   int first_slice, uint64_t b, const unsigned char* grid,
                                   int output) {
  // Operands in registers: a short product ends before the next one could be decoded.
  constexpr int kOperands = Tokens == 64 && Chunk > 2 ? 4 : 2;
  uint32_t zero[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t value = 1u << (Bits - 1);
    if (p.qzeros) {
      value = load_zero<Bits>(
                  reinterpret_cast<const uint32_t*>(grid + Shared<Bits, Tokens, Chunk>::kScales),
                  output + 8 * i, 0) +
              p.zero_offset;
    }
    zero[i] = zero_register<T, Bits>(value);
  }
  uint32_t a[kOperands][4];
#pragma unroll
  for (int i = 0; i < Chunk; ++i) {
    if (i >= kOperands) wgmma_wait<kOperands - 1>();  // the product that read a[i % kOperands]
    decode_slice<T, Bits>(words, first_slice + i, zero[0], zero[1], a[i % kOperands]);
    wgmma_fence();
    wgmma(part, a[i % kOperands], b + i * (kSliceK * 2 >> 4), i > 0, T());
    wgmma_commit();
  }
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    scale[i] = load_scale(reinterpret_cast<const uint32_t*>(grid), output + 8 * i, p.scale_dtype);
  }
  wgmma_wait<0>();
  registers_settle(part);
#pragma unroll
  for (int i = 0; i < Tokens / 2; ++i) total[i] = fmaf(part[i], scale[i / 2 % 2], total[i]);
}

// Matrix descriptor of X in a stage: k-major, 128-byte swizzle, eight tokens every 1024 bytes. A
// step of 16 inputs is 32 bytes further in its start address.
HF_GPTQ_DEVICE uint64_t x_descriptor(uint32_t address) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | address >> 4;
}

// How the blocks of a cluster know each other's shared memory to be ready and read. Both barriers
// count the eight consumer warps of every block.
struct Join {
  uint32_t ready, read;
  uint32_t parity = 0;
};

// Adds up the splits of a tile, which the blocks of the cluster hold, and stores the outputs. One
// half at a time, every thread puts its sums into its block's shared memory; then each block takes
// its share of the tokens, reads them from all blocks, upwards from split 0, and stores them.
template <class T, int Tokens>
HF_GPTQ_DEVICE void join_splits(const float (&total)[kHalves][Tokens / 2], const Problem& problem,
                                const Item& item, unsigned char* out, Join& join, int consumer,
                                int warp) {
  constexpr int kBlocks = Tokens / 8;  // of eight tokens: four registers of a thread
  const LinearArguments& p = problem.p;
  const int lane = threadIdx.x % 32, each = kBlocks / p.chunks;
  float* mine = reinterpret_cast<float*>(out) + 4 * threadIdx.x;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    mbarrier_wait_cluster(join.read, join.parity ^ 1);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      store_four(mine + i * 4 * kConsumerThreads, total[half][4 * i], total[half][4 * i + 1],
                 total[half][4 * i + 2], total[half][4 * i + 3]);
    }
    __syncwarp();
    if (lane < p.chunks) mbarrier_arrive_peer(peer_address(join.ready, lane));
    mbarrier_wait_cluster(join.ready, join.parity);
    const int64_t n =
        item.output + consumer * kConsumerN + half * kPanelN + warp * kTileN + lane / 4;
    const float bias[2] = {p.bias && n < p.N ? to_float(p.bias[n], T()) : 0.0f,
                           p.bias && n + 8 < p.N ? to_float(p.bias[n + 8], T()) : 0.0f};
    for (int i = item.split * each; i < (item.split + 1) * each; ++i) {
      const uint32_t address = window_address(mine + i * 4 * kConsumerThreads);
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int split = 0; split < p.chunks; ++split) {
        float four[4];
        load_peer_four(four, peer_address(address, split));
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += four[j];
      }
      const int64_t token = item.token + 8 * i + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (n + 8 * j >= p.N) continue;
        const uint32_t pair = pack_floats(sum[2 * j] + bias[j], sum[2 * j + 1] + bias[j], T());
        uint16_t* y = p.y + token * p.N + n + 8 * j;
        if (token < p.M) y[0] = static_cast<uint16_t>(pair);
        if (token + 1 < p.M) y[p.N] = static_cast<uint16_t>(pair >> 16);
      }
    }
    __syncwarp();
    if (lane < p.chunks) mbarrier_arrive_peer(peer_address(join.read, lane));
    join.parity ^= 1;
  }
}

// Rounds, turns tokens into rows and stores what lies inside of y.
template <class T, int Tokens, int kRow>
HF_GPTQ_DEVICE void store_outputs(const float (&total)[kHalves][Tokens / 2], const Problem& problem,
                                  const Item& item, unsigned char* out, int consumer) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int64_t first = item.output + consumer * kConsumerN;
  const uint32_t rows = window_address(out);
  named_barrier(1 + consumer, 128);  // the tile before has been read
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int64_t n = first + half * kPanelN + warp * kTileN + lane / 4;
    float bias[2] = {0.f, 0.f};
    if (problem.p.bias && n < problem.p.N) bias[0] = to_float(problem.p.bias[n], T());
    if (problem.p.bias && n + 8 < problem.p.N) bias[1] = to_float(problem.p.bias[n + 8], T());
    // Sixteen outputs x sixteen tokens: four 8 x 8 matrices, outputs first.
    const uint32_t row = rows + (lane / 16 * 8 + lane % 8) * kRow +
                         (half * kPanelN + warp * kTileN + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int i = 0; i < Tokens / 2; i += 8) {
      const float* v = total[half] + i;
      stmatrix_transposed(row + i * 2 * kRow, pack_floats(v[0] + bias[0], v[1] + bias[0], T()),
                          pack_floats(v[2] + bias[1], v[3] + bias[1], T()),
                          pack_floats(v[4] + bias[0], v[5] + bias[0], T()),
                          pack_floats(v[6] + bias[1], v[7] + bias[1], T()));
    }
  }
  named_barrier(1 + consumer, 128);
  const int64_t left = problem.p.M - item.token;
  const int tokens = left < Tokens ? static_cast<int>(left) : Tokens;
  if (problem.p.N % 8 == 0 && reinterpret_cast<uintptr_t>(problem.p.y) % 16 == 0) {
    for (int i = thread; i < tokens * (kConsumerN / 8); i += 128) {
      const int token = i / (kConsumerN / 8), n = i % (kConsumerN / 8) * 8;
      if (first + n < problem.p.N) {
        *reinterpret_cast<uint4*>(problem.p.y + (item.token + token) * problem.p.N + first + n) =
            *reinterpret_cast<const uint4*>(out + token * kRow + n * 2);
      }
    }
  } else {
    for (int i = thread; i < tokens * kConsumerN; i += 128) {
      const int token = i / kConsumerN, n = i % kConsumerN;
      if (first + n < problem.p.N) {
        problem.p.y[(item.token + token) * problem.p.N + first + n] =
            reinterpret_cast<const uint16_t*>(out + token * kRow)[n];
      }
    }
  }
}

template <class T, int Bits, int Tokens, int Chunk>
HF_GPTQ_DEVICE void consume(const Problem& problem, unsigned char* stages, uint32_t full,
                            uint32_t empty, Join join, unsigned char* out, int consumer, int warp) {
  using S = Shared<Bits, Tokens, Chunk>;
  const int lane = threadIdx.x % 32;
  const int items = problem.token_tiles * problem.output_tiles * problem.p.chunks;
  const uint32_t window = window_address(stages);
  float total[kHalves][Tokens / 2];
  float part[Tokens / 2];
  Turn turn;
  for (int number = blockIdx.x; number < items; number += gridDim.x) {
    const Item item = item_of(problem, number, Tokens);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < Tokens / 2; ++i) total[half][i] = 0.f;
    }
    for (int k_tile = item.begin; k_tile < item.end; ++k_tile) {
      mbarrier_wait(full + 8 * turn.stage, turn.parity);
      const uint64_t x = x_descriptor(window + turn.stage * S::kStage);
      const unsigned char* stage = stages + turn.stage * S::kStage;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int panel = consumer * kHalves + half;
        const LaneWords<Bits> words = LaneWords<Bits>::load(
            reinterpret_cast<const uint32_t*>(stage + S::kX + panel * S::kPanel) +
                warp * tile_words(Bits),
            lane);
        const int row = panel * kPanelN + warp * kTileN + lane / 4;
#pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk) {
          multiply_chunk<T, Bits, Tokens, Chunk>(problem.p, total[half], part, words, chunk * Chunk,
                                                 x + chunk * Chunk * (kSliceK * 2 >> 4),
                                                 stage + S::kX + S::kW + chunk * S::kGrid, row);
        }
      }
      async_proxy_fence();  // copies will overwrite what ordinary loads have read
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty + 8 * turn.stage);
      turn.next(S::kStages);
    }
    if (problem.p.chunks > 1) {
      join_splits<T, Tokens>(total, problem, item, out, join, consumer, warp);
    } else {
      store_outputs<T, Tokens, S::kRow>(total, problem, item, out + consumer * S::kOut, consumer);
    }
  }
  // Others may still read this block's shared memory.
  if (problem.p.chunks > 1) mbarrier_wait_cluster(join.read, join.parity ^ 1);
}

template <class T, int Bits, int Tokens, int Chunk>
__global__ void __launch_bounds__(kThreads, 1)
    linear_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ Problem problem) {
  using S = Shared<Bits, Tokens, Chunk>;
  HF_GPTQ_SHARED(shared);
  const uint32_t window = window_address(shared);
  unsigned char* stages = shared + ((window + 1023) / 1024 * 1024 - window);
  unsigned char* out = stages + S::kStages * S::kStage;
  unsigned char* control = out + kConsumers * S::kOut;
  const uint32_t full = window_address(control), empty = full + 8 * S::kStages;
  const Join join = {empty + 8 * S::kStages, empty + 8 * S::kStages + 8};
  // The same in every lane, and the compiler knows it.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 % 4, 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      mbarrier_init(full + 8 * stage, kProducers);
      mbarrier_init(empty + 8 * stage, kConsumers * 4);
    }
    mbarrier_init(join.ready, problem.p.chunks * kConsumers * 4);
    mbarrier_init(join.read, problem.p.chunks * kConsumers * 4);
    mbarrier_init_fence();
  }
  if (problem.p.chunks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (warpgroup == kConsumers) {
    registers_give<40>();
    if (problem.bulk_grid) {
      produce<Bits, Tokens, Chunk, true>(&x, problem, stages, full, empty, warp);
    } else {
      produce<Bits, Tokens, Chunk, false>(&x, problem, stages, full, empty, warp);
    }
  } else {
    registers_take<232>();
    consume<T, Bits, Tokens, Chunk>(problem, stages, full, empty, join, out, warpgroup, warp);
  }
}

}  // namespace hopper
}  // namespace hf_gptq

#endif  // HF_GPTQ_HOPPER_KERNEL_H_
