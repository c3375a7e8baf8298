// CUDA's threads as fibers of one CPU thread, so that a test can run a .cu file that g++ has compiled.
//
// The threads of a block take turns: each runs until it meets the others. Their launches need RUN instead of <<<>>>.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define RUN(kernel, grid, threads, stream, ...) emulate::run(grid, threads, [&] { (kernel)(__VA_ARGS__); })

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }
inline dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace emulate {

struct Fiber {
  ucontext_t context;
  dim3 index;
  bool done = false;
  std::vector<char> stack;
};

inline ucontext_t home;
inline std::vector<Fiber> fibers;
inline size_t current;
inline std::function<void()> body;
inline std::vector<uint64_t> slots;

inline void enter() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &home);
}

// Waits until every thread of the block has come as far.
inline void meet() { swapcontext(&fibers[current].context, &home); }

inline void block(dim3 threads) {
  size_t number = size_t(threads.x) * threads.y * threads.z;
  fibers = std::vector<Fiber>(number);
  slots.assign(number, 0);
  for (size_t i = 0; i < number; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
    fiber.stack.resize(1 << 15);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (current = 0; current < number; ++current) {
      if (fibers[current].done) continue;
      threadIdx = fibers[current].index;
      swapcontext(&home, &fibers[current].context);
      left = left || !fibers[current].done;
    }
  }
}

inline void run(dim3 grid, dim3 threads, std::function<void()> kernel) {
  if (threads.x * threads.y * threads.z > 1024 || grid.y > 65535 || !grid.x || !grid.y) std::abort();
  gridDim = grid;
  blockDim = threads;
  body = kernel;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      block(threads);
    }
  }
}

}  // namespace emulate

inline void __syncthreads() { emulate::meet(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  size_t self = emulate::current;
  std::memcpy(&emulate::slots[self], &value, sizeof(T));
  emulate::meet();
  T found;
  std::memcpy(&found, &emulate::slots[(self & ~size_t(31)) | ((self & 31) ^ mask)], sizeof(T));
  emulate::meet();
  return found;
}

inline int __float_as_int(float value) {
  int found;
  std::memcpy(&found, &value, sizeof found);
  return found;
}
