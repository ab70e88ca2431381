// Many small symmetric systems of equations in fp64. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_SYSTEMS_H_
#define HF_GPTQ_CPU_SYSTEMS_H_

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace hf_gptq {
namespace {

// One system by A = L D L^T, upwards: row i of A becomes D(i, i) L(:, i)^T, and b what is left of
// the right side; then back substitution. Only i <= j of A is used: adjacent in memory.
void solve_system(double* A, double* b, int64_t G) {
  for (int64_t k = 0; k < G; ++k) {
    const double* pivot_row = A + k * G;
    for (int64_t i = k + 1; i < G; ++i) {
      const double factor = pivot_row[i] / pivot_row[k];
      double* row = A + i * G;
      for (int64_t j = i; j < G; ++j) row[j] -= factor * pivot_row[j];
      b[i] -= factor * b[k];
    }
  }
  for (int64_t i = G - 1; i >= 0; --i) {
    double sum = b[i];
    for (int64_t j = i + 1; j < G; ++j) sum -= A[i * G + j] * b[j];
    b[i] = sum / A[i * G + i];
  }
}

int solve_systems(int64_t begin, int64_t end, const void* context) {
  const SystemsArguments& a = *static_cast<const SystemsArguments*>(context);
  for (int64_t n = begin; n < end; ++n) solve_system(a.A + n * a.G * a.G, a.b + n * a.G, a.G);
  return HF_GPTQ_OK;
}

int solve_symmetric(const SystemsArguments& a) {
  // 2^18 multiply-adds are worth waking a thread for.
  return parallel_tasks(a.count, ceil_div(int64_t{6} << 18, a.G * a.G * a.G), solve_systems, &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_SYSTEMS_H_
