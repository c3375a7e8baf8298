// What the row kernels share: sums over a block of threads, and runs of a row in registers.
//
// A test compiles these files as plain C++ with its own RUN and thread primitives; hence the guard.
#pragma once
#ifndef RUN
#include <cuda_runtime.h>
#define RUN(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif
#include <climits>
#include <cmath>
#include <cstdint>

namespace robust {

struct Pair {
  float first, second;
};

__device__ inline float other(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ inline int other(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ inline Pair other(Pair value, int mask) {
  Pair found;
  found.first = __shfl_xor_sync(0xffffffffu, value.first, mask);
  found.second = __shfl_xor_sync(0xffffffffu, value.second, mask);
  return found;
}

struct Plus {
  __device__ float operator()(float a, float b) const { return a + b; }
  __device__ int operator()(int a, int b) const { return a + b; }
  __device__ Pair operator()(Pair a, Pair b) const { return Pair{a.first + b.first, a.second + b.second}; }
};

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// A warp's values joined; every lane gets the same bits, since a + b = b + a.
template <class T, class Join>
__device__ T warp_join(T value, Join join) {
  for (int mask = 16; mask; mask >>= 1) value = join(value, other(value, mask));
  return value;
}

// A block's values joined; all threads call it, the block is whole warps, and all get the same bits.
template <class T, class Join>
__device__ T block_join(T value, Join join, T nothing) {
  __shared__ T parts[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = warp_join(value, join);
  __syncthreads();  // the last join's parts have been read
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  value = lane < warps ? parts[lane] : nothing;
  return warp_join(value, join);
}

__device__ inline float sign(float value) { return float(value > 0) - float(value < 0); }
__device__ inline float boxed(float value, float low, float high) { return fminf(fmaxf(value, low), high); }
__device__ inline float mixed(float moved, float origin, float before, float alpha) {
  return origin + alpha * (moved - origin) + (1 - alpha) * (origin - before);
}

// One run of a row, ITEMS numbers a thread; 0 beyond the end. WIDE: 16-byte loads, for which the row's beginning is
// aligned and n a multiple of 4.
template <int ITEMS, bool WIDE>
__device__ void load(const float* row, int64_t start, int64_t n, float (&values)[ITEMS]) {
  if constexpr (WIDE) {
#pragma unroll
    for (int item = 0; item < ITEMS; item += 4) {
      const int64_t place = start + (int64_t(item / 4) * blockDim.x + threadIdx.x) * 4;
      const float4 four = place < n ? *reinterpret_cast<const float4*>(row + place) : float4{0, 0, 0, 0};
      values[item] = four.x;
      values[item + 1] = four.y;
      values[item + 2] = four.z;
      values[item + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      const int64_t place = start + int64_t(item) * blockDim.x + threadIdx.x;
      values[item] = place < n ? row[place] : 0.0f;
    }
  }
}

template <int ITEMS, bool WIDE>
__device__ void store(float* row, int64_t start, int64_t n, const float (&values)[ITEMS]) {
  if constexpr (WIDE) {
#pragma unroll
    for (int item = 0; item < ITEMS; item += 4) {
      const int64_t place = start + (int64_t(item / 4) * blockDim.x + threadIdx.x) * 4;
      if (place < n) {
        *reinterpret_cast<float4*>(row + place) =
            float4{values[item], values[item + 1], values[item + 2], values[item + 3]};
      }
    }
  } else {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      const int64_t place = start + int64_t(item) * blockDim.x + threadIdx.x;
      if (place < n) row[place] = values[item];
    }
  }
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace robust
