// What the two ways to compute a product share. Internal linkage, see isa.h.
//
// x is packed in row blocks, one after the other: row r of step i at i * rows + r of a block of
// `rows` rows.
#ifndef HF_GPTQ_CPU_LINEAR_JOB_H_
#define HF_GPTQ_CPU_LINEAR_JOB_H_

#include "bytes.h"
#include "fixed.h"
#include "parallel.h"
#include "row_blocks.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Register blocking: kTileRows x kTileBlocks blocks of accumulators in tile(), and in stream() as
// many blocks as hide the latency of the fma chain.
#if defined(HF_GPTQ_EMULATE)
// Every vector is two: what is fast elsewhere would take minutes to compile.
constexpr int kTileRows = 3, kTileBlocks = 2;
constexpr int kStreamRows = 2;
constexpr int stream_blocks(int /*rows*/) { return 2; }
#elif defined(HF_GPTQ_SIMD_AVX512F)
constexpr int kTileRows = 12, kTileBlocks = 2;
constexpr int kStreamRows = 12;
constexpr int stream_blocks(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : rows <= 6 ? 2 : 1; }
#elif defined(HF_GPTQ_SIMD_AVX2)
constexpr int kTileRows = 6, kTileBlocks = 1;
constexpr int kStreamRows = 4;
constexpr int stream_blocks(int rows) { return rows <= 2 ? 2 : 1; }
#else
constexpr int kTileRows = 3, kTileBlocks = 1;
constexpr int kStreamRows = 2;
constexpr int stream_blocks(int /*rows*/) { return 1; }
#endif

// Integers are added in one cycle, so that one block is enough; its words follow each other in
// memory. fp32 takes registers for its constants, 3 bits for the words of a unit.
template <class Codes>
constexpr int stream_blocks(int rows) {
  if (Codes::kFixed) return 1;
  const bool fp32 = Codes::kCodes == 1, three = words_per_unit(Codes::kBits) > 1;
  const int most = fp32 && three && rows > 2 ? 2 : fp32 || three ? 4 : 8;
  return stream_blocks(rows) < most ? stream_blocks(rows) : most;
}
// Rows for whose sums of integers there are registers twice, see Fixed::walk.
constexpr int kTwoPlacesRows = 2;
// Packed x of a row task of stream(), which stays in L2.
constexpr int64_t kStreamedFloats = int64_t{1} << 16;

static_assert(kTileRows <= kLanes && kStreamRows <= kLanes, "what interleave() takes");
constexpr int kTileColumns = kTileBlocks * kBlockColumns;
constexpr int kTileVectors = kTileColumns / kLanes;
constexpr int kGroupBlocks = 8;
constexpr int kGroupPanels = kGroupBlocks / kTileBlocks;
// A panel takes kChunk * kTileColumns * 4 bytes, 16 KiB at most.
constexpr int kChunk = 128;
// Runs per chunk: bounds the scales kept beside a chunk.
constexpr int kChunkRuns = 8;
// Row blocks of one task: 240 rows, whose chunk of x stays in L2.
constexpr int64_t kTaskRowBlocks = 240 / kTileRows;
// Row blocks packed at a time, at most: bounds the memory for x.
constexpr int64_t kSlabRowBlocks = 4 * kTaskRowBlocks;
// Tasks wanted, so that an unknown number of threads finishes together.
constexpr int64_t kWantedTasks = 64;

struct Stretches {
  const Stretch* data;
  int64_t count;
  int64_t steps;  // of all
};

struct LinearJob {
  const LinearArguments& a;
  Stretches stretches;
  int64_t row_begin;  // first row of the slab
  RowBlocks rows;     // of the slab
  const float* x;     // packed slab
  FixedRows fixed;    // for Codes::kFixed
  ByteRows bytes;     // for Codes::kBytes
  int64_t task_row_blocks;
};

HF_GPTQ_INLINE int64_t grain_for(int64_t work_per_task) {
  return ceil_div(kWantedWork, work_per_task);
}

// Row blocks of a task, beside `groups` groups of columns: enough row tasks for the wanted number
// in all, of at least 4 row blocks each so that decoding stays a small part, of equal size, and of
// no more than `most` row blocks, what a task's scratch is meant for.
HF_GPTQ_INLINE int64_t row_blocks_of_task(int64_t row_blocks, int64_t groups, int64_t most) {
  const int64_t tasks = min64(ceil_div(kWantedTasks, groups), ceil_div(row_blocks, 4));
  const int64_t least = ceil_div(row_blocks, most);
  return ceil_div(row_blocks, tasks < least ? least : tasks);
}

// Writes `rows` rows of `count` columns, a multiple of kLanes, to y, N apart, as bf16.
void write_bf16(const float* total, int64_t stride, int rows, int64_t count, uint16_t* y,
                int64_t N) {
  for (int r = 0; r < rows; ++r, total += stride, y += N) {
    for (int64_t c = 0; c < count; c += kLanes) floats_to_bf16(load(total + c), y + c);
  }
}

// Adds the bias to `count` columns of `rows` rows from (m, column) on, and writes them. total:
// [rows, stride].
void write_rows(const LinearArguments& a, int64_t m, int rows, int64_t column, int64_t count,
                float* total, int64_t stride) {
  if (a.bias) {
    float bias[kTileColumns];
    to_float(a.bias, a.dtype, column, count, bias);
    for (int r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < count; ++c) total[r * stride + c] += bias[c];
    }
  }
  const int64_t N = a.weight.N, first = m * N + column;
  if (a.dtype == HF_GPTQ_BF16 && count % kLanes == 0) {
    write_bf16(total, stride, rows, count, static_cast<uint16_t*>(a.y) + first, N);
    return;
  }
  for (int r = 0; r < rows; ++r) {
    from_float(total + r * stride, count, a.y, a.dtype, first + r * N);
  }
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_LINEAR_JOB_H_
