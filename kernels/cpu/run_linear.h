// A product with codes of one kind, from x to y. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_RUN_LINEAR_H_
#define HF_GPTQ_CPU_RUN_LINEAR_H_

#include "panels.h"
#include "stream.h"

namespace hf_gptq {
namespace {

// The memory of FixedRows for some rows, that of x ahead of it.
class FixedMemory {
 public:
  FixedMemory(int64_t row_blocks, int64_t rows, int64_t steps, int64_t stretches)
      : x_(rows * steps),
        numbers_(rows * stretches),
        lists_(row_blocks * stretches),
        buffer_((2 * x_ + 3 * numbers_ + lists_) * sizeof(float) + row_blocks * steps) {}
  bool valid() const { return buffer_.data() != nullptr; }
  FixedRows rows() const {
    float* high = static_cast<float*>(buffer_.data());
    float* scales = high + 2 * x_;
    int32_t* sums = reinterpret_cast<int32_t*>(scales + numbers_);
    int32_t* listed = sums + 2 * numbers_;
    return {high, high + x_, scales, sums, reinterpret_cast<uint8_t*>(listed + lists_), listed};
  }

 private:
  int64_t x_, numbers_, lists_;
  Buffer buffer_;
};

// Row m of x in fp32, in the order of the codes. memory: K floats, with a permutation 2 K.
const float* ordered_row(const LinearArguments& a, int64_t m, float* memory) {
  const int64_t K = a.weight.K;
  to_float(a.x, a.dtype, m * a.x_row_stride, K, memory);
  const int32_t* perm = a.weight.perm;
  if (!perm) return memory;
  float* ordered = memory + K;
  for (int64_t i = 0; i < K; ++i) ordered[i] = memory[perm[i]];
  return ordered;
}

// Floats that ordered_row() needs.
int64_t ordered_floats(const hf_gptq_weight& w) { return w.perm ? 2 * w.K : w.K; }

// A row block as integers.
template <class Codes>
bool pack_fixed(const LinearJob& job, int64_t block) {
  const LinearArguments& a = job.a;
  const int64_t steps = job.stretches.steps, count = job.stretches.count;
  const int64_t first_row = job.rows.begin(block), ordered = ordered_floats(a.weight);
  const int rows = job.rows.size(block);
  float* memory = static_cast<float*>(thread_scratch((ordered + 2 * rows * steps) * sizeof(float)));
  if (!memory) return false;
  float* const high = job.fixed.high + first_row * steps;
  float* const low = job.fixed.low + first_row * steps;
  float* const high_rows = rows == 1 ? high : memory + ordered;
  float* const low_rows = rows == 1 ? low : high_rows + rows * steps;
  int32_t* const listed = job.fixed.listed + block * count;
  memset(listed, 0, count * sizeof(int32_t));
  bool any = false;
  for (int r = 0; r < rows; ++r) {
    const float* row = ordered_row(a, job.row_begin + first_row + r, memory);
    for (int64_t s = 0; s < count; ++s) {
      const Stretch& stretch = job.stretches.data[s];
      const int64_t at = r * steps + stretch.begin, number = first_row * count + s * rows;
      int32_t* sums = job.fixed.sums + 2 * number + r;
      const bool has_low = Codes::pack(row, stretch, high_rows + at, low_rows + at,
                                       job.fixed.scales + number + r, sums, sums + rows);
      listed[s] |= has_low;
      any |= has_low;
    }
  }
  if (rows > 1) interleave(high_rows, steps, rows, steps, high);
  if (rows > 1 && any) interleave(low_rows, steps, rows, steps, low);
  return true;
}

// The steps of a packed row block that have a low part in any row, where `listed` says that some
// do.
void list_fixed_steps(const LinearJob& job, int64_t block) {
  const int rows = job.rows.size(block);
  for (int64_t s = 0; s < job.stretches.count; ++s) {
    if (job.fixed.listed[block * job.stretches.count + s] == 0) continue;
    const Stretch& stretch = job.stretches.data[s];
    uint8_t* list = job.fixed.list + block * job.stretches.steps + stretch.begin;
    const float* low =
        job.fixed.low + job.rows.begin(block) * job.stretches.steps + stretch.begin * rows;
    int32_t listed = 0;
    for (int64_t i = 0; i < stretch.end - stretch.begin; ++i) {
      uint32_t any = 0;
      for (int r = 0; r < rows; ++r) any |= float_bits(low[i * rows + r]);
      list[listed] = static_cast<uint8_t>(i);
      listed += any != 0;
    }
    job.fixed.listed[block * job.stretches.count + s] = listed;
  }
}

// A row block as integers of 8 bits, to `packed`.
template <class Codes>
bool pack_bytes(const LinearJob& job, int64_t block, float* packed) {
  const LinearArguments& a = job.a;
  const int64_t steps = job.stretches.steps, first_row = job.rows.begin(block);
  const int rows = job.rows.size(block);
  const int64_t ordered = ordered_floats(a.weight);
  float* memory = static_cast<float*>(thread_scratch((ordered + rows * steps) * sizeof(float)));
  if (!memory) return false;
  float* copy = rows == 1 ? packed : memory + ordered;
  for (int r = 0; r < rows; ++r) {
    const float* row = ordered_row(a, job.row_begin + first_row + r, memory);
    for (int64_t s = 0; s < job.stretches.count; ++s) {
      const Stretch& stretch = job.stretches.data[s];
      const int64_t number = first_row * job.stretches.count + s * rows + r;
      Codes::pack(row, stretch, copy + r * steps + stretch.begin, job.bytes.scales + number,
                  job.bytes.offsets + number);
    }
  }
  if (rows > 1) interleave(copy, steps, rows, steps, packed);
  return true;
}

struct PackJob {
  const LinearJob& job;
  float* packed;
};

// Packs row blocks [begin, end) of the slab.
template <class Codes>
int pack_x(int64_t begin, int64_t end, const void* context) {
  const LinearJob& job = static_cast<const PackJob*>(context)->job;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first_row = job.rows.begin(block);
    const int rows = job.rows.size(block);
    float* packed = static_cast<const PackJob*>(context)->packed + first_row * job.stretches.steps;
    if constexpr (Codes::kFixed) {
      if (!pack_fixed<Codes>(job, block)) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
      list_fixed_steps(job, block);
    } else if constexpr (Codes::kBytes) {
      if (!pack_bytes<Codes>(job, block, packed)) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
    } else if (!Codes::pack(job.a, job.row_begin + first_row, rows, job.stretches.steps, packed)) {
      return HF_GPTQ_ERROR_OUT_OF_MEMORY;
    }
  }
  return HF_GPTQ_OK;
}

// Stretches at most: a run may begin within a unit, and has at least one part.
int64_t most_stretches(const LinearArguments& a) { return 2 * a.runs.count + a.weight.K / 256; }

// Writes the stretches of the runs.
template <class Codes>
Stretches find_stretches(const Runs& runs, Stretch* stretches) {
  Stretches found{stretches, 0, 0};
  for (int64_t i = 0; i < runs.count; ++i) {
    const Run& run = runs.data[i];
    for (int64_t code = Codes::first(run); code < run.end;) {
      const int64_t end = code + min64(run.end - code, Codes::kMostCodes);
      const Run part{code < run.begin ? run.begin : code, end, run.group};
      const int64_t step = found.steps + Codes::steps(part);
      stretches[found.count++] = {found.steps, step, code, run.group, part.begin, part.end};
      found.steps = step;
      code = end;
    }
  }
  return found;
}

template <class Codes>
int run_linear(const LinearArguments& a, const Stretches& stretches) {
  const bool streamed = a.M <= Codes::kMostStreamedRows;
  const int most_rows = streamed ? kStreamRows : kTileRows;
  if (Codes::kCodes == 1 && a.M == 1 && a.dtype == HF_GPTQ_FP32 && !a.weight.perm) {
    const float* x = static_cast<const float*>(a.x);
    return run_stream<Codes, 1>({a, stretches, 0, {1, 1}, x, {}, {}, 1});
  }
  const int64_t slab_rows = ceil_div(a.M, ceil_div(a.M, kSlabRowBlocks * most_rows));
  const int64_t steps = stretches.steps;
  const FixedMemory fixed_memory(Codes::kFixed ? ceil_div(slab_rows, most_rows) : 0,
                                 Codes::kFixed ? slab_rows : 0, steps, stretches.count);
  const int64_t numbers = Codes::kBytes ? slab_rows * stretches.count : 0;
  const Buffer buffer(Codes::kFixed ? 0 : (slab_rows * steps + 2 * numbers) * sizeof(float));
  if (!fixed_memory.valid() || !buffer.data()) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  const FixedRows fixed = fixed_memory.rows();
  float* packed = Codes::kFixed ? fixed.high : static_cast<float*>(buffer.data());
  float* of_bytes = packed + slab_rows * steps;
  const ByteRows bytes{of_bytes, of_bytes + numbers};
  for (int64_t begin = 0; begin < a.M; begin += slab_rows) {
    const RowBlocks rows(min64(slab_rows, a.M - begin), most_rows);
    const LinearJob job{a, stretches, begin, rows, packed, fixed, bytes, 1};
    const PackJob pack{job, packed};
    // Rounding takes time for every number, not for every step.
    const int64_t work = (Codes::kBytes ? 64 : 16) * steps * rows.largest;
    int error = parallel_for(rows.count, grain_for(work), pack_x<Codes>, &pack);
    if (error != HF_GPTQ_OK) return error;
    if constexpr (Codes::kMostStreamedRows == kUnbounded) {
      error = run_stream<Codes, kStreamRows>(job);
    } else {
      error = streamed ? run_stream<Codes, kStreamRows>(job) : run_panels<Codes>(job);
    }
    if (error != HF_GPTQ_OK) return error;
  }
  return HF_GPTQ_OK;
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_RUN_LINEAR_H_
