// The sm_90a instructions of cuda/hopper_ptx.h on the CPU, on top of engine.h.
//
// Bulk copies and wgmma are what they are on the chip: they happen some time after they were
// issued, in an order of the emulator's choosing (seeded), and what waits for them is an mbarrier
// or wgmma_wait. So that a missing wait shows in the numbers:
//
//   * the destination of a copy is poisoned when it is issued and filled when it happens;
//   * wgmma reads its registers, its descriptor's shared memory and its accumulators when it
//     happens, and a product that does not add poisons its accumulators when it is issued;
//   * descriptors and the 128-byte swizzle are decoded from their bits and from addresses in the
//     shared window, whose origin is not aligned, as on the chip;
//   * what the instructions forbid is an error: misaligned addresses, arrivals beyond a barrier's
//     count, operands that differ within a warpgroup, a product without wgmma_fence after its
//     registers were written, a block that ends before its copies and products have happened,
//     shared memory of a block of the cluster that has ended.
//
// Whole clusters run interleaved, and with every seed another warp lags behind.
#ifndef HF_GPTQ_EMULATE_HOPPER_H_
#define HF_GPTQ_EMULATE_HOPPER_H_

#include "engine.h"

namespace hf_gptq {
namespace hopper {

// What the copy engine knows of a matrix of 16-bit elements: columns innermost, rows `pitch` bytes
// apart, boxes of box_columns x box_rows.
struct TensorMap {
  const unsigned char* base;
  int64_t columns, rows, pitch;
  int box_columns, box_rows;
};

inline uint32_t window_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulate::shared_memory()) +
         emulate::kWindow;
}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8) emulate::fail("an mbarrier is not aligned to 8 bytes");
  emulate::shared_byte(barrier, 8);
  emulate::engine().barriers[barrier] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0,
                                         0};
}

inline void mbarrier_init_fence() {}

inline void async_proxy_fence() {}

inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  emulate::PhaseBarrier* found = emulate::find_barrier(barrier);
  if (!found) return;
  found->bytes += bytes;
  if (found->bytes >= 1 << 20) emulate::fail("an mbarrier expects more bytes than it can count");
  if (found->missing-- == 0) emulate::fail("more arrivals than an mbarrier counts");
  emulate::advance(*found);
  emulate::yield();
}

inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_expect_tx(barrier, 0); }

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulate::PhaseBarrier* found = emulate::find_barrier(barrier);
  if (!found) return;
  emulate::wait_for_engine("mbarrier_wait", [=] { return (found->phase & 1) != parity; });
}

inline void cluster_sync() {
  emulate::Block* block = emulate::current->block;
  const unsigned cluster = block->index.x / emulate::cluster_size;
  const size_t threads = block->lanes.size() * emulate::cluster_size;
  emulate::cluster_blocks[block->index.x] = block;
  const size_t round = emulate::cluster_arrivals[cluster]++ / threads;
  emulate::wait_until("cluster_sync",
                      [=] { return emulate::cluster_arrivals[cluster] >= (round + 1) * threads; });
}

inline uint32_t peer_address(uint32_t address, uint32_t rank) {
  return address | (rank + 1) << emulate::kPeerShift;
}

inline void mbarrier_arrive_peer(uint32_t barrier) { mbarrier_arrive(barrier); }

inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
}

inline void load_peer_four(float (&values)[4], uint32_t address) {
  if (address % 16) emulate::fail("a vector of four floats is not aligned to 16 bytes");
  memcpy(values, emulate::shared_byte(address, 16), 16);
}

inline void bulk_copy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  if (destination % 16 || reinterpret_cast<uintptr_t>(source) % 16 || bytes % 16 || bytes == 0) {
    emulate::fail("a bulk copy is not aligned to 16 bytes, or empty");
  }
  unsigned char* to = emulate::shared_byte(destination, bytes);
  memset(to, emulate::kPoison, bytes);
  emulate::engine().copies.push_back({barrier, bytes, [=] { memcpy(to, source, bytes); }});
}

inline void tensor_copy(uint32_t destination, const TensorMap* map, int32_t column, int32_t row,
                        uint32_t barrier) {
  const int row_bytes = map->box_columns * 2, bytes = row_bytes * map->box_rows;
  if (destination % 128 || row_bytes != 128) {
    emulate::fail("a swizzled box needs rows of 128 bytes and a destination aligned to 128");
  }
  unsigned char* start = emulate::shared_byte(destination, bytes);
  memset(start, emulate::kPoison, bytes);
  emulate::engine().copies.push_back(
      {barrier, bytes, [=, from = *map] {
         for (int r = 0; r < from.box_rows; ++r) {
           for (int c = 0; c < from.box_columns; ++c) {
             const int64_t y = int64_t(row) + r, x = int64_t(column) + c;
             uint16_t value = 0;
             if (y >= 0 && y < from.rows && x >= 0 && x < from.columns) {
               memcpy(&value, from.base + y * from.pitch + x * 2, 2);
             }
             const uint32_t address = emulate::swizzle_128(destination + r * row_bytes + c * 2);
             memcpy(start + (address - destination), &value, 2);
           }
         }
       }});
}

template <int kRegisters>
inline void registers_give() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}

template <int kRegisters>
inline void registers_take() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}

inline void named_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads % emulate::kWarp) {
    emulate::fail("a named barrier has a number from 1 to 15 and whole warps");
  }
  emulate::NamedBarrier& barrier = emulate::engine().named[id];
  if (!barrier.meeting.waiting.empty() && barrier.threads != threads) {
    emulate::fail("threads disagree on how many meet at a named barrier");
  }
  barrier.threads = threads;
  if (static_cast<int>(barrier.meeting.waiting.size()) + 1 < threads) {
    emulate::wait_in(barrier.meeting, "named_barrier");
    return;
  }
  emulate::release(barrier.meeting);
  emulate::yield();
}

inline emulate::Warpgroup& my_warpgroup() {
  return emulate::engine().warpgroups[emulate::thread_number() / emulate::kWarpgroup];
}

inline emulate::Issuer& my_issuer() {
  return my_warpgroup().issuers[emulate::thread_number() % emulate::kWarpgroup];
}

inline void wgmma_fence() { my_issuer().fenced = true; }

inline void wgmma_commit() { my_issuer().commits.push_back(my_issuer().issued); }

template <int kPending>
inline void wgmma_wait() {
  emulate::Issuer& issuer = my_issuer();
  if (issuer.commits.size() <= kPending) return;
  const size_t until = issuer.commits[issuer.commits.size() - 1 - kPending];
  const emulate::Warpgroup* warpgroup = &my_warpgroup();
  emulate::wait_for_engine("wgmma_wait", [=] { return warpgroup->performed >= until; });
}

template <int kCount>
inline void registers_settle(float (&)[kCount]) {}

// `value` turns the 16 bits of an element into its number.
template <int kCount>
inline void issue_wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t descriptor, bool add,
                        float (*value)(uint16_t)) {
  emulate::Warpgroup& warpgroup = my_warpgroup();
  emulate::Issuer& issuer = my_issuer();
  if (!issuer.fenced) emulate::fail("wgmma without wgmma_fence after its registers were written");
  issuer.fenced = false;
  const size_t number = issuer.issued++ - warpgroup.performed;
  if (number == warpgroup.products.size()) {
    warpgroup.products.emplace_back();
    warpgroup.products.back().descriptor = descriptor;
    warpgroup.products.back().add = add;
    warpgroup.products.back().registers = kCount;
    warpgroup.products.back().value = value;
  }
  emulate::Product& product = warpgroup.products[number];
  if (product.descriptor != descriptor || product.add != add || product.registers != kCount ||
      product.value != value) {
    emulate::fail("threads of a warpgroup issue different products");
  }
  const int thread = emulate::thread_number() % emulate::kWarpgroup;
  product.d[thread] = d;
  product.a[thread] = a;
  ++product.issued;
  if (!add) memset(d, emulate::kPoison, sizeof(d));
  if (emulate::random_bits() % 64 == 0) emulate::yield();
}

template <int kCount>
inline void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t descriptor, bool add, Half) {
  issue_wgmma(d, a, descriptor, add, [](uint16_t value) { return to_float(value, Half()); });
}

template <int kCount>
inline void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t descriptor, bool add,
                  Bfloat16) {
  issue_wgmma(d, a, descriptor, add, [](uint16_t value) { return to_float(value, Bfloat16()); });
}

inline void store_four(float* address, float a, float b, float c, float d) {
  const float values[4] = {a, b, c, d};
  memcpy(address, values, 16);
}

// Row r of matrix i goes to the address of lane 8 i + r.
inline void stmatrix_transposed(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  struct Arguments {
    uint32_t row;
    uint32_t matrix[4];
  } mine{row, {a, b, c, d}};
  emulate::collective("stmatrix", mine, [](Arguments** all) {
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < 8; ++r) {
        const uint32_t address = all[8 * i + r]->row;
        if (address % 16) emulate::fail("a row of stmatrix is not aligned to 16 bytes");
        unsigned char* to = emulate::shared_byte(address, 16);
        // Row r of the transposed matrix is column r of the fragments: element (n, r) is the
        // r % 2 half of lane 4 n + r / 2.
        for (int n = 0; n < 8; ++n) {
          const uint32_t word = all[4 * n + r / 2]->matrix[i];
          const uint16_t value = static_cast<uint16_t>(word >> 16 * (r % 2));
          memcpy(to + 2 * n, &value, 2);
        }
      }
    }
  });
}

template <class T>
cudaError_t make_tensor_map(TensorMap* map, const void* x, int64_t columns, int64_t rows,
                            int64_t stride, int box_rows, T) {
  emulate::error.clear();
  if (reinterpret_cast<uintptr_t>(x) % 16 || stride % 8 || stride < columns || box_rows > 256) {
    emulate::fail("a tensor map needs an address and a pitch that are multiples of 16");
  }
  *map = {static_cast<const unsigned char*>(x), columns, rows, stride * 2, 64, box_rows};
  return emulate::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block,
                            size_t shared, cudaStream_t, Arguments... arguments) {
  emulate::run_hopper(static_cast<unsigned>(cluster), grid, block, shared,
                      [=] { kernel(arguments...); });
  return emulate::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace hopper
}  // namespace hf_gptq

#endif  // HF_GPTQ_EMULATE_HOPPER_H_
