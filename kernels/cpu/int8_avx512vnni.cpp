// The product for activations rounded to 8 bits: a translation unit of its own, since many
// processors with VNNI have no AVX512-BF16. As isa.h says, nothing of it may be merged by the
// linker.
#define HF_GPTQ_SIMD_AVX512F
#define HF_GPTQ_SIMD_VNNI
#include "dispatch.h"
#include "run_linear.h"

namespace hf_gptq {
namespace {

template <int kBits, bool kSymmetric>
int run_bytes(const LinearArguments& a, Stretch* stretches) {
  using Codes = Bytes<kBits, kSymmetric>;
  const Stretches found = find_stretches<Codes>(a.runs, stretches);
  // Where groups change within units, units are decoded more than once: dispatch() has the exact
  // product for that.
  if (2 * found.steps > a.weight.K) return dispatch().kernels->linear(a);
  return run_linear<Codes>(a, found);
}

}  // namespace

int linear_int8_avx512vnni(const LinearArguments& a) {
  const Buffer buffer(most_stretches(a) * sizeof(Stretch));
  Stretch* stretches = static_cast<Stretch*>(buffer.data());
  if (!stretches) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  return with_width(a.weight.bits, [&](auto width) {
    constexpr int kBits = decltype(width)::kBits;
    return a.weight.qzeros ? run_bytes<kBits, false>(a, stretches)
                           : run_bytes<kBits, true>(a, stretches);
  });
}

}  // namespace hf_gptq
