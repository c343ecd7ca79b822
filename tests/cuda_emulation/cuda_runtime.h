// The part of CUDA that fastsal's kernels use, on the CPU: the tests compile csrc/cuda against this header with a C++
// compiler, and so run the kernels' own source without a GPU.
//
// The threads of a block are fibers of one system thread. A fiber runs until a barrier or a warp exchange, which it
// leaves only when all the others have come. Unlike a GPU this also reports divergent barriers, exchanges that lack a
// lane and misaligned loads, and shared memory begins with NaN in every block; FASTSAL_EMULATION_REVERSE=1 runs blocks
// and threads in the opposite order, so that a race shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int CUDART_VERSION = 0;
struct cudaFuncAttributes {};
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline unsigned threads() { return blockDim.x * blockDim.y; }

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Counts arrivals; its generation ends when all have come.
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // [2, threads]: what the lanes exchange, alternately
  Barrier all;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  unsigned current = 0, finished = 0;
  std::function<void()> body;
  std::set<void*> begun;  // shared memory that has its NaN
};
inline Block block;

inline void wait(Barrier& barrier, unsigned wanted) {
  Fiber& fiber = block.fibers[block.current];
  if (++barrier.arrived == wanted) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber.waits_for = &barrier;
  fiber.generation = barrier.generation;
  if (!_setjmp(fiber.state)) _longjmp(block.scheduler, 1);
}

inline void enter() {
  block.body();
  block.fibers[block.current].done = true;
  ++block.finished;
  _longjmp(block.scheduler, 1);
}

inline void resume(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x);
  fiber.waits_for = nullptr;
  if (_setjmp(block.scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline void run_block(unsigned threads, bool reverse) {
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) block.fibers[t].started = block.fibers[t].done = false;
  block.warps.assign((threads + kWarp - 1) / kWarp, Barrier());
  block.slots.assign(2 * threads, 0);
  block.all = Barrier();
  block.finished = 0;
  block.begun.clear();
  while (block.finished < threads) {
    bool moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = reverse ? threads - 1 - i : i;
      const Fiber& fiber = block.fibers[thread];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
      resume(thread);
      moved = true;
    }
    if (!moved) fail("threads wait for others that never come");
  }
}

// Every lane of the warp gives a value and sees those of all.
inline const uint64_t* exchange(uint64_t value) {
  const unsigned thread = block.current, warp = thread / kWarp, first = warp * kWarp;
  if (first + kWarp > threads()) fail("an exchange in a warp that is not full");
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (block.fibers[first + lane].done) fail("an exchange with a lane that has left");
  }
  uint64_t* turn = block.slots.data() + (block.warps[warp].generation % 2) * threads() + first;
  turn[thread - first] = value;
  wait(block.warps[warp], kWarp);
  return turn;
}

}  // namespace emulation

// A block's first thread that comes to this shared memory fills it with NaN.
inline void emulated_unwritten(void* shared, size_t bytes) {
  if (emulation::block.begun.insert(shared).second) std::memset(shared, 0xff, bytes);
}

inline void __syncthreads() {
  if (emulation::block.finished) emulation::fail("a barrier after a thread has left");
  emulation::wait(emulation::block.all, emulation::threads());
}

inline void __syncwarp() { emulation::exchange(0); }

template <class V>
V __shfl_xor_sync(unsigned, V value, int distance) {
  static_assert(sizeof(V) == sizeof(uint64_t), "the emulation exchanges 64 bits");
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = emulation::exchange(bits)[(threadIdx.x % emulation::kWarp) ^ static_cast<unsigned>(distance)];
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* values = emulation::exchange(predicate != 0);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulation::kWarp; ++lane) ballot |= static_cast<unsigned>(values[lane]) << lane;
  return ballot;
}

template <class V>
V __ldg(const V* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(V)) emulation::fail("a misaligned load");
  return *from;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const char* order = std::getenv("FASTSAL_EMULATION_REVERSE");
  const bool reverse = order && *order == '1';
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulation::block.body = [=] { kernel(arguments...); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(reverse ? gridDim.x - 1 - i : i);
    emulation::run_block(emulation::threads(), reverse);
  }
  return cudaSuccess;
}
