// The kernel for very few rows.
//
// A block of eight warps takes 8 / chunks tiles of 16 outputs; each warp one tile and one chunk of
// K. Warps share nothing until the end, so that each runs its own pipeline without a barrier:
//
//            chunk 0   chunk 1   ..        K ->
//   tile 0  | warp 0 | warp 1 | .. |   sums through shared memory, chunk 0 first
//   tile 1  | ..
//
// Memory is the limit only where few instructions go with its bytes: on an H200 some 80 with the
// 1024 codes of a tile. So codes come straight into the registers that they are decoded from,
// kAhead tiles ahead; activations, scales and zeros come through shared memory, a stage of eight
// tiles at a time; and whether a group ends is asked once per tile.
#ifndef HF_GPTQ_NARROW_H_
#define HF_GPTQ_NARROW_H_

#include "launch.h"
#include "pipeline.h"

namespace hf_gptq {

// `Whole`: groups are of whole tiles.
template <class T, int Bits, bool Whole>
struct Narrow {
  using Stage = WarpStage<Bits, 1>;
  static constexpr int kStageSlices = kNarrowTiles * kSlices;
  static constexpr int kAhead = Bits == 8 ? 4 : 8;  // tiles whose codes are on their way
  static constexpr int kTileStride = kPanelTiles * tile_words(Bits);
  static constexpr int kRowWords = kNarrowTiles * kTileK / 2;
  static_assert(kNarrowRows == 4, "the swizzle keeps four rows apart");
  static_assert(Stage::grid_words(HF_GPTQ_FP16) == narrow_grid_words(HF_GPTQ_FP16) &&
                    Stage::grid_words(HF_GPTQ_FP32) == narrow_grid_words(HF_GPTQ_FP32),
                "what the choice of a regime counts with");

  // Starts the copies of a stage: the rows of activations, zeros beyond their end, in 16-byte
  // pieces (piece c of row r lies at c ^ r), and the grids of the groups that the stage touches.
  static __device__ __forceinline__ void fetch(const LinearArguments& p, uint32_t* stage, int n,
                                               int tile, GroupCursor at, int lane) {
#pragma unroll
    for (int part = 0; part < kNarrowTiles / 4; ++part) {
      const int piece = 32 * part + lane, column = tile * kTileK + 8 * piece;
      int valid = p.x_columns - column;
      valid = valid < 0 ? 0 : valid > 8 ? 8 : valid;
      const uint16_t* x = valid ? p.x + column : p.x;
      const int64_t pitch = valid ? p.x_stride : 0;
      for (int row = 0; row < p.M; ++row) {
        copy_async<16>(stage + row * kRowWords + 4 * (piece ^ row), x + row * pitch, 2 * valid);
      }
    }
    // Eight lanes for each group.
    uint32_t* grid = stage + p.M * kRowWords + lane / 8 * Stage::grid_words(p.scale_dtype);
    for (int i = lane / 8; i * p.group_slices - at.slice < kStageSlices; i += 4) {
      Stage::template fetch_grid<8>(p, grid, n, at.run + i, lane % 8);
      grid += 4 * Stage::grid_words(p.scale_dtype);
    }
  }

  // Where this lane finds its two scales and zeros in a grid.
  struct Place {
    int scale, high_scale;  // bytes, of outputs g and g + 8, g = lane / 4
    int zero[2], shift[2];  // words and bits

    __device__ __forceinline__ Place(const LinearArguments& p, int n, int lane) {
      const int element = p.scale_dtype == HF_GPTQ_FP32 ? 4 : 2;
      scale = lane / 4 * element;
      high_scale = scale + 8 * element;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int bit = n * Bits % 32 + (lane / 4 + 8 * half) * Bits;
        zero[half] = Stage::scale_words(p.scale_dtype) + bit / 32;
        shift[half] = bit % 32;
      }
    }
  };

  // A warp on its way through its chunk.
  struct Walk {
    LaneWords<Bits> codes[kAhead];
    const uint32_t* ahead;  // the tile that lies kAhead tiles after the stage's first
    int tiles;              // of the chunk
    float total[4], group[4];
    float scale[2];    // of outputs g and g + 8
    uint32_t zero[2];  // as decode_slice takes them
    int left, skip;    // slices until the group ends; slices of the first that lie before the chunk

    __device__ __forceinline__ void flush() {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[i] = fmaf(scale[i / 2], group[i], total[i]);
        group[i] = 0.0f;
      }
    }

    // Ends a group and begins the one that `grid` is of.
    __device__ __forceinline__ void next_group(const LinearArguments& p, const uint32_t*& grid,
                                               const Place& place) {
      flush();
      const unsigned char* scales = reinterpret_cast<const unsigned char*>(grid);
      if (p.scale_dtype == HF_GPTQ_FP32) {
        scale[0] = *reinterpret_cast<const float*>(scales + place.scale);
        scale[1] = *reinterpret_cast<const float*>(scales + place.high_scale);
      } else {
        const uint16_t low = *reinterpret_cast<const uint16_t*>(scales + place.scale);
        const uint16_t high = *reinterpret_cast<const uint16_t*>(scales + place.high_scale);
        const bool half = p.scale_dtype == HF_GPTQ_FP16;
        scale[0] = half ? to_float(low, Half()) : to_float(low, Bfloat16());
        scale[1] = half ? to_float(high, Half()) : to_float(high, Bfloat16());
      }
      if (p.qzeros) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          zero[half] = zero_register<T, Bits>(
              load_field<Bits>(grid + place.zero[half], place.shift[half]) + p.zero_offset);
        }
      }
      left = p.group_slices - skip;
      skip = 0;
      grid += Stage::grid_words(p.scale_dtype);
    }

    // Adds the tiles of a stage, from `tile` of the chunk. `x` is where this lane's row of operand
    // B begins in it.
    __device__ __forceinline__ void add_stage(const LinearArguments& p, const uint32_t* stage,
                                              int x, int tile, const Place& place, int lane) {
      const unsigned char* row = reinterpret_cast<const unsigned char*>(stage) + x;
      const uint32_t* grid = stage + p.M * kRowWords;
      if (left != 0) grid += Stage::grid_words(p.scale_dtype);  // the first one is in use
#pragma unroll
      for (int j = 0; j < kNarrowTiles; ++j) {
        if (tile + j >= tiles) break;
        uint32_t b[2][4];
        load_matrices(b[0], row + 128 * j);
        load_matrices(b[1], row + 128 * j + 64);
        if (Whole) {
          if (left == 0) next_group(p, grid, place);
          left -= kSlices;
        }
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          if (!Whole) {
            if (left == 0) next_group(p, grid, place);
            --left;
          }
          uint32_t a[4];
          decode_slice<T, Bits>(codes[j % kAhead], slice, zero[0], zero[1], a);
          multiply_add(group, a, b[slice / 2][slice % 2 * 2], b[slice / 2][slice % 2 * 2 + 1], T());
        }
        if (tile + j + kAhead < tiles) {
          codes[j % kAhead] = LaneWords<Bits>::load_once(ahead + j * kTileStride, lane);
        }
      }
      ahead += kNarrowTiles * kTileStride;
    }
  };

  static __device__ __forceinline__ void run(const LinearArguments& p) {
    HF_GPTQ_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunk = warp % p.chunks, tiles_per_block = kWarps / p.chunks;
    const int n_tile = blockIdx.x * tiles_per_block + warp / p.chunks;
    const int n = n_tile * kTileN;
    const int words = narrow_stage_words(p.M, p.scale_dtype, p.group_slices);
    uint32_t* stages = reinterpret_cast<uint32_t*>(shared) + warp * p.stages * words;

    Walk walk;
#pragma unroll
    for (int i = 0; i < 4; ++i) walk.total[i] = walk.group[i] = 0.0f;
    if (n < p.N) {
      const int begin = static_cast<int>(chunk_begin(chunk, p.chunks, p.k_tiles));
      const int tiles = static_cast<int>(chunk_begin(chunk + 1, p.chunks, p.k_tiles)) - begin;
      const uint32_t* first = p.tiles + tile_index(n_tile, begin, p.k_tiles) * tile_words(Bits);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i < tiles) walk.codes[i] = LaneWords<Bits>::load_once(first + i * kTileStride, lane);
      }
      walk.ahead = first + kAhead * kTileStride;
      walk.tiles = tiles;
      walk.scale[0] = walk.scale[1] = 0.0f;
      walk.zero[0] = walk.zero[1] = zero_register<T, Bits>(1u << (Bits - 1));
      walk.left = 0;
      GroupCursor at(p, begin);
      walk.skip = at.slice;
      int fetched = 0, write = 0, read = 0;
      const auto fetch_next = [&] {
        if (fetched < tiles) fetch(p, stages + write * words, n, begin + fetched, at, lane);
        commit_copies();
        at.advance(p, kStageSlices);
        fetched += kNarrowTiles;
        if (++write == p.stages) write = 0;
      };
      for (int i = 1; i < p.stages; ++i) fetch_next();
      // Rows that do not exist are not kept up: their sums repeat row 0's, and nobody reads them.
      const int row = lane % 8 < p.M ? lane % 8 : 0;
      const int x = row * kRowWords * 4 + 16 * (lane / 8 ^ row);
      const Place place(p, n, lane);
      const auto next_stage = [&]() -> const uint32_t* {
        wait_stage(p.stages);
        __syncwarp();  // the stage has arrived for all lanes, and all are done with the one before
        fetch_next();
        const uint32_t* stage = stages + read * words;
        if (++read == p.stages) read = 0;
        return stage;
      };
      for (int tile = 0; tile < tiles; tile += kNarrowTiles) {
        walk.add_stage(p, next_stage(), x, tile, place, lane);
      }
      walk.flush();
    }
    wait_copies<0>();
    __syncthreads();

    // The stages are done with; their place takes the chunks' sums, [warp][token][output].
    float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int output = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
      if (token < kNarrowRows) {
        partial[(warp * kNarrowRows + token) * kTileN + output] = walk.total[i];
      }
    }
    __syncthreads();
    const int outputs = tiles_per_block * kTileN;
    for (int i = threadIdx.x; i < outputs * p.M; i += kThreads) {
      const int token = i / outputs, output = i % outputs;
      const int column = blockIdx.x * outputs + output;
      if (column >= p.N) continue;
      const int first = output / kTileN * p.chunks;
      float sum = 0.0f;
      for (int c = 0; c < p.chunks; ++c) {
        const float value = partial[((first + c) * kNarrowRows + token) * kTileN + output % kTileN];
        sum = c == 0 ? value : sum + value;
      }
      if (p.bias) sum += to_float(p.bias[column], T());
      p.y[static_cast<int64_t>(token) * p.N + column] = from_float(sum, T());
    }
  }
};

template <class T, int Bits, bool Whole>
__global__ void __launch_bounds__(kThreads, 2) narrow_kernel(const LinearArguments p) {
  Narrow<T, Bits, Whole>::run(p);
}

template <class T, int Bits>
static cudaError_t launch_narrow(LinearArguments& p, const Device& device, cudaStream_t stream) {
  const int stage_bytes = narrow_stage_words(p.M, p.scale_dtype, p.group_slices) * 4 * kWarps;
  const int reduce_bytes = kWarps * kNarrowRows * kTileN * 4;
  // Two blocks on a multiprocessor hide each other's start and end.
  p.stages = fitting_stages(stage_bytes, device.shared_bytes / 2 - 1024, 3);
  if (!p.stages) p.stages = fitting_stages(stage_bytes, device.shared_bytes, 3);
  if (!p.stages) return cudaErrorInvalidValue;
  const int bytes = p.stages * stage_bytes;
  const int64_t tiles_per_block = kWarps / p.chunks;
  const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.N, kTileN), tiles_per_block)));
  return hf_gptq_launch(
      p.group_slices % kSlices == 0 ? narrow_kernel<T, Bits, true> : narrow_kernel<T, Bits, false>,
      grid, dim3(kThreads), bytes > reduce_bytes ? bytes : reduce_bytes, stream, p);
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_NARROW_H_
