// Softmax attention in bf16, forward. Internal linkage, see isa.h.
//
// A task is one head of queries: it packs the head's keys and values, then takes some queries at a
// time, and for those all keys at once, so that the largest score is known before the first power.
#ifndef HF_GPTQ_CPU_ATTENTION_H_
#define HF_GPTQ_CPU_ATTENTION_H_

#include "convert.h"
#include "kernels.h"
#include "outer.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Taken at a time: a panel of keys, which stays in L1, serves four panels of queries.
constexpr int64_t kAttentionQueries = 4 * kOuterRows;

// Of one head; what is beyond D, Tq and Tk is 0.
struct AttentionScratch {
  int64_t pairs;  // in a query or a key
  int64_t keys;   // Tk in whole panels
  int64_t width;  // D in whole panels
  float* K;       // pairs of bf16, panels [pairs, kOuterColumns], a column for each key
  float* Q;       // the same, panels [pairs, kOuterRows], a row for each query
  float* V;       // panels [keys, kOuterColumns], a column for each number of a value
  float* scores;  // [kAttentionQueries, keys]
  float* panels;  // the same, panels [keys, kOuterRows]
  float* sums;    // [kAttentionQueries, width]
};

int64_t whole_panels(int64_t columns) { return ceil_div(columns, kOuterColumns) * kOuterColumns; }

int64_t attention_floats(const AttentionArguments& a) {
  const int64_t pairs = a.D / 2, keys = whole_panels(a.Tk), width = whole_panels(a.D);
  return keys * (pairs + width) + kAttentionQueries * (pairs + 2 * keys + width);
}

// e^x for x <= 0 to 3 units in its last place; 0 below e^-87, NaN for NaN.
HF_GPTQ_INLINE VecF exp_negative(VecF x) {
  // x = n log(2) + r; adding 1.5 * 2^23 leaves n in the lowest bits.
  const VecF shift = splat(12582912.0f);
  const VecF shifted = fmadd(x, splat(1.44269504f), shift);
  const VecF n = shifted - shift;
  const VecF r = fmadd(n, splat(-1.42860677e-6f), fmadd(n, splat(-0.693145752f), x));
  VecF p = splat(1.0f / 720);
  p = fmadd(p, r, splat(1.0f / 120));
  p = fmadd(p, r, splat(1.0f / 24));
  p = fmadd(p, r, splat(1.0f / 6));
  p = fmadd(p, r, splat(0.5f));
  p = fmadd(p, r, splat(1.0f));
  p = fmadd(p, r, splat(1.0f));
  const VecF power = (VecF)(((VecU)shifted << 23) + 0x3f800000u);
  return x < splat(-87.0f) ? VecF{} : p * power;
}

void pack_keys_and_values(const AttentionArguments& a, const uint16_t* K, const uint16_t* V,
                          const AttentionScratch& s) {
  pack_panels_transposed<kOuterColumns>(reinterpret_cast<const float*>(K), 1, a.k_row / 2, s.pairs,
                                        a.Tk, s.K, s.pairs * kOuterColumns);
  constexpr int64_t kRows = 8;
  float values[kRows * kPackColumns] = {};
  for (int64_t t = 0; t < s.keys; t += kRows) {
    for (int64_t d = 0; d < a.D; d += kPackColumns) {
      const int64_t width = min64(kPackColumns, a.D - d);
      for (int64_t r = 0; r < kRows; ++r) {
        float* row = values + r * kPackColumns;
        if (t + r < a.Tk) {
          to_float(V, HF_GPTQ_BF16, (t + r) * a.v_row + d, width, row);
        } else {
          memset(row, 0, width * sizeof(float));
        }
      }
      pack_panels<kOuterColumns>(values, kPackColumns, kRows, width,
                                 s.V + d * s.keys + t * kOuterColumns, s.keys * kOuterColumns);
    }
  }
}

// Turns `count` scores, of `room` in whole panels, into weights; returns 1 over their sum.
float weigh(float* scores, int64_t count, int64_t room, float scale) {
  const float lowest = -__builtin_inff();
  for (int64_t j = count; j < room; ++j) scores[j] = lowest;
  VecF most = splat(lowest);
  for (int64_t j = 0; j < room; j += kLanes) most = maximum(load(scores + j), most);
  float largest = lowest;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const VecF factor = splat(scale);
  most = splat(largest);
  VecF sum = {};
  for (int64_t j = 0; j < room; j += kLanes) {
    const VecF power = exp_negative((load(scores + j) - most) * factor);
    sum += power;
    store(scores + j, power);
  }
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return 1.0f / total;
}

// Queries first .. first + count - 1 of a head, count <= kAttentionQueries.
void attend(const AttentionArguments& a, const uint16_t* Q, int64_t first, int64_t count,
            const AttentionScratch& s, uint16_t* out) {
  // No query sees more keys than the last.
  const int64_t seen = a.causal ? min64(a.Tk, first + count) : a.Tk;
  const int64_t keys = whole_panels(seen);
  const int64_t rows = ceil_div(count, kOuterRows) * kOuterRows;
  pack_panels_transposed<kOuterRows>(reinterpret_cast<const float*>(Q + first * a.q_row), 1,
                                     a.q_row / 2, s.pairs, count, s.Q, s.pairs * kOuterRows);
  memset(s.scores, 0, rows * s.keys * sizeof(float));
  for (int64_t j = 0; j < keys; j += kOuterColumns) {
    for (int64_t r = 0; r < rows; r += kOuterRows) {
      outer_tile<true>(s.Q + r * s.pairs, s.K + j * s.pairs, s.pairs, s.scores + r * s.keys + j,
                       s.keys);
    }
  }
  float factors[kAttentionQueries];
  for (int64_t r = 0; r < count; ++r) {
    factors[r] =
        weigh(s.scores + r * s.keys, a.causal ? min64(seen, first + r + 1) : seen, keys, a.scale);
  }
  pack_panels_transposed<kOuterRows>(s.scores, 1, s.keys, keys, count, s.panels, keys * kOuterRows);
  memset(s.sums, 0, rows * s.width * sizeof(float));
  for (int64_t d = 0; d < s.width; d += kOuterColumns) {
    for (int64_t r = 0; r < rows; r += kOuterRows) {
      outer_tile(s.panels + r * keys, s.V + d * s.keys, keys, s.sums + r * s.width + d, s.width);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    float* sums = s.sums + r * s.width;
    const VecF factor = splat(factors[r]);
    for (int64_t d = 0; d < a.D; d += kLanes) store(sums + d, load(sums + d) * factor);
    from_float(sums, a.D, out + (first + r) * a.out_row, HF_GPTQ_BF16, 0);
  }
}

// Heads [begin, end).
int attention_tasks(int64_t begin, int64_t end, const void* context) {
  const AttentionArguments& a = *static_cast<const AttentionArguments*>(context);
  float* memory = static_cast<float*>(thread_scratch(attention_floats(a) * sizeof(float)));
  if (!memory) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  AttentionScratch s;
  s.pairs = a.D / 2;
  s.keys = whole_panels(a.Tk);
  s.width = whole_panels(a.D);
  s.K = memory;
  s.Q = s.K + s.keys * s.pairs;
  s.V = s.Q + kAttentionQueries * s.pairs;
  s.scores = s.V + s.keys * s.width;
  s.panels = s.scores + kAttentionQueries * s.keys;
  s.sums = s.panels + kAttentionQueries * s.keys;
  for (int64_t head = begin; head < end; ++head) {
    const int64_t shared = head / a.repeats;
    pack_keys_and_values(a, static_cast<const uint16_t*>(a.k) + shared * a.k_head,
                         static_cast<const uint16_t*>(a.v) + shared * a.v_head, s);
    for (int64_t first = 0; first < a.Tq; first += kAttentionQueries) {
      attend(a, static_cast<const uint16_t*>(a.q) + head * a.q_head, first,
             min64(kAttentionQueries, a.Tq - first), s,
             static_cast<uint16_t*>(a.out) + head * a.out_head);
    }
  }
  return HF_GPTQ_OK;
}

int attention(const AttentionArguments& a) {
  return parallel_tasks(a.heads, ceil_div(kWantedWork, a.Tq * a.Tk * a.D), attention_tasks, &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_ATTENTION_H_
