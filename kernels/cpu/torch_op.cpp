// The op hf_gptq::linear for tensors on the CPU, without Python in its way: for a small layer and
// one token that would take longer than the product. It uses the C functions that libtorch exports
// for libraries which are not built against it ("stable ABI", torch/csrc/stable), and the caller
// finds: nothing of torch is needed to compile this.
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "hf_gptq.h"
#include "layout.h"

namespace hf_gptq {
namespace {

// The functions are called with the meaning they have since this version, 2.13.
constexpr uint64_t kTorchVersion = uint64_t{2} << 56 | uint64_t{13} << 48;

// An argument or a result of an op: an integer, or a pointer. A tensor is an owning reference; an
// optional one a pointer to that, or null.
typedef uint64_t Value;
typedef void (*Op)(Value* stack, uint64_t inputs, uint64_t outputs);
struct TensorObject;
struct LibraryObject;

// All but the dtypes return 0, or an error that torch_exception_get_what_... describes.
struct Torch {
  int32_t (*aoti_torch_library_init_impl)(const char* ns, const char* key, const char* file,
                                          uint32_t line, LibraryObject** library);
  int32_t (*torch_library_impl)(LibraryObject* library, const char* name, Op op, uint64_t version);
  int32_t (*torch_call_dispatcher)(const char* name, const char* overload, Value* stack,
                                   uint64_t version);
  const char* (*torch_exception_get_what_without_backtrace)();
  int32_t (*torch_delete_stable_ivalue)(Value* value);
  int32_t (*torch_get_const_data_ptr)(TensorObject* tensor, const void** data);
  int32_t (*torch_get_mutable_data_ptr)(TensorObject* tensor, void** data);
  int32_t (*aoti_torch_delete_tensor_object)(TensorObject* tensor);
  int32_t (*aoti_torch_get_dim)(TensorObject* tensor, int64_t* dim);
  int32_t (*aoti_torch_get_sizes)(TensorObject* tensor, int64_t** sizes);
  int32_t (*aoti_torch_get_dtype)(TensorObject* tensor, int32_t* dtype);
  int32_t (*aoti_torch_get_device_type)(TensorObject* tensor, int32_t* device_type);
  int32_t (*aoti_torch_is_contiguous)(TensorObject* tensor, bool* contiguous);
  int32_t (*aoti_torch_empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                      int32_t dtype, int32_t device_type, int32_t device_index,
                                      TensorObject** tensor);
  int32_t (*aoti_torch_device_type_cpu)();
  int32_t (*aoti_torch_dtype_float32)();
  int32_t (*aoti_torch_dtype_float16)();
  int32_t (*aoti_torch_dtype_bfloat16)();
  int32_t (*aoti_torch_dtype_int32)();
};
Torch torch;

template <class Function>
bool find(hf_gptq_lookup_t lookup, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(lookup(name));
  return *function != nullptr;
}

bool find_torch(hf_gptq_lookup_t lookup) {
#define HF_GPTQ_FIND(name) find(lookup, #name, &torch.name)
  return HF_GPTQ_FIND(aoti_torch_library_init_impl) && HF_GPTQ_FIND(torch_library_impl) &&
         HF_GPTQ_FIND(torch_call_dispatcher) &&
         HF_GPTQ_FIND(torch_exception_get_what_without_backtrace) &&
         HF_GPTQ_FIND(torch_delete_stable_ivalue) && HF_GPTQ_FIND(torch_get_const_data_ptr) &&
         HF_GPTQ_FIND(torch_get_mutable_data_ptr) &&
         HF_GPTQ_FIND(aoti_torch_delete_tensor_object) && HF_GPTQ_FIND(aoti_torch_get_dim) &&
         HF_GPTQ_FIND(aoti_torch_get_sizes) && HF_GPTQ_FIND(aoti_torch_get_dtype) &&
         HF_GPTQ_FIND(aoti_torch_get_device_type) && HF_GPTQ_FIND(aoti_torch_is_contiguous) &&
         HF_GPTQ_FIND(aoti_torch_empty_strided) && HF_GPTQ_FIND(aoti_torch_device_type_cpu) &&
         HF_GPTQ_FIND(aoti_torch_dtype_float32) && HF_GPTQ_FIND(aoti_torch_dtype_float16) &&
         HF_GPTQ_FIND(aoti_torch_dtype_bfloat16) && HF_GPTQ_FIND(aoti_torch_dtype_int32);
#undef HF_GPTQ_FIND
}

// -1 for a dtype that the kernels do not know.
int32_t kernel_dtype(int32_t dtype) {
  if (dtype == torch.aoti_torch_dtype_float32()) return HF_GPTQ_FP32;
  if (dtype == torch.aoti_torch_dtype_float16()) return HF_GPTQ_FP16;
  if (dtype == torch.aoti_torch_dtype_bfloat16()) return HF_GPTQ_BF16;
  return -1;
}

// A contiguous tensor on the CPU, as far as it is described without error; else absent.
struct Array {
  bool present = false;
  const void* data = nullptr;
  const int64_t* sizes = nullptr;
  int64_t dim = 0;
  int32_t dtype = 0;

  explicit Array(TensorObject* tensor) {
    int64_t* found = nullptr;
    bool contiguous = false;
    int32_t device = 0;
    present = tensor && !torch.aoti_torch_is_contiguous(tensor, &contiguous) && contiguous &&
              !torch.aoti_torch_get_device_type(tensor, &device) &&
              device == torch.aoti_torch_device_type_cpu() &&
              !torch.aoti_torch_get_dim(tensor, &dim) &&
              !torch.aoti_torch_get_sizes(tensor, &found) &&
              !torch.aoti_torch_get_dtype(tensor, &dtype) &&
              !torch.torch_get_const_data_ptr(tensor, &data) && data;
    sizes = found;
  }
  bool is(int32_t wanted, int64_t a) const {
    return present && dtype == wanted && dim == 1 && sizes[0] == a;
  }
  bool is(int32_t wanted, int64_t a, int64_t b) const {
    return present && dtype == wanted && dim == 2 && sizes[0] == a && sizes[1] == b;
  }
  bool is(int32_t wanted, int64_t a, int64_t b, int64_t c) const {
    return present && dtype == wanted && dim == 3 && sizes[0] == a && sizes[1] == b &&
           sizes[2] == c;
  }
};

// The arguments of the op, in their order.
constexpr int kTensors = 7;
enum Argument { kX, kBias, kQweight, kScales, kQzeros, kGIdx, kPerm, kBits, kGroupSize, kOffset };
constexpr bool kOptional[kTensors] = {false, true, false, false, true, true, true};

TensorObject* tensor_of(const Value* stack, int argument) {
  const Value value = stack[argument];
  if (!kOptional[argument]) return reinterpret_cast<TensorObject*>(value);
  const Value* inner = reinterpret_cast<const Value*>(value);
  return inner ? reinterpret_cast<TensorObject*>(*inner) : nullptr;
}

void release(Value* stack) {
  for (int i = 0; i < kTensors; ++i) {
    if (TensorObject* tensor = tensor_of(stack, i)) torch.aoti_torch_delete_tensor_object(tensor);
    if (kOptional[i] && stack[i]) {
      torch.torch_delete_stable_ivalue(reinterpret_cast<Value*>(stack[i]));
    }
  }
}

// The result, or null for what is not as the kernels take it.
TensorObject* product(const Value* stack) {
  const Array x(tensor_of(stack, kX));
  const Array qweight(tensor_of(stack, kQweight));
  const Array scales(tensor_of(stack, kScales));
  if (!x.present || x.dim < 1 || !qweight.present || !scales.present || scales.dim != 2) {
    return nullptr;
  }
  const int32_t int32 = torch.aoti_torch_dtype_int32();
  const int32_t dtype = kernel_dtype(x.dtype);
  const int64_t bits = static_cast<int64_t>(stack[kBits]);
  const int64_t offset = static_cast<int64_t>(stack[kOffset]);
  if (bits < 2 || bits > 8 || offset < 0 || offset > 1) return nullptr;
  hf_gptq_weight w{};
  w.bits = static_cast<int32_t>(bits);
  w.scale_dtype = kernel_dtype(scales.dtype);
  w.K = x.sizes[x.dim - 1];
  w.G = scales.sizes[0];
  w.N = scales.sizes[1];
  w.group_size = static_cast<int64_t>(stack[kGroupSize]);
  w.zero_offset = static_cast<int32_t>(offset);
  if (w.K < 1 || w.N < 1) return nullptr;
  const int64_t words = packed_words(w.K, w.bits);
  if (dtype < 0 || w.scale_dtype < 0 ||
      !qweight.is(int32, column_blocks(w.N), words, kBlockColumns)) {
    return nullptr;
  }
  w.qweight = static_cast<const int32_t*>(qweight.data);
  w.block_stride = words * kBlockColumns;
  w.row_stride = kBlockColumns;
  w.scales = scales.data;
  if (TensorObject* tensor = tensor_of(stack, kQzeros)) {
    const Array qzeros(tensor);
    if (!qzeros.is(int32, w.G, packed_words(w.N, w.bits))) return nullptr;
    w.qzeros = static_cast<const int32_t*>(qzeros.data);
  }
  if (TensorObject* tensor = tensor_of(stack, kGIdx)) {
    const Array g_idx(tensor);
    if (!g_idx.is(int32, w.K)) return nullptr;
    w.g_idx = static_cast<const int32_t*>(g_idx.data);
  } else if (w.group_size < 1 || ceil_div(w.K, w.group_size < w.K ? w.group_size : w.K) != w.G) {
    return nullptr;
  }
  if (TensorObject* tensor = tensor_of(stack, kPerm)) {
    const Array perm(tensor);
    if (!perm.is(int32, w.K)) return nullptr;
    w.perm = static_cast<const int32_t*>(perm.data);
  }
  const void* bias = nullptr;
  if (TensorObject* tensor = tensor_of(stack, kBias)) {
    const Array given(tensor);
    if (!given.is(x.dtype, w.N)) return nullptr;
    bias = given.data;
  }
  constexpr int64_t kMostDims = 8;
  int64_t sizes[kMostDims], strides[kMostDims], count = 1, stride = 1;
  if (x.dim > kMostDims) return nullptr;
  for (int64_t i = x.dim - 1; i >= 0; --i) {
    sizes[i] = i == x.dim - 1 ? w.N : x.sizes[i];
    strides[i] = stride;
    stride *= sizes[i];
    if (i < x.dim - 1) count *= sizes[i];
  }
  TensorObject* out = nullptr;
  void* y = nullptr;
  if (torch.aoti_torch_empty_strided(x.dim, sizes, strides, x.dtype,
                                     torch.aoti_torch_device_type_cpu(), 0, &out)) {
    return nullptr;
  }
  if (torch.torch_get_mutable_data_ptr(out, &y) ||
      hf_gptq_linear(&w, x.data, dtype, count, w.K, bias, y) != HF_GPTQ_OK) {
    torch.aoti_torch_delete_tensor_object(out);
    return nullptr;
  }
  return out;
}

// What is not plain goes to hf_gptq::linear_checked, which knows every layout and says what is
// wrong.
void linear_op(Value* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  if (TensorObject* out = product(stack)) {
    release(stack);
    stack[0] = reinterpret_cast<Value>(out);
  } else if (torch.torch_call_dispatcher("hf_gptq::linear_checked", "", stack, kTorchVersion)) {
    const std::string what = torch.torch_exception_get_what_without_backtrace();
    throw std::runtime_error(what.substr(0, what.find("\n\nAt:\n")));  // where in Python
  }
}

}  // namespace
}  // namespace hf_gptq

int hf_gptq_register_torch_op(hf_gptq_lookup_t lookup) {
  using namespace hf_gptq;
  if (!lookup) return HF_GPTQ_ERROR_NULL_POINTER;
  LibraryObject* registered = nullptr;
  if (!find_torch(lookup) ||
      torch.aoti_torch_library_init_impl("hf_gptq", "CPU", "torch_op.cpp", 0, &registered) ||
      torch.torch_library_impl(registered, "linear", linear_op, kTorchVersion)) {
    return HF_GPTQ_ERROR_TORCH;
  }
  return HF_GPTQ_OK;
}
