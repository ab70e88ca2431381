// The kernels of one instruction set. isa_*.cpp defines HF_GPTQ_ISA (the name), HF_GPTQ_KERNELS
// (the table) and which vectors to use, and includes this file once. The headers below hold code in
// an anonymous namespace and use no library templates: compiled with other flags in the next
// translation unit, none of it may be merged by the linker.
#include "attention.h"
#include "dequantize.h"
#include "descend.h"
#include "factorize.h"
#include "joint.h"
#include "kernels.h"
#include "linear.h"
#include "matmul.h"
#include "scale_search.h"
#include "solve.h"
#include "systems.h"
#include "transposed.h"

namespace hf_gptq {
namespace {

int dequantize(const DequantizeArguments& a) {
  return with_width(a.weight.bits,
                    [&](auto width) { return dequantize_bits<decltype(width)::kBits>(a); });
}

int transposed(const TransposedArguments& a) {
  return with_width(a.weight.bits,
                    [&](auto width) { return transposed_bits<decltype(width)::kBits>(a); });
}

}  // namespace

extern const Kernels HF_GPTQ_KERNELS;
const Kernels HF_GPTQ_KERNELS = {HF_GPTQ_ISA, linear,          dequantize, transposed,
                                 solve,       scale_search,    matmul,     attention,
                                 factorize,   solve_symmetric, descend,    joint};

}  // namespace hf_gptq
