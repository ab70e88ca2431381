// Grid search for scales and zeros. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_SCALE_SEARCH_H_
#define HF_GPTQ_CPU_SCALE_SEARCH_H_

#include "convert.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Partial sums of an error: term k goes to sum k % 16 in every instruction set.
constexpr int kSums = 16;
constexpr int kSumVectors = kSums / kLanes;

float add_pairwise(const VecF (&sums)[kSumVectors]) {
  float s[kSums];
  memcpy(s, sums, sizeof s);
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) s[l] = s[l] + s[l + half];
  }
  return s[0];
}

// The weights of one row and group, with the weight of their squared errors, padded with zeros to a
// multiple of kSums.
struct Group {
  const float* w;
  const float* h;
  int64_t size;
  float low, high;  // min(w, 0), max(w, 0)
};

struct Choice {
  float scale, zero, error;
  bool found;

  void offer(float candidate_scale, float candidate_zero, float candidate_error) {
    if (found && !(candidate_error < error)) return;
    *this = {candidate_scale, candidate_zero, candidate_error, true};
  }
};

HF_GPTQ_INLINE VecF weighted_error(VecF w, VecF h, VecF quotient, VecF scale, VecF zero, VecF top) {
  const VecF difference = w - (quantize(quotient, zero, top) - zero) * scale;
  return h * (difference * difference);
}

float error_of(const Group& group, float scale, float zero, VecF top) {
  const VecF s = splat(scale), z = splat(zero);
  VecF sums[kSumVectors] = {};
  for (int64_t k = 0; k < group.size; k += kSums) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kSumVectors; ++v) {
      const VecF w = load(group.w + k + v * kLanes), h = load(group.h + k + v * kLanes);
      sums[v] = sums[v] + weighted_error(w, h, w / s, s, z, top);
    }
  }
  return add_pairwise(sums);
}

// The errors of scale and of -scale, whose quotients differ by the sign only: one division serves
// both.
void errors_of(const Group& group, float scale, float zero, VecF top, float* plus, float* minus) {
  const VecF s = splat(scale), z = splat(zero);
  VecF plus_sums[kSumVectors] = {}, minus_sums[kSumVectors] = {};
  for (int64_t k = 0; k < group.size; k += kSums) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kSumVectors; ++v) {
      const VecF w = load(group.w + k + v * kLanes), h = load(group.h + k + v * kLanes);
      const VecF quotient = w / s;
      plus_sums[v] = plus_sums[v] + weighted_error(w, h, quotient, s, z, top);
      minus_sums[v] = minus_sums[v] + weighted_error(w, h, -quotient, -s, z, top);
    }
  }
  *plus = add_pairwise(plus_sums);
  *minus = add_pairwise(minus_sums);
}

float smallest_normal(int dtype) { return dtype == HF_GPTQ_FP16 ? 0x1p-14f : 0x1p-126f; }

bool is_usable(float scale, int dtype) {
  const float magnitude = scale < 0.0f ? -scale : scale;
  return magnitude >= smallest_normal(dtype) && magnitude <= 0x1.fffffep127f;
}

void search_group(const ScaleSearchArguments& a, const Group& group, float* scale, float* zero) {
  const float maxq = static_cast<float>((1 << a.bits) - 1);
  const VecF top = splat(maxq);
  const float middle = static_cast<float>(1 << (a.bits - 1));
  const float zero_min = static_cast<float>(a.zero_min);
  if (group.low == 0.0f && group.high == 0.0f) {
    *scale = 1.0f;
    *zero = a.sym ? middle : zero_min;
    return;
  }
  const float magnitude = -group.low > group.high ? -group.low : group.high;
  const float base = (2.0f * magnitude) / maxq;
  const float range = group.high - group.low;
  const auto asymmetric_zero = [&](float s, float t) {
    const float z = round_even(splat((-group.low * t) / s))[0];
    return z < zero_min ? zero_min : z > maxq ? maxq : z;
  };

  Choice best = {};
  for (int64_t i = 0; i < a.T; ++i) {
    const float t = a.shrink[i];
    const float s = round_to(a.sym ? base * t : (range * t) / maxq, a.scale_dtype);
    if (!is_usable(s, a.scale_dtype)) continue;
    if (a.sym) {
      float plus, minus;
      errors_of(group, s, middle, top, &plus, &minus);
      best.offer(s, middle, plus);
      best.offer(-s, middle, minus);
    } else {
      const float z = asymmetric_zero(s, t);
      best.offer(s, z, error_of(group, s, z, top));
    }
  }
  if (!best.found) {
    best.scale = smallest_normal(a.scale_dtype);
    best.zero = a.sym ? middle : asymmetric_zero(best.scale, 1.0f);
  }
  *scale = best.scale;
  *zero = best.zero;
}

int search_rows(int64_t begin, int64_t end, const void* context) {
  const ScaleSearchArguments& a = *static_cast<const ScaleSearchArguments*>(context);
  const int64_t room = ceil_div(a.K, kSums) * kSums;
  float* w = static_cast<float*>(thread_scratch(2 * room * sizeof(float)));
  if (!w) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  float* h = w + room;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t first = a.group_start[g];
      const int64_t count = a.group_start[g + 1] - first;
      const int64_t size = ceil_div(count, kSums) * kSums;
      memcpy(w, a.W + row * a.K + first, count * sizeof(float));
      memcpy(h, a.h + first, count * sizeof(float));
      memset(w + count, 0, (size - count) * sizeof(float));
      memset(h + count, 0, (size - count) * sizeof(float));
      VecF lows = {}, highs = {};
      for (int64_t k = 0; k < size; k += kLanes) {
        lows = minimum(load(w + k), lows);
        highs = maximum(load(w + k), highs);
      }
      float low = 0.0f, high = 0.0f;
      for (int l = 0; l < kLanes; ++l) {
        low = lows[l] < low ? lows[l] : low;
        high = highs[l] > high ? highs[l] : high;
      }
      search_group(a, {w, h, size, low, high}, a.scales + row * a.G + g, a.zeros + row * a.G + g);
    }
  }
  return HF_GPTQ_OK;
}

int scale_search(const ScaleSearchArguments& a) {
  // About 2^15 evaluated weights per range: below that a thread costs more than it saves.
  return parallel_for(a.N, ceil_div(int64_t{1} << 15, a.K * a.T), search_rows, &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_SCALE_SEARCH_H_
