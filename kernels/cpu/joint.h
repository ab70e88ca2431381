// Columns rounded for all rows of a part together, where errors of rows are felt together. Internal
// linkage, see isa.h.
//
// A part's rows lie side by side, one column after the other, so that a vector holds kLanes rows of
// one column. Parts do not depend on each other and are the tasks.
#ifndef HF_GPTQ_CPU_JOINT_H_
#define HF_GPTQ_CPU_JOINT_H_

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace hf_gptq {
namespace {

// Of one part; vectors may read and write `stride` rows, whole ones of kLanes.
struct JointScratch {
  int64_t first, rows, stride;
  float* metric;  // [rows, stride]
  float* values;  // [B, stride]
  float* scale;   // [stride], of the column's group; those below as it
  float* zero;
  float* pull;
  float* change;
  int64_t group;
};

int64_t joint_stride(const JointArguments& a) {
  return ceil_div(min64(a.part, a.N), kLanes) * kLanes;
}

int64_t joint_floats(const JointArguments& a) {
  return joint_stride(a) * (min64(a.part, a.N) + a.B + 4);
}

// Copies a part's metric and values; what vectors have beyond its rows is 0 with scale 1.
JointScratch enter_part(const JointArguments& a, int64_t part, float* memory) {
  JointScratch s;
  s.first = part * a.part;
  s.rows = min64(a.part, a.N - s.first);
  s.stride = joint_stride(a);
  s.metric = memory;
  s.values = s.metric + s.rows * s.stride;
  s.scale = s.values + a.B * s.stride;
  s.zero = s.scale + s.stride;
  s.pull = s.zero + s.stride;
  s.change = s.pull + s.stride;
  s.group = -1;
  memset(memory, 0, joint_floats(a) * sizeof(float));
  // Before this part lie those of a.part rows.
  const float* metric = a.metric + part * a.part * a.part;
  for (int64_t r = 0; r < s.rows; ++r) {
    copy_floats(metric + r * s.rows, s.rows, s.metric + r * s.stride);
  }
  for (int64_t c = 0; c < a.B; ++c) {
    copy_floats(a.values + c * a.N + s.first, s.rows, s.values + c * s.stride);
  }
  for (int64_t r = s.rows; r < s.stride; ++r) s.scale[r] = 1.0f;
  return s;
}

void enter_column(const JointArguments& a, int64_t column, JointScratch& s) {
  if (a.group[column] == s.group) return;
  s.group = a.group[column];
  copy_floats(a.scales + s.group * a.N + s.first, s.rows, s.scale);
  copy_floats(a.zeros + s.group * a.N + s.first, s.rows, s.zero);
}

void leave_part(const JointArguments& a, const JointScratch& s) {
  for (int64_t c = 0; c < a.B; ++c) {
    copy_floats(s.values + c * s.stride, s.rows, a.values + c * a.N + s.first);
  }
}

// to[begin:] = fma(factor, row[begin:], to[begin:]) from the vector on that holds `begin`.
HF_GPTQ_INLINE void add_row(float factor, const float* row, int64_t begin, int64_t stride,
                            float* to) {
  const VecF f = splat(factor);
  for (int64_t r = begin / kLanes * kLanes; r < stride; r += kLanes) {
    store(to + r, fmadd(f, load(row + r), load(to + r)));
  }
}

HF_GPTQ_INLINE float quantize_one(float quotient, float zero, float top) {
  return quantize(splat(quotient), splat(zero), splat(top))[0];
}

void joint_solve_part(const JointArguments& a, int64_t part, float* memory) {
  JointScratch s = enter_part(a, part, memory);
  const float top = static_cast<float>((1 << a.bits) - 1);
  for (int64_t c = 0; c < a.B; ++c) {
    enter_column(a, c, s);
    float* wanted = s.values + c * s.stride;
    copy_floats(wanted, s.stride, s.pull);
    for (int64_t i = 0; i < s.rows; ++i) {
      const float* row = s.metric + i * s.stride;
      const float q = quantize_one(s.pull[i] / s.scale[i], s.zero[i], top);
      const float value = (q - s.zero[i]) * s.scale[i];
      a.codes[c * a.N + s.first + i] = static_cast<uint8_t>(q);
      s.change[i] = value;
      // Rows up to i are done: that the vector holding i changes them, too, changes nothing.
      add_row((value - s.pull[i]) / row[i], row, i, s.stride, s.pull);
    }
    const float* U = a.H + c * a.H_row;
    const VecF pivot = splat(U[c]);
    for (int64_t r = 0; r < s.stride; r += kLanes) {
      store(wanted + r, (load(wanted + r) - load(s.change + r)) / pivot);
    }
    for (int64_t j = c + 1; j < a.B; ++j) {
      add_row(-U[j], wanted, 0, s.stride, s.values + j * s.stride);
    }
  }
  leave_part(a, s);
}

void joint_descend_part(const JointArguments& a, int64_t part, float* memory) {
  JointScratch s = enter_part(a, part, memory);
  const float top = static_cast<float>((1 << a.bits) - 1);
  for (int64_t c = 0; c < a.B; ++c) {
    enter_column(a, c, s);
    const float* H = a.H + c * a.H_row;
    const float* pulled = s.values + c * s.stride;
    uint8_t* codes = a.codes + c * a.N + s.first;
    float* change = a.changes + c * a.N + s.first;
    for (int64_t r = 0; r < s.stride; r += kLanes) {
      store(s.pull + r, VecF{});
      store(s.change + r, VecF{});
    }
    for (int64_t i = 0; i < s.rows; ++i) {
      add_row(pulled[i] / H[c], s.metric + i * s.stride, 0, s.stride, s.pull);
    }
    bool changed = false;
    for (int64_t i = 0; i < s.rows; ++i) {
      const float* row = s.metric + i * s.stride;
      const float code = codes[i];
      const float target = (code - s.zero[i]) * s.scale[i] + s.pull[i] / row[i];
      const float q = quantize_one(target / s.scale[i], s.zero[i], top);
      if (q == code) continue;
      const float step = (code - q) * s.scale[i];
      codes[i] = static_cast<uint8_t>(q);
      s.change[i] = step;
      add_row(step, row, 0, s.stride, s.pull);
      changed = true;
    }
    copy_floats(s.change, s.rows, change);
    if (!changed) continue;
    for (int64_t j = 0; j < a.B; ++j) {
      add_row(H[j], s.change, 0, s.stride, s.values + j * s.stride);
    }
  }
  leave_part(a, s);
}

template <void (*kPart)(const JointArguments&, int64_t, float*)>
int joint_parts(int64_t begin, int64_t end, const void* context) {
  const JointArguments& a = *static_cast<const JointArguments*>(context);
  float* memory = static_cast<float*>(thread_scratch(joint_floats(a) * sizeof(float)));
  if (!memory) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  for (int64_t part = begin; part < end; ++part) kPart(a, part, memory);
  return HF_GPTQ_OK;
}

int joint(const JointArguments& a) {
  return parallel_tasks(ceil_div(a.N, a.part), 1,
                        a.changes ? joint_parts<joint_descend_part> : joint_parts<joint_solve_part>,
                        &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_JOINT_H_
