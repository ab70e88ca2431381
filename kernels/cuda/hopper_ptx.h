// The sm_90a instructions of the Hopper kernel, one function each, named after the PTX they stand
// for. With HF_GPTQ_EMULATE the same names come from emulate/hopper.h, so that the kernel's own
// source runs on a CPU. Facts: PTX ISA, sections on mbarrier, cp.async.bulk and wgmma.
#ifndef HF_GPTQ_HOPPER_PTX_H_
#define HF_GPTQ_HOPPER_PTX_H_

#include "ptx.h"

#ifdef HF_GPTQ_EMULATE
#include "emulate/hopper.h"
#else

#include <cuda.h>

#include "launch.h"

namespace hf_gptq {
namespace hopper {

using TensorMap = CUtensorMap;

// Address in the window of shared memory, as the instructions take it.
HF_GPTQ_DEVICE uint32_t window_address(const void* pointer) { return shared_address(pointer); }

// ---- mbarrier

HF_GPTQ_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialisation visible to the copy engine.
HF_GPTQ_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

HF_GPTQ_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival that also announces `bytes` of bulk copies.
HF_GPTQ_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity is complete.
HF_GPTQ_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// What this thread has read or written in shared memory comes before what the copy engine writes
// there, once a barrier that this thread then arrives at, or its warp, lets it.
HF_GPTQ_DEVICE void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- clusters

// All threads of all blocks of the cluster.
HF_GPTQ_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of block `rank` of the cluster.
HF_GPTQ_DEVICE uint32_t peer_address(uint32_t address, uint32_t rank) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// Arrives at a barrier of any block of the cluster; what this thread did before is visible there.
HF_GPTQ_DEVICE void mbarrier_arrive_peer(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

// As mbarrier_wait, for arrivals from other blocks of the cluster.
HF_GPTQ_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Four floats from the shared memory of any block of the cluster.
HF_GPTQ_DEVICE void load_peer_four(float (&values)[4], uint32_t address) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(address)
               : "memory");
}

// ---- copies from global to shared memory by the copy engine

// `bytes` and both addresses are multiples of 16.
HF_GPTQ_DEVICE void bulk_copy(uint32_t destination, const void* source, uint32_t bytes,
                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// The box of the map at (column, row), innermost coordinate first; what lies outside reads as zero
// and counts as copied.
HF_GPTQ_DEVICE void tensor_copy(uint32_t destination, const TensorMap* map, int32_t column,
                                int32_t row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// ---- warpgroups

template <int kRegisters>
HF_GPTQ_DEVICE void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
HF_GPTQ_DEVICE void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` among `threads` threads.
HF_GPTQ_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- wgmma

// Orders register writes before the wgmma instructions that follow.
HF_GPTQ_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

HF_GPTQ_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Returns when at most `kPending` of the committed groups are unfinished.
template <int kPending>
HF_GPTQ_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler may not move a use of the registers across this.
template <int kCount>
HF_GPTQ_DEVICE void registers_settle(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// D = A B (+ D where `add`), D [64, kTokens] fp32, A [64, 16] from registers, B [16, kTokens] from
// the shared memory that `descriptor` describes. kTokens is 2 * (number of registers of D).
#define HF_GPTQ_D8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define HF_GPTQ_WGMMA_32(type)                                                            \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred add;\n"                                                                 \
      "setp.ne.b32 add, %37, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                         \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"                                        \
      "}\n"                                                                               \
      : HF_GPTQ_D8(d, 0), HF_GPTQ_D8(d, 8), HF_GPTQ_D8(d, 16), HF_GPTQ_D8(d, 24)          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int32_t(add)))
#define HF_GPTQ_WGMMA_64(type)                                                            \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred add;\n"                                                                 \
      "setp.ne.b32 add, %69, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n"                                        \
      "}\n"                                                                               \
      : HF_GPTQ_D8(d, 0), HF_GPTQ_D8(d, 8), HF_GPTQ_D8(d, 16), HF_GPTQ_D8(d, 24),         \
        HF_GPTQ_D8(d, 32), HF_GPTQ_D8(d, 40), HF_GPTQ_D8(d, 48), HF_GPTQ_D8(d, 56)        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int32_t(add)))

HF_GPTQ_DEVICE void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t descriptor, bool add,
                          Half) {
  HF_GPTQ_WGMMA_32("f16");
}
HF_GPTQ_DEVICE void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t descriptor, bool add,
                          Bfloat16) {
  HF_GPTQ_WGMMA_32("bf16");
}
HF_GPTQ_DEVICE void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t descriptor, bool add,
                          Half) {
  HF_GPTQ_WGMMA_64("f16");
}
HF_GPTQ_DEVICE void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t descriptor, bool add,
                          Bfloat16) {
  HF_GPTQ_WGMMA_64("bf16");
}
#undef HF_GPTQ_WGMMA_64
#undef HF_GPTQ_WGMMA_32
#undef HF_GPTQ_D8

// ---- registers and memory

// Four floats to a 16-byte aligned address.
HF_GPTQ_DEVICE void store_four(float* address, float a, float b, float c, float d) {
  *reinterpret_cast<float4*>(address) = make_float4(a, b, c, d);
}

// Stores four 8x8 matrices of 16-bit elements, held as mma fragments, transposed: lane 8 i + r
// gives the address of the 16 bytes that column r of matrix i becomes.
HF_GPTQ_DEVICE void stmatrix_transposed(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// ---- host

// Describes x [rows, columns] of 16-bit elements, rows `stride` elements apart, in boxes of
// 64 columns x `box_rows` rows; the address and 2 * stride are multiples of 16. The encoder is the
// driver's; it is looked up at run time, so that the library needs no libcuda to load.
static inline cudaError_t encode_map(TensorMap* map, CUtensorMapDataType type, const void* x,
                                     int64_t columns, int64_t rows, int64_t stride, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(x), sizes, pitch, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

static inline cudaError_t make_tensor_map(TensorMap* map, const void* x, int64_t columns,
                                          int64_t rows, int64_t stride, int box_rows, Half) {
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, x, columns, rows, stride, box_rows);
}
static inline cudaError_t make_tensor_map(TensorMap* map, const void* x, int64_t columns,
                                          int64_t rows, int64_t stride, int box_rows, Bfloat16) {
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, x, columns, rows, stride, box_rows);
}

// Launches a kernel whose grid consists of clusters of `cluster` blocks.
template <class... Parameters, class... Arguments>
static cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid,
                                   dim3 block, size_t shared, cudaStream_t stream,
                                   Arguments... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) {
    cudaLaunchAttribute dimension = {};
    dimension.id = cudaLaunchAttributeClusterDimension;
    dimension.val.clusterDim.x = static_cast<unsigned>(cluster);
    dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &dimension;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace hopper
}  // namespace hf_gptq

#endif  // HF_GPTQ_EMULATE
#endif  // HF_GPTQ_HOPPER_PTX_H_
