// Attack steps in CUDA C++: x' = Π(x + size · direction(gradient)) in linf, l2 and l1, with APGD's second term.
//
// The equations are those of robust/cuda_ops/reference. All tensors are float32 with rows of n contiguous numbers; one
// number per row in size, eps, alpha and keep; mask has a byte per row, 0 for rows that stay. Pointers that do not
// apply are null. The launchers return cudaGetLastError().
#include "rows.cuh"

namespace robust {

constexpr float kInward = 4e-7f;      // of the radius: keeps the rounding of the sums inside the ball
constexpr float kExact = 1e-6f;       // of eps²: where the l2 equation counts as solved
constexpr float kClose = 2e-7f;       // of the l1 bracket's upper end: where its ends are one number
constexpr float kTiny = 1e-30f;
constexpr float kSmallest = 1.2e-38f; // a gradient's largest entry counts as at least this
constexpr float kShortest = 1e-12f;   // likewise the length of a gradient whose largest entry is one
constexpr int kRounds = 64;
constexpr int kItems = 8;             // numbers of a row that a thread holds
constexpr int kFlat = 4;              // likewise where rows need no sums

struct Step {
  float* made;
  const float *at, *gradient, *x, *before, *size, *eps, *alpha, *keep;
  const unsigned char* mask;
  int64_t n;
  float low, high;
};

__device__ inline float finite(float value) { return fabsf(value) < INFINITY ? value : 0.0f; }
__device__ inline int bits(float value) { return value == value ? __float_as_int(fabsf(value)) : 0; }

__device__ inline float onto_linf(float moved, float x, float eps, float low, float high) {
  return boxed(fminf(fmaxf(moved, x - eps), x + eps), low, high);
}

template <bool WIDE, bool TWO>
__global__ void linf_kernel(Step s) {
  const int64_t row = blockIdx.x, base = row * s.n;
  const int64_t start = int64_t(blockIdx.y) * blockDim.x * kFlat;
  float moved[kFlat], at[kFlat], x[kFlat], before[kFlat];
  load<kFlat, WIDE>(s.gradient + base, start, s.n, moved);
  load<kFlat, WIDE>(s.at + base, start, s.n, at);
  load<kFlat, WIDE>(s.x + base, start, s.n, x);
  if constexpr (TWO) load<kFlat, WIDE>(s.before + base, start, s.n, before);
  const float size = s.size[row], eps = s.eps[row];
  const float alpha = TWO ? s.alpha[row] : 1.0f;
  const bool stays = s.mask && !s.mask[row];
#pragma unroll
  for (int i = 0; i < kFlat; ++i) {
    moved[i] = onto_linf(at[i] + size * sign(moved[i]), x[i], eps, s.low, s.high);
    if constexpr (TWO) moved[i] = onto_linf(mixed(moved[i], at[i], before[i], alpha), x[i], eps, s.low, s.high);
    if (stays) moved[i] = at[i];
  }
  store<kFlat, WIDE>(s.made + base, start, s.n, moved);
}

// What a run of a row shows: its gradient, the step, or APGD's mixture of the projected step and the last one.
enum Stage { kGradient, kStep, kMixed };

// x + weight (moved − x), exact at both ends.
struct L2 {
  __device__ static float direction(float gradient, float largest, int) { return finite(gradient) / largest; }
  __device__ static float projected(float moved, float x, float scale, float low, float high) {
    const float delta = moved - x;
    return boxed(scale < 0.5f ? x + scale * delta : moved - delta * (1 - scale), low, high);
  }
};

// x + sign(delta) max(|delta| − t, 0).
struct L1 {
  __device__ static float direction(float gradient, float, int least) {
    return bits(gradient) >= least ? sign(gradient) : 0.0f;
  }
  __device__ static float projected(float moved, float x, float t, float low, float high) {
    const float delta = moved - x;
    return boxed(x + sign(delta) * fmaxf(fabsf(delta) - t, 0.0f), low, high);
  }
};

// A row in runs of kItems numbers a thread. One that fits in a run is read once per stage; of a longer one every
// pass computes the points anew, so that no thread reads what another wrote.
template <class Norm, bool WIDE>
struct Row {
  const Step& s;
  int64_t row, base;
  float largest = 1, factor = 0, first = 0;
  int least = 0;
  int filled = -1;
  float moved[kItems], x[kItems];

  __device__ Row(const Step& step) : s(step), row(blockIdx.x), base(row * step.n) {}

  __device__ void fill(int stage, int64_t start) {
    load<kItems, WIDE>(s.gradient + base, start, s.n, moved);
    if (stage == kGradient) return;
    float at[kItems];
    load<kItems, WIDE>(s.at + base, start, s.n, at);
    load<kItems, WIDE>(s.x + base, start, s.n, x);
#pragma unroll
    for (int i = 0; i < kItems; ++i) moved[i] = at[i] + factor * Norm::direction(moved[i], largest, least);
    if (stage == kStep) return;
    float before[kItems];
    load<kItems, WIDE>(s.before + base, start, s.n, before);
    const float alpha = s.alpha[row];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      moved[i] = mixed(Norm::projected(moved[i], x[i], first, s.low, s.high), at[i], before[i], alpha);
    }
  }

  // look(run's start) once per run, with `moved` and `x` filled.
  template <class Look>
  __device__ void runs(int stage, Look look) {
    const int64_t run = int64_t(kItems) * blockDim.x;
    for (int64_t start = 0; start < s.n; start += run) {
      if (s.n > run || filled != stage) fill(stage, start);
      look(start);
    }
    filled = stage;
  }

  // look(moved, x) once per number; beyond the row's end both are 0 (x + 0 in the box may not be, so nothing is
  // counted that vanishes with delta).
  template <class Look>
  __device__ void each(int stage, Look look) {
    runs(stage, [&](int64_t) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) look(moved[i], x[i]);
    });
  }

  __device__ void finish(int stage, float solution) {
    const bool stays = s.mask && !s.mask[row];
    runs(stage, [&](int64_t start) {
      if (stays) {
        load<kItems, WIDE>(s.at + base, start, s.n, moved);
      } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) moved[i] = Norm::projected(moved[i], x[i], solution, s.low, s.high);
      }
      store<kItems, WIDE>(s.made + base, start, s.n, moved);
    });
  }
};

// The factor of `reference.projections.l2_scale`.
template <bool WIDE>
__device__ float l2_scale(Row<L2, WIDE>& r, int stage, float eps) {
  const float low = r.s.low, high = r.s.high;
  float length = 0;
  r.each(stage, [&](float moved, float x) { length += (moved - x) * (moved - x); });
  length = block_join(length, Plus(), 0.0f);
  const float radius = eps * (1 - kInward), target = radius * radius;
  float u = fminf(target / fmaxf(length, kTiny), 1.0f);
  for (int round = 0; round < kRounds && u < 1; ++round) {
    Pair sums{0, 0};
    r.each(stage, [&](float moved, float x) {
      const float wish = (moved - x) * (moved - x), room = boxed(moved, low, high) - x;
      const float taken = fminf(wish * u, room * room);
      sums.first += taken;
      sums.second += room * room > taken ? wish : 0.0f;
    });
    sums = block_join(sums, Plus(), Pair{0, 0});
    const float lacking = target - sums.first;
    if (lacking <= kExact * target) break;
    u = sums.second > 0 ? fminf(u + lacking / fmaxf(sums.second, kTiny), 1.0f) : 1.0f;
  }
  return sqrtf(u);
}

// The threshold of `reference.projections.l1_shrink`.
template <bool WIDE>
__device__ float l1_shrink(Row<L1, WIDE>& r, int stage, float eps) {
  const float box_low = r.s.low, box_high = r.s.high;
  float high = 0;
  r.each(stage, [&](float moved, float x) { high = fmaxf(high, fabsf(moved - x)); });
  high = block_join(high, Larger(), 0.0f);
  float t = 0, low = 0;
  const float target = eps * (1 - kInward);
  for (int round = 0; round < kRounds; ++round) {
    Pair sums{0, 0};
    r.each(stage, [&](float moved, float x) {
      const float cap = fabsf(boxed(moved, box_low, box_high) - x), left = fmaxf(fabsf(moved - x) - t, 0.0f);
      const float taken = fminf(left, cap);
      sums.first += taken;
      sums.second += fminf(left, cap - taken) > 0 ? 1.0f : 0.0f;
    });
    sums = block_join(sums, Plus(), Pair{0, 0});
    const float over = sums.first - target;
    if (fabsf(over) <= eps * (kInward / 2) || high - low <= kClose * high || (t == 0 && over <= eps * kInward)) break;
    if (over > 0) {
      low = t;
    } else {
      high = t;
    }
    const float newton = t + over / fmaxf(sums.second, 1.0f);
    t = newton > low && newton < high && sums.second > 0 ? newton : (low + high) / 2;
  }
  return t;
}

// Sets the direction: g / max|g|, over its length.
template <bool WIDE>
__device__ void aim(Row<L2, WIDE>& r) {
  float largest = 0;
  r.each(kGradient, [&](float g, float) { largest = fmaxf(largest, fabsf(finite(g))); });
  largest = fmaxf(block_join(largest, Larger(), 0.0f), kSmallest);
  float length = 0;
  r.each(kGradient, [&](float g, float) { length += finite(g) / largest * (finite(g) / largest); });
  length = block_join(length, Plus(), 0.0f);
  r.largest = largest;
  r.factor = r.s.size[r.row] / fmaxf(sqrtf(length), kShortest);
}

// Sets the direction: the signs of the k largest, over their number. The k-th largest by bisection on the bits, which
// are ordered as the absolute values; zeros beyond the row's end never count, since the middle is at least 1.
template <bool WIDE>
__device__ void aim(Row<L1, WIDE>& r) {
  const int64_t wanted = int64_t(r.s.keep[r.row] * float(r.s.n));
  const int count = int(wanted < 1 ? 1 : wanted > r.s.n ? r.s.n : wanted);
  int least = 0, beyond = 0x7f800001;
  while (beyond - least > 1) {
    const int middle = least + (beyond - least) / 2;
    int above = 0;
    r.each(kGradient, [&](float g, float) { above += bits(g) >= middle; });
    above = block_join(above, Plus(), 0);
    if (above >= count) least = middle;
    if (above < count) beyond = middle;
    if (above == count) break;
  }
  float chosen = 0;
  r.each(kGradient, [&](float g, float) { chosen += fabsf(L1::direction(g, 1, least)); });
  chosen = block_join(chosen, Plus(), 0.0f);
  r.least = least;
  r.factor = r.s.size[r.row] / fmaxf(chosen, 1.0f);
}

template <bool WIDE>
__device__ float solve(Row<L2, WIDE>& r, int stage, float eps) { return l2_scale(r, stage, eps); }
template <bool WIDE>
__device__ float solve(Row<L1, WIDE>& r, int stage, float eps) { return l1_shrink(r, stage, eps); }

template <class Norm, bool WIDE, bool TWO>
__global__ void __launch_bounds__(1024) row_kernel(Step s) {
  Row<Norm, WIDE> r(s);
  aim(r);
  const float eps = s.eps[r.row];
  float solution = solve(r, kStep, eps);
  if constexpr (TWO) {
    r.first = solution;
    solution = solve(r, kMixed, eps);
  }
  r.finish(TWO ? kMixed : kStep, solution);
}

template <bool WIDE>
__global__ void __launch_bounds__(1024)
momentum_kernel(float* made, const float* gradient, const float* velocity, float decay, int64_t n) {
  const int64_t base = blockIdx.x * n, run = int64_t(kItems) * blockDim.x;
  float slope[kItems], last[kItems];
  float length = 0;
  for (int64_t start = 0; start < n; start += run) {
    load<kItems, WIDE>(gradient + base, start, n, slope);
#pragma unroll
    for (int i = 0; i < kItems; ++i) length += fabsf(finite(slope[i]));
  }
  length = fmaxf(block_join(length, Plus(), 0.0f), kTiny);
  for (int64_t start = 0; start < n; start += run) {
    if (n > run) load<kItems, WIDE>(gradient + base, start, n, slope);
    load<kItems, WIDE>(velocity + base, start, n, last);
#pragma unroll
    for (int i = 0; i < kItems; ++i) last[i] = decay * last[i] + finite(slope[i]) / length;
    store<kItems, WIDE>(made + base, start, n, last);
  }
}

// Threads for a row: whole warps, as few as hold it in one run, at most 1,024.
inline int threads_for(int64_t n, int items) {
  int threads = 32;
  while (threads < 1024 && int64_t(threads) * items < n) threads *= 2;
  return threads;
}

template <bool WIDE>
void launch(int norm, int64_t rows, const Step& s, cudaStream_t stream) {
  const int threads = threads_for(s.n, kItems);
  if (norm == 0) {
    const int flat = threads_for(s.n, kFlat) < 256 ? threads_for(s.n, kFlat) : 256;
    const dim3 grid(unsigned(rows), unsigned((s.n + flat * kFlat - 1) / (flat * kFlat)));
    if (s.before) {
      RUN((linf_kernel<WIDE, true>), grid, flat, stream, s);
    } else {
      RUN((linf_kernel<WIDE, false>), grid, flat, stream, s);
    }
  } else if (norm == 1) {
    if (s.before) {
      RUN((row_kernel<L1, WIDE, true>), unsigned(rows), threads, stream, s);
    } else {
      RUN((row_kernel<L1, WIDE, false>), unsigned(rows), threads, stream, s);
    }
  } else if (s.before) {
    RUN((row_kernel<L2, WIDE, true>), unsigned(rows), threads, stream, s);
  } else {
    RUN((row_kernel<L2, WIDE, false>), unsigned(rows), threads, stream, s);
  }
}

}  // namespace robust

// norm: 0 for linf, 1 for l1, 2 for l2. rows and n at least 1.
extern "C" int robust_step(int norm, int64_t rows, int64_t n, float low, float high, float* made, const float* at,
                           const float* gradient, const float* x, const float* before, const float* size,
                           const float* eps, const float* alpha, const float* keep, const unsigned char* mask,
                           void* stream) {
  const robust::Step s{made, at, gradient, x, before, size, eps, alpha, keep, mask, n, low, high};
  bool wide = n % 4 == 0;
  for (const void* pointer : {(const void*)made, (const void*)at, (const void*)gradient, (const void*)x,
                              (const void*)before}) {
    wide = wide && robust::aligned(pointer);
  }
  if (wide) {
    robust::launch<true>(norm, rows, s, static_cast<cudaStream_t>(stream));
  } else {
    robust::launch<false>(norm, rows, s, static_cast<cudaStream_t>(stream));
  }
  return int(cudaGetLastError());
}

extern "C" int robust_momentum(int64_t rows, int64_t n, float decay, float* made, const float* gradient,
                               const float* velocity, void* stream) {
  const int threads = robust::threads_for(n, robust::kItems);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (n % 4 == 0 && robust::aligned(made) && robust::aligned(gradient) && robust::aligned(velocity)) {
    RUN(robust::momentum_kernel<true>, unsigned(rows), threads, queue, made, gradient, velocity, decay, n);
  } else {
    RUN(robust::momentum_kernel<false>, unsigned(rows), threads, queue, made, gradient, velocity, decay, n);
  }
  return int(cudaGetLastError());
}
