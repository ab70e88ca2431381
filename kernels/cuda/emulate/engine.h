// What Hopper does on its own while threads go on: copies of the copy engine, products of wgmma,
// and the mbarriers, clusters and named barriers that threads meet it and each other by. On top of
// emulator.h; hopper.h makes instructions of it.
#ifndef HF_GPTQ_EMULATE_ENGINE_H_
#define HF_GPTQ_EMULATE_ENGINE_H_

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

#endif  // HF_GPTQ_EMULATE_ENGINE_H_
