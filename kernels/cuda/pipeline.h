// What the narrow and the wide kernel share: how a warp's scales and zeros come through shared
// memory, and, for the wide one, its codes and the arithmetic on one tile. Both keep one order of
// operations per output:
//
//   for the slices of the chunk, upwards:   group += A B        (tensor core, exact integers q - z)
//   at the end of a group, and of the chunk: total = fma(scale, group, total);  group = 0
//
// A stage of the pipeline holds, per warp, the codes of NT tiles and the scales and zeros of the
// groups that begin in them.
#ifndef HF_GPTQ_PIPELINE_H_
#define HF_GPTQ_PIPELINE_H_

#include <math.h>

#include "decode.h"
#include "hf_gptq.h"
#include "linear.h"

namespace hf_gptq {

// Where a tile begins among the groups; moved on from it, as a division costs too much.
struct GroupCursor {
  int run, slice;  // run of the tile's first slice, and that slice's number within it

  __device__ __forceinline__ GroupCursor(const LinearArguments& p, int tile)
      : run(tile * kSlices / p.group_slices), slice(tile * kSlices % p.group_slices) {}

  __device__ __forceinline__ void advance(const LinearArguments& p, int slices) {
    slice += slices;
    while (slice >= p.group_slices) {
      slice -= p.group_slices;
      ++run;
    }
  }
};

// Groups that one tile can touch.
HF_GPTQ_HD static constexpr int groups_per_tile(int group_slices) {
  return group_slices % kSlices == 0 ? 1 : group_slices == 1 ? 4 : 2;
}

// One warp's part of a stage: NT tiles of codes, then the grids of the groups.
template <int Bits, int NT>
struct WarpStage {
  static constexpr int kOutputs = kTileN * NT;
  static constexpr int kCodeWords = tile_words(Bits) * NT;
  // Words of qzeros that cover kOutputs fields; n is a multiple of kOutputs.
  static constexpr int kZeroWords = NT % 2 == 0 ? Bits * NT / 2 : Bits == 3 ? 2 : Bits / 2;

  HF_GPTQ_HD static constexpr int scale_words(int scale_dtype) {
    return kOutputs / (scale_dtype == HF_GPTQ_FP32 ? 1 : 2);
  }

  HF_GPTQ_HD static constexpr int grid_words(int scale_dtype) {
    return scale_words(scale_dtype) + (kZeroWords + 3) / 4 * 4;
  }

  HF_GPTQ_HD static constexpr int words(int scale_dtype, int group_slices) {
    return kCodeWords + groups_per_tile(group_slices) * grid_words(scale_dtype);
  }

  // Starts the copies of tile `tile` of the warp's outputs; `first` where no tile came before it.
  static __device__ __forceinline__ void fetch(const LinearArguments& p, uint32_t* stage,
                                               int n_tile, int tile, GroupCursor at, bool first,
                                               int lane) {
    const uint32_t* codes = p.tiles + tile_index(n_tile, tile, p.k_tiles) * tile_words(Bits);
#pragma unroll
    for (int i = 0; i < (kCodeWords + 127) / 128; ++i) {
      const int word = 4 * (lane + 32 * i);
      if (word < kCodeWords) copy_async<16>(stage + word, codes + word, 16);
    }
    uint32_t* grid = stage + kCodeWords;
    const int n = n_tile * kTileN;
    bool begins = first || at.slice == 0;
    int ahead = p.group_slices - at.slice;  // slices before the next group
    for (int run = at.run;; ++run) {
      if (begins) fetch_grid(p, grid, n, run, lane);
      if (ahead >= kSlices) break;
      grid += grid_words(p.scale_dtype);
      ahead += p.group_slices;
      begins = true;
    }
  }

  // Starts the copies of the scales and zeros of a run, shared by `Lanes` lanes.
  template <int Lanes = 32>
  static __device__ __forceinline__ void fetch_grid(const LinearArguments& p, uint32_t* grid, int n,
                                                    int run, int lane) {
    run = run < p.runs ? run : p.runs - 1;
    const int64_t group = p.group_map ? p.group_map[run] : run;
    const int valid = p.N - n;  // may be more than the warp takes
    if (p.scale_dtype == HF_GPTQ_FP32) {
      const float* scales = static_cast<const float*>(p.scales) + group * p.N + n;
      for (int i = lane; i < kOutputs; i += Lanes) {
        copy_async<4>(grid + i, i < valid ? static_cast<const void*>(scales + i) : p.scales,
                      i < valid ? 4 : 0);
      }
    } else {
      const uint16_t* scales = static_cast<const uint16_t*>(p.scales) + group * p.N + n;
      if (p.N % 2 == 0) {
        for (int i = lane; i < kOutputs / 2; i += Lanes) {
          copy_async<4>(grid + i,
                        2 * i < valid ? static_cast<const void*>(scales + 2 * i) : p.scales,
                        2 * i < valid ? 4 : 0);
        }
      } else {  // rows of scales begin at odd addresses: no async copy
        for (int i = lane; i < kOutputs; i += Lanes) {
          reinterpret_cast<uint16_t*>(grid)[i] = i < valid ? scales[i] : uint16_t(0);
        }
      }
    }
    if (p.qzeros && lane < kZeroWords) {
      const int word = n * Bits / 32 + lane;
      const uint32_t* zeros = p.qzeros + group * p.zero_words;
      copy_async<4>(grid + scale_words(p.scale_dtype) + lane,
                    word < p.zero_words ? zeros + word : p.qzeros, word < p.zero_words ? 4 : 0);
    }
  }
};

// One warp's sums: NT tiles of 16 outputs x MT tiles of 8 tokens.
template <class T, int Bits, int NT, int MT>
struct WarpSums {
  using Stage = WarpStage<Bits, NT>;

  float total[NT][MT][4];
  float group[NT][MT][4];
  float scale[NT][2];    // of outputs g and g + 8 of each tile, g = lane / 4
  uint32_t zero[NT][2];  // as decode_slice takes them

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[nt][mt][i] = group[nt][mt][i] = 0.0f;
      }
    }
  }

  // Ends a group.
  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[nt][mt][i] = fmaf(scale[nt][i / 2], group[nt][mt][i], total[nt][mt][i]);
          group[nt][mt][i] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void load_grid(const LinearArguments& p, const uint32_t* grid, int n,
                                            int lane) {
    const uint32_t* zeros = grid + Stage::scale_words(p.scale_dtype);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int output = nt * kTileN + lane / 4 + 8 * half;
        scale[nt][half] = load_scale(grid, output, p.scale_dtype);
        const uint32_t value = p.qzeros
                                   ? load_zero<Bits>(zeros, output, n * Bits % 32) + p.zero_offset
                                   : 1u << (Bits - 1);
        zero[nt][half] = zero_register<T, Bits>(value);
      }
    }
  }

  // Adds a tile. `x` is the tile's activations [8 MT][64], rows of 128 bytes whose 16-byte pieces
  // are swizzled: piece c of row r lies at c ^ (r % 8).
  __device__ __forceinline__ void add_tile(const LinearArguments& p, const uint32_t* stage,
                                           const unsigned char* x, int n, GroupCursor at,
                                           bool first, int lane) {
    LaneWords<Bits> words[NT];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      words[nt] = LaneWords<Bits>::load(stage + nt * tile_words(Bits), lane);
    }
    const uint32_t* grid = stage + Stage::kCodeWords;
    uint32_t b[MT == 1 ? 2 : MT / 2][4];
    int slice_in_group = at.slice;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      load_activations(b, x, slice, lane);
      if (slice_in_group == 0 || (first && slice == 0)) {
        if (!(first && slice == 0)) flush();
        load_grid(p, grid, n, lane);
      }
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        uint32_t a[4];
        decode_slice<T, Bits>(words[nt], slice, zero[nt][0], zero[nt][1], a);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          const uint32_t* pair = MT == 1 ? b[slice / 2] + slice % 2 * 2 : b[mt / 2] + mt % 2 * 2;
          multiply_add(group[nt][mt], a, pair[0], pair[1], T());
        }
      }
      if (++slice_in_group == p.group_slices) {
        slice_in_group = 0;
        grid += Stage::grid_words(p.scale_dtype);
      }
    }
  }

  // Operand B of a slice; with one token tile, of two slices at a time.
  template <int Count>
  static __device__ __forceinline__ void load_activations(uint32_t (&b)[Count][4],
                                                          const unsigned char* x, int slice,
                                                          int lane) {
    const int matrix = lane / 8, row = lane % 8;
    if (MT == 1) {
      if (slice % 2 == 0) {
        load_matrices(b[slice / 2], x + 128 * row + 16 * ((2 * slice + matrix) ^ row));
      }
    } else {
#pragma unroll
      for (int i = 0; i < MT / 2; ++i) {
        const int token = 8 * (2 * i + matrix / 2) + row;
        load_matrices(b[i], x + 128 * token + 16 * ((2 * slice + matrix % 2) ^ row));
      }
    }
  }
};

// Starts the copy of one 16-byte piece of the activations of a tile, zeros beyond the edges.
HF_GPTQ_DEVICE void fetch_piece(const LinearArguments& p, unsigned char* x, int row, int piece,
                                int first_row, int tile) {
  const int column = tile * kTileK + 8 * piece;
  int valid = first_row + row < p.M ? p.x_columns - column : 0;
  valid = valid < 0 ? 0 : valid > 8 ? 8 : valid;
  const uint16_t* from = valid ? p.x + (first_row + row) * p.x_stride + column : p.x;
  copy_async<16>(x + 128 * row + 16 * (piece ^ row % 8), from, 2 * valid);
}

// Waits until the oldest of the `stages - 1` stages under way has arrived.
HF_GPTQ_DEVICE void wait_stage(int stages) {
  if (stages >= 8) {
    wait_copies<6>();
  } else if (stages >= 6) {
    wait_copies<4>();
  } else if (stages >= 4) {
    wait_copies<2>();
  } else if (stages == 3) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
}

// Stages of `bytes` each that fit, of the numbers that wait_stage knows, `most` at most; 0: not
// even two.
static inline int fitting_stages(int bytes, int available, int most = 8) {
  for (const int stages : {8, 6, 4, 3, 2}) {
    if (stages <= most && stages * bytes <= available) return stages;
  }
  return 0;
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_PIPELINE_H_
