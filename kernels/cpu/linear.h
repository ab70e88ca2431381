// y = x @ weight^T + bias. Internal linkage, see isa.h.
//
// Up to Codes::kMostStreamedRows rows go through stream.h, more through panels.h. In both a
// (row, column) pair sees the operations documented for hf_gptq_linear in the same order, whatever
// the number of rows: that is what makes a row's bits independent of the batch. What is multiplied
// in one step is a matter of Codes (codes.h, fixed.h, bytes.h): one code and one fp32, two codes
// and two 16-bit numbers, or, where they are to be rounded, four codes and four 8-bit numbers.
#ifndef HF_GPTQ_CPU_LINEAR_H_
#define HF_GPTQ_CPU_LINEAR_H_

#include "run_linear.h"

namespace hf_gptq {
namespace {

template <int kBits>
int linear_bits(const LinearArguments& a) {
  const Buffer buffer(most_stretches(a) * sizeof(Stretch));
  Stretch* stretches = static_cast<Stretch*>(buffer.data());
  if (!stretches) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
#if defined(HF_GPTQ_SIMD_BF16)
  if (a.dtype == HF_GPTQ_BF16) {
    using Any = Pairs<kBits, false>;
    using Symmetric = Pairs<kBits, kBits != 8>;
    const Stretches found = find_stretches<Any>(a.runs, stretches);
    // Where groups change within units, units are decoded more than once.
    if (found.steps <= a.weight.K) {
      return a.weight.qzeros ? run_linear<Any>(a, found) : run_linear<Symmetric>(a, found);
    }
  }
#elif defined(HF_GPTQ_SIMD_AVX2)
  if (a.dtype != HF_GPTQ_FP32) {
    using Any = Fixed<kBits, false>;
    using Symmetric = Fixed<kBits, true>;
    const Stretches found = find_stretches<Any>(a.runs, stretches);
    if (found.steps <= a.weight.K) {
      return a.weight.qzeros ? run_linear<Any>(a, found) : run_linear<Symmetric>(a, found);
    }
  }
#endif
  return run_linear<Floats<kBits>>(a, find_stretches<Floats<kBits>>(a.runs, stretches));
}

int linear(const LinearArguments& a) {
  return with_width(a.weight.bits,
                    [&](auto width) { return linear_bits<decltype(width)::kBits>(a); });
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_LINEAR_H_
