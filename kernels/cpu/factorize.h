// The upper triangular U with H^-1 = U^T U. Internal linkage, see isa.h.
//
// H = R R^T with R upper triangular, and U = R^-1. Both come from one sweep over blocks of rows,
// from the last to the first, in one matrix: R^T grows below the diagonal, U on and above it.
//
//          0             s     e                K
//       0  +-------------+-----+----------------+     The block's rows [s, e) hold minus what
//          |  H - R R^T  |   R U of the rows    |     remains of H, minus the identity and R U of
//          |  so far,    |   below, so far      |     the rows below. R(s..e, s..e) is factorized
//       s  +-------------+-----+----------------+     from the first two; then one triangular
//          |     X = R^T |  I  |                |     solve with it makes R^T and U of the whole
//       e  +-------------+-----+----------------+     row of blocks; then the rows above receive
//          |    R^T            |        U       |     X^T times that row, a matrix product.
//          |                   |                |
//       K  +-------------------+----------------+
//
// Everything above the diagonal starts at zero, everything below it at -H: so both are only ever
// added to.
//
// Inside the block the solve goes by groups of kGroupRows rows: first what the rows below have to
// say, by outer_tile(), then substitution within the group.
#ifndef HF_GPTQ_CPU_FACTORIZE_H_
#define HF_GPTQ_CPU_FACTORIZE_H_

#include <math.h>

#include "kernels.h"
#include "matmul.h"
#include "outer.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Rows of a block and of a group: part of the specification. A panel of a block stays in L1.
constexpr int kFactorRows = 192;
constexpr int kGroupRows = 12;
static_assert(kGroupRows % kOuterRows == 0, "a group is whole tiles on every instruction set");
static_assert(kFactorRows % kGroupRows == 0 && kFactorRows % kOuterColumns == 0,
              "blocks begin with a group and with a panel");

struct FactorJob {
  float* matrix;  // [K, K]
  int64_t K;
  int64_t s;        // first row of the block
  int64_t rows;     // of the block
  int64_t padded;   // rows, rounded up to whole groups: rows that are missing are the identity's
  float* R;         // panels [padded, kOuterRows] of R(s..e, s..e), see R_at()
  float* inverses;  // [padded], -1 / R(i, i)
  float* panels;    // [padded, kOuterColumns] panels of the block's own columns
};

// Address of R(i, k) for i, k in the block, k at least the first row of i's group.
HF_GPTQ_INLINE float* R_at(const FactorJob& job, int64_t i, int64_t k) {
  return job.R + i / kOuterRows * job.padded * kOuterRows + k * kOuterRows + i % kOuterRows;
}

// panel[i, :] += R(i, k) panel[k, :] for i in the group that begins at `group`, all k below it.
void factor_update(const FactorJob& job, int64_t group, float* panel) {
  const int64_t below = group + kGroupRows;
  for (int64_t i = group; i < below && below < job.padded; i += kOuterRows) {
    outer_tile(R_at(job, i, below), panel + below * kOuterColumns, job.padded - below,
               panel + i * kOuterColumns, kOuterColumns);
  }
}

// Solves R(group, group) x = -panel[group, :] and writes x to panel.
void factor_substitute(const FactorJob& job, int64_t group, float* panel) {
  for (int v = 0; v < kOuterVectors; ++v) {
    float* column = panel + group * kOuterColumns + v * kLanes;
    VecF x[kGroupRows];
    HF_GPTQ_UNROLL
    for (int i = 0; i < kGroupRows; ++i) x[i] = load(column + i * kOuterColumns);
    HF_GPTQ_UNROLL
    for (int k = kGroupRows - 1; k >= 0; --k) {
      x[k] = x[k] * splat(job.inverses[group + k]);
      store(column + k * kOuterColumns, x[k]);
      HF_GPTQ_UNROLL
      for (int i = 0; i < k; ++i) {
        x[i] = fmadd(splat(*R_at(job, group + i, group + k)), x[k], x[i]);
      }
    }
  }
}

// Copies columns [column, column + columns) of the block to a panel and fills up with zeros.
void factor_load(const FactorJob& job, int64_t column, int64_t columns, float* panel) {
  memset(panel, 0, job.padded * kOuterColumns * sizeof(float));
  for (int64_t i = 0; i < job.rows; ++i) {
    copy_floats(job.matrix + (job.s + i) * job.K + column, columns, panel + i * kOuterColumns);
  }
}

// R of the group from what remains of H there. False if that is not positive definite.
bool factor_group(const FactorJob& job, int64_t group) {
  float h[kGroupRows][kGroupRows];  // minus what remains of H, then R^T; below the diagonal
  for (int64_t i = 0; i < kGroupRows; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const int64_t column = group + j;
      h[i][j] = job.panels[column / kOuterColumns * job.padded * kOuterColumns +
                           (group + i) * kOuterColumns + column % kOuterColumns];
    }
  }
  for (int k = kGroupRows - 1; k >= 0; --k) {
    const float pivot = -h[k][k];
    if (!(pivot > 0.0f) || !isfinite(pivot)) return false;
    const float root = sqrtf(pivot);
    const float inverse = -1.0f / root;
    job.inverses[group + k] = inverse;
    *R_at(job, group + k, group + k) = root;
    for (int j = 0; j < k; ++j) {
      h[k][j] = h[k][j] * inverse;
      *R_at(job, group + j, group + k) = h[k][j];
    }
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j <= i; ++j) h[i][j] = h[i][j] + h[k][i] * h[k][j];
    }
  }
  return true;
}

// R(s..e, s..e), on one thread: it is little work.
bool factor_diagonal(const FactorJob& job) {
  const int64_t panel_size = job.padded * kOuterColumns;
  for (int64_t j = 0; j < job.padded; j += kOuterColumns) {
    float* panel = job.panels + j * job.padded;
    factor_load(job, job.s + j, min64(kOuterColumns, job.rows - j), panel);
  }
  for (int64_t i = job.rows; i < job.padded; ++i) {
    job.panels[i / kOuterColumns * panel_size + i * kOuterColumns + i % kOuterColumns] = -1.0f;
  }
  for (int64_t group = job.padded - kGroupRows; group >= 0; group -= kGroupRows) {
    for (int64_t j = 0; j < group + kGroupRows; j += kOuterColumns) {
      factor_update(job, group, job.panels + j * job.padded);
    }
    if (!factor_group(job, group)) return false;
    for (int64_t j = 0; j < group; j += kOuterColumns) {
      float* panel = job.panels + j * job.padded;
      factor_substitute(job, group, panel);
      for (int64_t k = group; k < group + kGroupRows; ++k) {
        for (int64_t i = j; i < min64(j + kOuterColumns, group); ++i) {
          *R_at(job, i, k) = panel[k * kOuterColumns + i - j];
        }
      }
    }
  }
  return true;
}

// Solves the block's rows for columns [begin, end) * kOuterColumns.
int factor_columns(int64_t begin, int64_t end, const void* context) {
  const FactorJob& job = *static_cast<const FactorJob*>(context);
  alignas(64) float panel[kFactorRows * kOuterColumns];
  for (int64_t column = begin * kOuterColumns; column < min64(end * kOuterColumns, job.K);
       column += kOuterColumns) {
    const int64_t columns = min64(kOuterColumns, job.K - column);
    if (column < job.s || column >= job.s + job.rows) {
      factor_load(job, column, columns, panel);
    } else {
      memset(panel, 0, job.padded * kOuterColumns * sizeof(float));
      for (int64_t j = 0; j < columns; ++j) {
        panel[(column - job.s + j) * kOuterColumns + j] = -1.0f;
      }
    }
    for (int64_t group = job.padded - kGroupRows; group >= 0; group -= kGroupRows) {
      factor_update(job, group, panel);
      factor_substitute(job, group, panel);
    }
    for (int64_t i = 0; i < job.rows; ++i) {
      copy_floats(panel + i * kOuterColumns, columns, job.matrix + (job.s + i) * job.K + column);
    }
  }
  return HF_GPTQ_OK;
}

// Rows [begin, end) of U: -H below the diagonal and on it, zeros above.
int factor_begin(int64_t begin, int64_t end, const void* context) {
  const FactorizeArguments& a = *static_cast<const FactorizeArguments*>(context);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j <= i; ++j) a.U[i * a.K + j] = -a.H[i * a.K + j];
    memset(a.U + i * a.K + i + 1, 0, (a.K - i - 1) * sizeof(float));
  }
  return HF_GPTQ_OK;
}

// Clears R^T.
int factor_end(int64_t begin, int64_t end, const void* context) {
  const FactorizeArguments& a = *static_cast<const FactorizeArguments*>(context);
  for (int64_t i = begin; i < end; ++i) memset(a.U + i * a.K, 0, i * sizeof(float));
  return HF_GPTQ_OK;
}

int factorize(const FactorizeArguments& a) {
  const int64_t most = ceil_div(min64(a.K, kFactorRows), kGroupRows) * kGroupRows;
  const int64_t columns = ceil_div(most, kOuterColumns) * kOuterColumns;
  const Buffer buffer((most * most + most * columns + most) * sizeof(float));
  float* memory = static_cast<float*>(buffer.data());
  if (!memory) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  const int64_t copy_grain = ceil_div(kWantedWork, 16 * a.K);
  if (const int error = parallel_for(a.K, copy_grain, factor_begin, &a)) return error;

  for (int64_t s = (a.K - 1) / kFactorRows * kFactorRows; s >= 0; s -= kFactorRows) {
    const int64_t rows = min64(kFactorRows, a.K - s);
    const int64_t padded = ceil_div(rows, kGroupRows) * kGroupRows;
    const FactorJob job{
        a.U,   a.K, s, rows, padded, memory + most * columns, memory + most * columns + most * most,
        memory};
    if (!factor_diagonal(job)) return HF_GPTQ_ERROR_NOT_POSITIVE_DEFINITE;
    int error = parallel_tasks(ceil_div(a.K, kOuterColumns),
                               ceil_div(kWantedWork, rows * rows * kOuterColumns / 2),
                               factor_columns, &job);
    if (error != HF_GPTQ_OK) return error;
    if (s == 0) break;
    const float* row = a.U + s * a.K;
    error = matmul({row, 1, a.K, row, a.K, 1, s, s, rows, a.U, a.K, true, true, false});
    if (error != HF_GPTQ_OK) return error;
    error =
        matmul({row, 1, a.K, row + s, a.K, 1, s, a.K - s, rows, a.U + s, a.K, true, false, false});
    if (error != HF_GPTQ_OK) return error;
  }
  return parallel_for(a.K, copy_grain, factor_end, &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_FACTORIZE_H_
