#ifndef HF_GPTQ_CPU_PARALLEL_H_
#define HF_GPTQ_CPU_PARALLEL_H_

#include <stdint.h>

#include "hf_gptq.h"

namespace hf_gptq {

// Multiply-adds that are worth waking a thread for.
constexpr int64_t kWantedWork = int64_t{1} << 18;

void set_parallel_for(hf_gptq_parallel_for_t parallel_for);

// Runs body(begin, end, context) over disjoint ranges that cover [0, count), ranges of at least
// `grain` where possible. A body returns an hf_gptq_error; the result is one of the errors, or
// HF_GPTQ_ERROR_PARALLEL_FOR.
int parallel_for(int64_t count, int64_t grain, int (*body)(int64_t, int64_t, const void*),
                 const void* context);

// The same in ranges of `grain`, of which a thread takes the next whenever it is done with one: for
// bodies that gain nothing from longer ranges. A thread that is late delays the others by one range
// at most.
int parallel_tasks(int64_t count, int64_t grain, int (*body)(int64_t, int64_t, const void*),
                   const void* context);

}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_PARALLEL_H_
