// Rows cut into blocks. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_ROW_BLOCKS_H_
#define HF_GPTQ_CPU_ROW_BLOCKS_H_

#include "simd.h"

namespace hf_gptq {
namespace {

// Blocks of nearly equal size: 13 rows, at most 12 together, are 7 + 6 and not 12 + 1.
struct RowBlocks {
  int64_t all;     // rows
  int64_t count;   // blocks
  int largest;     // rows of the first blocks; the others have one less
  int64_t larger;  // how many of them

  RowBlocks(int64_t rows, int most)
      : all(rows),
        count(ceil_div(rows, most)),
        largest(static_cast<int>(ceil_div(rows, count))),
        larger(rows - count * (largest - 1)) {}

  int size(int64_t block) const { return block < larger ? largest : largest - 1; }
  // The first row of a block; of the block after the last, all.
  int64_t begin(int64_t block) const { return block * (largest - 1) + min64(block, larger); }
};

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_ROW_BLOCKS_H_
