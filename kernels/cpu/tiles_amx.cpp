// The products of bf16 on processors with AMX: a translation unit of its own. As isa.h says,
// nothing of it may be merged by the linker.
#define HF_GPTQ_SIMD_AVX512F
#define HF_GPTQ_SIMD_BF16
#include "kernels.h"
#include "tile_linear.h"
#include "tile_transposed.h"

namespace hf_gptq {

int linear_amx(const LinearArguments& a) {
  int error = HF_GPTQ_OK;
  const bool done = a.dtype == HF_GPTQ_BF16 && with_width(a.weight.bits, [&](auto width) {
                      return tile_linear<decltype(width)::kBits>(a, &error);
                    });
  return done ? error : kernels_avx512bf16.linear(a);
}

int transposed_amx(const TransposedArguments& a) {
  if (a.dtype != HF_GPTQ_BF16) return kernels_avx512bf16.transposed(a);
  return with_width(a.weight.bits,
                    [&](auto width) { return tile_transposed<decltype(width)::kBits>(a); });
}

}  // namespace hf_gptq
