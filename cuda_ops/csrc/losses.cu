// Attack losses and their gradients with respect to the logits, in CUDA C++: one launch, a warp per row.
//
// The formulas are those of robust/cuda_ops/reference/losses.py. A row of logits is read again from the cache on every
// pass; it is 4 kB at a thousand classes.
#include "rows.cuh"

namespace robust {

constexpr float kFloor = 1e-12f;  // keeps the ratios' denominators from zero
constexpr int kWarps = 4;         // rows of a block

// In the order of `reference.losses.LOSSES`.
enum Loss { kCrossEntropy, kMargin, kDlr, kTargetedDlr, kCombinedTargeted, kKl };

struct Best {
  float value;
  int place;
};

// The larger, of equal ones the first.
__device__ inline Best better(Best a, Best b) {
  return a.value > b.value || (a.value == b.value && a.place < b.place) ? a : b;
}

// The largest logit of a row and its class, without `omitted` classes.
__device__ inline Best largest(const float* z, int classes, const int* omitted, int count) {
  Best best{-INFINITY, INT_MAX};
  for (int k = threadIdx.x; k < classes; k += 32) {
    bool left_out = false;
    for (int i = 0; i < count; ++i) left_out = left_out || omitted[i] == k;
    if (!left_out) best = better(best, Best{z[k], k});
  }
  for (int mask = 16; mask; mask >>= 1) best = better(best, Best{other(best.value, mask), other(best.place, mask)});
  return best;
}

struct Softmax {
  float most, log_total;
  __device__ float log(float z) const { return z - most - log_total; }
};

__device__ inline Softmax softmax(const float* z, int classes) {
  const float most = largest(z, classes, nullptr, 0).value;
  float total = 0;
  for (int k = threadIdx.x; k < classes; k += 32) total += expf(z[k] - most);  // NaN if any is NaN or +inf
  return Softmax{most, logf(warp_join(total, Plus()))};
}

__device__ inline float hot(int k, int label) { return k == label ? 1.0f : 0.0f; }

__device__ inline float cross_entropy(const float* z, float* gradient, int classes, int label, float scale) {
  const Softmax s = softmax(z, classes);
  for (int k = threadIdx.x; k < classes; k += 32) gradient[k] = scale * (expf(s.log(z[k])) - hot(k, label));
  return -scale * s.log(z[label]);
}

// max over the other classes − the label's logit, times `scale`. Equal logits share the gradient.
__device__ inline float margin(const float* z, float* gradient, int classes, int label, float scale) {
  const float best = largest(z, classes, &label, 1).value;
  float ties = 0;
  for (int k = threadIdx.x; k < classes; k += 32) ties += k != label && z[k] == best ? 1.0f : 0.0f;
  ties = warp_join(ties, Plus());
  for (int k = threadIdx.x; k < classes; k += 32) {
    gradient[k] = scale * (k == label ? -1.0f : z[k] == best ? 1 / ties : 0.0f);
  }
  return scale * (best - z[label]);
}

__device__ inline float combined(const float* z, float* gradient, int classes, int y, int target) {
  for (int k = threadIdx.x; k < classes; k += 32) gradient[k] = hot(k, target) - hot(k, y);
  return z[target] - z[y];
}

// value / denominator, where a thread's part of `gradient` is the value's; it reads what it wrote itself.
__device__ inline float ratio(const float* z, float* gradient, int classes, float value, bool targeted) {
  int places[4];
  float top[4];
  for (int i = 0; i < (targeted ? 4 : 3); ++i) {
    const Best best = largest(z, classes, places, i);
    places[i] = best.place;
    top[i] = best.value;
  }
  const float below = (targeted ? top[0] - (top[2] + top[3]) / 2 : top[0] - top[2]) + kFloor;
  const float found = value / below, back = found / below;
  for (int k = threadIdx.x; k < classes; k += 32) {
    const float last = targeted ? 0.5f * (hot(k, places[2]) + hot(k, places[3])) : hot(k, places[2]);
    gradient[k] = gradient[k] / below - back * (hot(k, places[0]) - last);
  }
  return found;
}

__device__ inline float kl(const float* z, const float* clean, float* gradient, int classes) {
  const Softmax s = softmax(z, classes), c = softmax(clean, classes);
  Pair sums{0, 0};
  for (int k = threadIdx.x; k < classes; k += 32) {
    const float p = expf(c.log(clean[k]));
    sums.first += p * (c.log(clean[k]) - s.log(z[k]));
    sums.second += p;
  }
  sums = warp_join(sums, Plus());
  for (int k = threadIdx.x; k < classes; k += 32) {
    gradient[k] = expf(s.log(z[k])) * sums.second - expf(c.log(clean[k]));
  }
  return sums.first;
}

__device__ inline bool has_nan(const float* z, int classes) {
  int found = 0;
  for (int k = threadIdx.x; k < classes; k += 32) found += z[k] != z[k];
  return warp_join(found, Plus()) > 0;
}

__global__ void loss_kernel(int loss, int64_t rows, int classes, float* values, float* gradients, const float* logits,
                            const int64_t* y, const int64_t* targets, const float* reference) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;  // whole warps
  const float* z = logits + row * classes;
  float* gradient = gradients + row * classes;
  const int label = int(y[row]), target = targets ? int(targets[row]) : -1;
  float value = 0;
  if (loss == kCrossEntropy) {
    value = cross_entropy(z, gradient, classes, targets ? target : label, targets ? -1.0f : 1.0f);
  } else if (loss == kMargin) {
    value = margin(z, gradient, classes, targets ? target : label, targets ? -1.0f : 1.0f);
  } else if (loss == kDlr) {
    value = ratio(z, gradient, classes, margin(z, gradient, classes, label, 1.0f), false);
  } else if (loss == kTargetedDlr) {
    value = ratio(z, gradient, classes, combined(z, gradient, classes, label, target), true);
  } else if (loss == kCombinedTargeted) {
    value = combined(z, gradient, classes, label, target);
  } else {
    value = kl(z, reference + row * classes, gradient, classes);
  }
  // A maximum passes NaN by.
  if ((loss == kMargin || loss == kDlr || loss == kTargetedDlr) && has_nan(z, classes)) value = NAN;
  if (threadIdx.x == 0) values[row] = value;
}

}  // namespace robust

// loss: its place in `reference.losses.LOSSES`; rows and classes at least 1; labels in [0, classes).
extern "C" int robust_loss(int loss, int64_t rows, int classes, float* values, float* gradients, const float* logits,
                           const int64_t* y, const int64_t* targets, const float* reference, void* stream) {
  const dim3 threads(32, robust::kWarps);
  const unsigned blocks = unsigned((rows + robust::kWarps - 1) / robust::kWarps);
  RUN(robust::loss_kernel, blocks, threads, static_cast<cudaStream_t>(stream), loss, rows, classes, values, gradients,
      logits, y, targets, reference);
  return int(cudaGetLastError());
}
