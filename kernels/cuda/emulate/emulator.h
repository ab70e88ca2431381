// Runs the kernels' own source on the CPU, to test it where there is no GPU.
//
// Every thread of a block is a fiber. One scheduler picks the next fiber at random (seeded)
// wherever the source synchronises, so threads, warps and blocks meet in ever new orders:
//
//   * blocks start in a shuffled order and `resident` of them run interleaved, so the arrival order
//     of split sums varies;
//   * shared memory begins poisoned, and the target of an asynchronous copy is poisoned until the
//     copy is waited for, the latest moment the hardware promises: a missing wait, a missing
//     barrier or a stage that is overwritten too early shows as NaN;
//   * lanes that meet in different warp-wide operations, and barriers that not all reach, are
//   errors.
//
// What it cannot show: the memory model's weaker orders, timing, and how tensor cores round (here a
// product is summed in double and rounded once).
#ifndef HF_GPTQ_EMULATOR_H_
#define HF_GPTQ_EMULATOR_H_

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulate {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kPoison = 0xff;  // NaN in fp16, bf16 and fp32

struct Settings {
  uint64_t seed = 0;
  int resident = 3;  // blocks that run interleaved
  // What the emulated device says of itself.
  int compute_capability = 80;
  int multiprocessors = 108;
  int shared_bytes = 164 * 1024;
};
inline Settings settings;
inline std::string error;  // of the last launch; empty when it went well

struct Copy {
  void* to;
  const void* from;
  int bytes, filled;  // `filled` bytes are read, the rest of `bytes` is zero
};

struct Block;
struct Warp;

struct Lane {
  ucontext_t context;  // of its start; later switches go by jump, which needs no system call
  jmp_buf jump;
  bool started = false;
  void* stack = nullptr;
  dim3 thread;
  int lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  std::vector<Copy> open;                // copies not yet in a group
  std::deque<std::vector<Copy>> groups;  // committed groups, oldest first
  std::function<bool()> until;           // what a polling fiber waits for
  const char* waits_for = "";
  bool done = false;
};

// Fibers that wait for each other.
struct Meeting {
  std::vector<Lane*> waiting;
};

struct Warp {
  Meeting meeting;
  const char* operation = nullptr;
  void* arguments[kWarp] = {};
  int arrived = 0;
};

struct Block {
  dim3 index;
  std::vector<unsigned char> guarded;  // shared memory with guards before and after
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Lane>> lanes;
  Meeting barrier;
  int left = 0;  // lanes that have not returned
};

inline Lane* current = nullptr;
inline dim3 grid_dim, block_dim;
inline jmp_buf scheduler;
inline std::vector<Lane*> runnable, sleeping, polling;
inline std::mt19937_64 random_bits;
inline std::function<void()> body;
inline std::vector<void*> free_stacks;

inline void fail(const std::string& what) {
  if (error.empty()) error = what;
}

// Back to the scheduler; the caller has put the fiber on a list.
inline void suspend() {
  if (_setjmp(current->jump) == 0) _longjmp(scheduler, 1);
}

// Runs a fiber until it suspends itself or ends.
__attribute__((noinline)) inline void resume(Lane* lane) {
  current = lane;
  if (_setjmp(scheduler)) return;
  if (lane->started) _longjmp(lane->jump, 1);
  lane->started = true;
  setcontext(&lane->context);
}

// A fiber that may go on. Now and then one falls far behind the others.
inline void ready(Lane* lane) { (random_bits() % 16 == 0 ? sleeping : runnable).push_back(lane); }

// A point where another fiber may go on.
inline void yield() {
  ready(current);
  suspend();
}

// Waits for a condition that other fibers bring about: barriers with phases, flags in memory.
inline void wait_until(const char* what, std::function<bool()> condition) {
  if (condition()) return;
  current->until = std::move(condition);
  current->waits_for = what;
  polling.push_back(current);
  suspend();
}

inline void release(Meeting& meeting) {
  for (Lane* lane : meeting.waiting) ready(lane);
  meeting.waiting.clear();
}

inline void wait_in(Meeting& meeting, const char* what) {
  current->waits_for = what;
  meeting.waiting.push_back(current);
  suspend();
}

// A barrier of all threads of the block.
inline void sync_threads() {
  Block& block = *current->block;
  if (block.barrier.waiting.size() + 1 == block.lanes.size()) {
    release(block.barrier);
    yield();
  } else {
    wait_in(block.barrier, "__syncthreads");
  }
}

// An operation of all 32 lanes of a warp. The last to arrive calls `execute(arguments)` with the
// pointers that the lanes passed, in lane order.
template <class Arguments, class Execute>
void collective(const char* operation, Arguments& mine, Execute execute) {
  Warp& warp = *current->warp;
  if (warp.arrived && strcmp(warp.operation, operation) != 0) {
    fail(std::string("lanes of a warp diverge: ") + warp.operation + " and " + operation);
  }
  warp.operation = operation;
  warp.arguments[current->lane] = &mine;
  if (++warp.arrived < kWarp) {
    wait_in(warp.meeting, operation);
    return;
  }
  Arguments* all[kWarp];
  for (int i = 0; i < kWarp; ++i) all[i] = static_cast<Arguments*>(warp.arguments[i]);
  execute(all);
  warp.arrived = 0;
  release(warp.meeting);
  yield();
}

inline void sync_warp() {
  int nothing = 0;
  collective("__syncwarp", nothing, [](int**) {});
}

// Asynchronous copies of one lane.
inline void copy_async(void* to, const void* from, int bytes, int filled) {
  memset(to, kPoison, bytes);
  current->open.push_back({to, from, bytes, filled});
}

inline void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

// Until at most `pending` of the latest groups are unfinished.
inline void wait_copies(int pending) {
  while (static_cast<int>(current->groups.size()) > pending) {
    for (const Copy& copy : current->groups.front()) {
      memset(copy.to, 0, copy.bytes);
      if (copy.filled) memcpy(copy.to, copy.from, copy.filled);
    }
    current->groups.pop_front();
  }
}

inline unsigned char* shared_memory() { return current->block->shared; }

// Dynamic shared memory is fenced with bytes that must not change.
constexpr size_t kGuard = 1024;
constexpr unsigned char kGuardByte = 0xa5;

inline void enter() {
  body();
  Lane* me = current;
  me->done = true;
  if (!me->open.empty() || !me->groups.empty()) {
    for (const auto& group : me->groups) {
      if (!group.empty()) fail("a thread returns before its asynchronous copies were waited for");
    }
    if (!me->open.empty()) fail("a thread returns with an asynchronous copy in no group");
  }
  _longjmp(scheduler, 1);
}

inline std::unique_ptr<Block> start_block(unsigned number, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index =
      dim3(number % grid_dim.x, number / grid_dim.x % grid_dim.y, number / grid_dim.x / grid_dim.y);
  block->guarded.assign(shared_bytes + 2 * kGuard, kGuardByte);
  const uintptr_t base = reinterpret_cast<uintptr_t>(block->guarded.data()) + kGuard / 2;
  block->shared = reinterpret_cast<unsigned char*>((base + 127) / 128 * 128);
  memset(block->shared, kPoison, shared_bytes);
  block->shared_bytes = shared_bytes;
  const unsigned threads = block_dim.x * block_dim.y * block_dim.z;
  if (threads % kWarp) fail("a block must consist of whole warps");
  for (unsigned i = 0; i < threads / kWarp; ++i) block->warps.push_back(std::make_unique<Warp>());
  for (unsigned i = 0; i < threads; ++i) {
    auto lane = std::make_unique<Lane>();
    lane->thread =
        dim3(i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y);
    lane->lane = i % kWarp;
    lane->warp = block->warps[i / kWarp].get();
    lane->block = block.get();
    if (free_stacks.empty()) {
      lane->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    } else {
      lane->stack = free_stacks.back();
      free_stacks.pop_back();
    }
    getcontext(&lane->context);
    lane->context.uc_stack.ss_sp = lane->stack;
    lane->context.uc_stack.ss_size = kStackBytes;
    lane->context.uc_link = nullptr;
    makecontext(&lane->context, enter, 0);
    runnable.push_back(lane.get());
    block->lanes.push_back(std::move(lane));
  }
  block->left = static_cast<int>(threads);
  return block;
}

inline void check_guards(const Block& block) {
  const unsigned char* first = block.guarded.data();
  const unsigned char* last = first + block.guarded.size();
  for (const unsigned char* p = first; p < last; ++p) {
    if (p >= block.shared && p < block.shared + block.shared_bytes) continue;
    if (*p != kGuardByte) return fail("shared memory is written out of bounds");
  }
}

inline bool wake_sleeping() {
  if (sleeping.empty()) return false;
  const size_t chosen = random_bits() % sleeping.size();
  runnable.push_back(sleeping[chosen]);
  sleeping[chosen] = sleeping.back();
  sleeping.pop_back();
  return true;
}

inline bool wake_polling() {
  bool any = false;
  for (size_t i = 0; i < polling.size();) {
    if (polling[i]->until()) {
      runnable.push_back(polling[i]);
      polling[i] = polling.back();
      polling.pop_back();
      any = true;
    } else {
      ++i;
    }
  }
  return any;
}

// Runs a grid to its end. What went wrong is in `error`.
inline void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  error.clear();
  grid_dim = grid;
  block_dim = block;
  body = std::move(kernel);
  random_bits.seed(settings.seed);
  runnable.clear();
  sleeping.clear();
  polling.clear();
  if (static_cast<int>(shared_bytes) > settings.shared_bytes) {
    return fail("more shared memory is asked for than the device has");
  }
  std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  std::vector<std::unique_ptr<Block>> resident;
  size_t next = 0;
  const size_t most = settings.resident < 1 ? 1 : settings.resident;
  unsigned steps = 0;
  while (error.empty()) {
    while (resident.size() < most && next < order.size()) {
      resident.push_back(start_block(order[next++], shared_bytes));
    }
    if (resident.empty()) break;
    if (++steps % 64 == 0) {
      wake_polling();
      wake_sleeping();
    }
    if (runnable.empty() && !wake_sleeping() && !wake_polling()) {
      std::string what = "deadlock; a thread waits in ";
      for (const auto& lane : resident.front()->lanes) {
        if (!lane->done) {
          fail(what + lane->waits_for);
          break;
        }
      }
      break;
    }
    const size_t chosen = random_bits() % runnable.size();
    Lane* lane = runnable[chosen];
    runnable[chosen] = runnable.back();
    runnable.pop_back();
    resume(lane);
    if (!current->done) continue;
    free_stacks.push_back(current->stack);
    current->stack = nullptr;
    Block* finished = current->block;
    if (--finished->left) continue;
    check_guards(*finished);
    for (size_t i = 0; i < resident.size(); ++i) {
      if (resident[i].get() != finished) continue;
      resident[i] = std::move(resident.back());
      resident.pop_back();
      break;
    }
  }
  for (const auto& left : resident) {
    for (const auto& lane : left->lanes) {
      if (lane->stack) free_stacks.push_back(lane->stack);
    }
  }
  current = nullptr;
}

}  // namespace emulate

#define threadIdx (emulate::current->thread)
#define blockIdx (emulate::current->block->index)
#define blockDim (emulate::block_dim)
#define gridDim (emulate::grid_dim)

inline void __syncthreads() { emulate::sync_threads(); }
inline void __syncwarp() { emulate::sync_warp(); }
inline void __threadfence() { emulate::yield(); }

template <class T>
T atomicAdd(T* address, T value) {
  emulate::yield();
  const T before = *address;
  *address = before + value;
  return before;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  struct Arguments {
    T value;
    int mask;
  } mine{value, mask};
  emulate::collective("__shfl_xor_sync", mine, [](Arguments** all) {
    T values[emulate::kWarp];
    for (int i = 0; i < emulate::kWarp; ++i) values[i] = all[i]->value;
    for (int i = 0; i < emulate::kWarp; ++i) all[i]->value = values[(i ^ all[i]->mask) % 32];
  });
  return mine.value;
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  struct Arguments {
    T value;
    int source;
  } mine{value, source};
  emulate::collective("__shfl_sync", mine, [](Arguments** all) {
    T values[emulate::kWarp];
    for (int i = 0; i < emulate::kWarp; ++i) values[i] = all[i]->value;
    for (int i = 0; i < emulate::kWarp; ++i) all[i]->value = values[all[i]->source % 32];
  });
  return mine.value;
}

#endif  // HF_GPTQ_EMULATOR_H_
