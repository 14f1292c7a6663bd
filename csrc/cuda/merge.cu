// Joins what the blocks of a scan wrote, in a fixed order and in double precision.
//
// A block of 256 threads serves 32 neighbouring entries with 8 threads each: thread k of an entry
// adds splits k, k + 8, ..., and the first one adds the eight terms.

#include "pyflocality/online_softmax.h"

namespace pyflocality {

constexpr int kEntries = 32, kTerms = 8;

// Sum over splits of value(split), for the entry of this thread; valid in its first thread.
template <typename Value>
__device__ inline double sum_splits(long long splits, double* shared, const Value& value) {
  const int entry = threadIdx.x % kEntries, term = threadIdx.x / kEntries;
  double sum = 0.0;
  for (long long s = term; s < splits; s += kTerms) sum += value(s);
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = 0.0;
  if (term == 0) {
    for (int k = 0; k < kTerms; ++k) sum += shared[k * kEntries + entry];
  }
  return sum;
}

}  // namespace pyflocality

extern __shared__ float pyflocality_shared[];

//   partial  [splits, B, 1 + sums, pixels]: minimum, then sums, of every split
//   factor   [B]
//   merged   [B, 1 + sums, pixels]
// Grid: (32 pixels, noisy image, sum or the minimum).
extern "C" __global__ void __launch_bounds__(256)
    merge_states(const float* __restrict__ partial, const float* __restrict__ factor,
                 long long splits, long long pixels, double* __restrict__ merged) {
  using namespace pyflocality;
  const int entry = threadIdx.x % kEntries, term = threadIdx.x / kEntries;
  const long long pixel = static_cast<long long>(blockIdx.x) * kEntries + entry;
  const long long rows = gridDim.z, b = blockIdx.y, row = blockIdx.z;
  // Threads beyond the last pixel work on it too, and store nothing.
  const long long place = b * rows * pixels + (pixel < pixels ? pixel : pixels - 1);
  const long long stride = gridDim.y * rows * pixels;

  float minimum = infinity();
  for (long long s = term; s < splits; s += kTerms) {
    const float other = partial[s * stride + place];
    minimum = other < minimum ? other : minimum;
  }
  pyflocality_shared[threadIdx.x] = minimum;
  __syncthreads();
  for (int k = 0; k < kTerms; ++k) {
    const float other = pyflocality_shared[k * kEntries + entry];
    minimum = other < minimum ? other : minimum;
  }
  __syncthreads();

  double result = minimum;
  if (row > 0) {
    double* shared = reinterpret_cast<double*>(pyflocality_shared);
    result = sum_splits(splits, shared, [&](long long s) {
      const float* state = partial + s * stride + place;
      return static_cast<double>(relative_weight(state[0], minimum, factor[b])) *
             state[row * pixels];
    });
  }
  if (term == 0 && pixel < pixels) merged[(b * rows + row) * pixels + pixel] = result;
}

//   partial  [splits, entries]
//   merged   [entries]
// Grid: (32 entries).
extern "C" __global__ void __launch_bounds__(256)
    merge_sums(const float* __restrict__ partial, long long splits, long long entries,
               double* __restrict__ merged) {
  using namespace pyflocality;
  const long long entry = static_cast<long long>(blockIdx.x) * kEntries + threadIdx.x % kEntries;
  const long long place = entry < entries ? entry : entries - 1;
  double* shared = reinterpret_cast<double*>(pyflocality_shared);
  const double sum = sum_splits(splits, shared, [&](long long s) {
    return static_cast<double>(partial[s * entries + place]);
  });
  if (threadIdx.x < kEntries && entry < entries) merged[entry] = sum;
}
