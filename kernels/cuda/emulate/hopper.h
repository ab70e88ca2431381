// The sm_90a instructions of cuda/hopper_ptx.h on the CPU, on top of emulator.h.
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
//     registers were written, a block that ends before its copies and products have happened.
#ifndef HF_GPTQ_EMULATE_HOPPER_H_
#define HF_GPTQ_EMULATE_HOPPER_H_

#include <map>

#include "../ptx.h"

namespace emulate {

constexpr int kWarpgroup = 128;
constexpr uint32_t kWindow = 0x30;  // address of the first byte of dynamic shared memory

// What an mbarrier counts. `phase` is the number of completed phases.
struct PhaseBarrier {
  int arrivals, missing;
  int64_t bytes;
  uint32_t phase;
};

// One asynchronous copy, a part at a time.
struct BulkCopy {
  uint32_t barrier;
  int64_t bytes;
  std::function<void()> perform;
};

// One wgmma of a warpgroup. It can happen once all threads have issued it.
struct Product {
  uint64_t descriptor = 0;
  bool add = false;
  int registers = 0;
  float (*value)(uint16_t) = nullptr;
  float* d[kWarpgroup] = {};
  const uint32_t* a[kWarpgroup] = {};
  int issued = 0;
};

// What a thread knows of its products: how many it issued, and the number at each commit.
struct Issuer {
  size_t issued = 0;
  std::vector<size_t> commits;
  bool fenced = false;
};

struct Warpgroup {
  std::deque<Product> products;  // those not yet performed
  size_t performed = 0;
  Issuer issuers[kWarpgroup];
};

struct NamedBarrier {
  Meeting meeting;
  int threads = 0;
};

// The asynchronous side of a block.
struct Engine {
  std::map<uint32_t, PhaseBarrier> barriers;
  std::vector<BulkCopy> copies;
  std::map<int, Warpgroup> warpgroups;
  std::map<int, NamedBarrier> named;
};

inline std::map<const Block*, Engine> engines;

// Blocks of a cluster: `cluster_size` neighbours of the grid. A block is known to the others from
// the first meeting of the cluster until it ends.
inline unsigned cluster_size = 1;
inline std::map<unsigned, Block*> cluster_blocks;
inline std::map<unsigned, size_t> cluster_arrivals;  // threads that came, by cluster
constexpr int kPeerShift = 20;  // an address with rank + 1 above these bits is a peer's

inline Engine& engine() { return engines[current->block]; }

inline int thread_number() {
  const dim3 thread = current->thread;
  return static_cast<int>(thread.x + block_dim.x * (thread.y + block_dim.y * thread.z));
}

// The block whose shared memory an address lies in; the address becomes one of its window.
inline Block* owner(uint32_t& address) {
  const uint32_t rank = address >> kPeerShift;
  if (rank == 0) return current->block;
  address &= (1u << kPeerShift) - 1;
  const unsigned first = current->block->index.x / cluster_size * cluster_size;
  auto found = cluster_blocks.find(first + rank - 1);
  if (rank > cluster_size || found == cluster_blocks.end()) {
    fail("shared memory of a block that is not there, or no longer");
    return current->block;
  }
  return found->second;
}

// The byte at an address of the shared window, or of a peer's.
inline unsigned char* shared_byte(uint32_t address, uint32_t bytes) {
  const Block& block = *owner(address);
  if (address < kWindow || address + bytes > kWindow + block.shared_bytes) {
    fail("an address lies outside of shared memory");
    return block.shared;
  }
  return block.shared + (address - kWindow);
}

// The 128-byte swizzle: the 16-byte unit within a row of 128 bytes is exchanged by the row's number
// within eight rows, both taken from the address itself.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline PhaseBarrier* find_barrier(uint32_t address) {
  Engine& there = engines[owner(address)];
  auto found = there.barriers.find(address);
  if (found == there.barriers.end()) {
    fail("an mbarrier is used that was not initialised");
    return nullptr;
  }
  return &found->second;
}

inline void advance(PhaseBarrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
}

inline void perform(Engine& engine, size_t copy) {
  BulkCopy chosen = std::move(engine.copies[copy]);
  engine.copies[copy] = std::move(engine.copies.back());
  engine.copies.pop_back();
  chosen.perform();
  PhaseBarrier& barrier = engine.barriers[chosen.barrier];
  barrier.bytes -= chosen.bytes;
  advance(barrier);
}

// B[k][token] of the descriptor, k-major with the 128-byte swizzle.
inline uint16_t matrix_element(uint64_t descriptor, int k, int token) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + token / 8 * stride + token % 8 * 128 + 2 * k;
  uint16_t value;
  memcpy(&value, shared_byte(swizzle_128(address), 2), 2);
  return value;
}

inline void perform(Warpgroup& warpgroup) {
  Product& product = warpgroup.products.front();
  const uint32_t start = static_cast<uint32_t>(product.descriptor & 0x3fff) << 4;
  if (product.descriptor >> 62 != 1 || (product.descriptor >> 49 & 7) != 0 || start % 1024 > 96) {
    fail("a matrix descriptor: not the 128-byte swizzle at a multiple of 1024 bytes");
  }
  const int tokens = product.registers * 2;
  std::vector<float> b(16 * tokens);
  for (int k = 0; k < 16; ++k) {
    for (int t = 0; t < tokens; ++t) {
      b[t * 16 + k] = product.value(matrix_element(product.descriptor, k, t));
    }
  }
  for (int warp = 0; warp < 4; ++warp) {
    float a[16][16];
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int e = 0; e < 8; ++e) {
        const uint32_t word = product.a[warp * kWarp + lane][e / 2];
        a[lane / 4 + 8 * (e / 2 % 2)][lane % 4 * 2 + e % 2 + 8 * (e / 4)] =
            product.value(static_cast<uint16_t>(word >> 16 * (e % 2)));
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      float* d = product.d[warp * kWarp + lane];
      for (int i = 0; i < product.registers; ++i) {
        const int row = lane / 4 + 8 * (i / 2 % 2), token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double sum = product.add ? d[i] : 0.0;
        for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * b[token * 16 + k];
        d[i] = static_cast<float>(sum);
      }
    }
  }
  warpgroup.products.pop_front();
  ++warpgroup.performed;
}

// Lets one thing happen that may happen now. False if there is none.
inline bool progress(Engine& engine) {
  std::vector<Warpgroup*> ready;
  for (auto& [number, warpgroup] : engine.warpgroups) {
    if (!warpgroup.products.empty() && warpgroup.products.front().issued == kWarpgroup) {
      ready.push_back(&warpgroup);
    }
  }
  // Whether copies or products are quick is a matter of the seed.
  const unsigned copies = engine.copies.empty() ? 0 : 1 + settings.seed % 3 * 8;
  const unsigned products = ready.empty() ? 0 : 1 + settings.seed / 3 % 3 * 8;
  if (copies + products == 0) return false;
  if (random_bits() % (copies + products) < copies) {
    perform(engine, random_bits() % engine.copies.size());
  } else {
    perform(*ready[random_bits() % ready.size()]);
  }
  return true;
}

// One warp lags behind, another one with every seed: whoever does not wait for all is found out.
inline void lag() {
  const int warps = static_cast<int>(current->block->warps.size());
  if (thread_number() / kWarp != static_cast<int>(settings.seed * 5 % warps)) return;
  for (uint64_t i = random_bits() % 64; i > 0; --i) yield();
}

// Waits for what the engine brings about. It works now and then while threads run, and as long as
// it can when none does.
inline void wait_for_engine(const char* what, std::function<bool()> condition) {
  if (random_bits() % 2) progress(engine());
  Engine* mine = &engine();
  wait_until(what, [mine, condition = std::move(condition), me = current] {
    current = me;  // addresses are those of this thread's block
    if (condition()) return true;
    if (random_bits() % 4 == 0) progress(*mine);
    while (runnable.empty() && !condition() && progress(*mine)) {
    }
    return condition();
  });
  lag();
}

// Runs a grid of kernels that use the engine, in clusters of `cluster` blocks.
inline void run_hopper(unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes,
                       std::function<void()> kernel) {
  engines.clear();
  cluster_blocks.clear();
  cluster_arrivals.clear();
  cluster_size = cluster;
  const int resident = settings.resident;
  if (cluster > 1) {
    settings.resident = static_cast<int>(grid.x);  // whole clusters
    if (grid.x % cluster) return fail("a grid must consist of whole clusters");
  }
  run(grid, block, shared_bytes, [kernel = std::move(kernel)] {
    kernel();
    Block* mine = current->block;
    if (mine->left > 1) return;
    for (const auto& [number, warpgroup] : engines[mine].warpgroups) {
      if (!warpgroup.products.empty()) fail("a block ends before its products have happened");
    }
    if (!engines[mine].copies.empty()) fail("a block ends before its copies have happened");
    engines.erase(mine);
    cluster_blocks.erase(mine->index.x);
  });
  settings.resident = resident;
}

}  // namespace emulate

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

inline void tensor_map_prefetch(const TensorMap*) {}

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

template <class T>
inline uint32_t pack_pair(float low, float high, T type) {
  return pack_floats(low, high, type);
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
