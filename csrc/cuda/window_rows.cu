// Rows of the Jacobian of the posterior mean over square windows, for a few chosen pixels: their
// distances to every training image, and weighted sums of the training images over their windows.
//
// A row r belongs to a noisy image b and a pixel (y, x); `where` lists them as [R, 3] = b, y, x.

#include "pyflocality/pixel.h"

namespace pyflocality {

struct RowTraits {
  static constexpr bool kBytes = PYFLOCALITY_BYTES;
  static constexpr int kChannels = PYFLOCALITY_CHANNELS;
  static constexpr int kHeight = PYFLOCALITY_HEIGHT;
  static constexpr int kWidth = PYFLOCALITY_WIDTH;
  static constexpr int kPixels = kHeight * kWidth;
  static constexpr int kValues = kChannels * kPixels;
  static constexpr int kBefore = PYFLOCALITY_WINDOW / 2;
  static constexpr int kAfter = PYFLOCALITY_WINDOW - 1 - kBefore;
  static constexpr int kThreads = 256;
  // Images of a block at once, 32 threads each, and in all.
  static constexpr int kAtOnce = kThreads / 32;
  static constexpr int kImages = 4 * kAtOnce;
};

using Stored = StoredAs<RowTraits::kBytes>::Type;

// The window around a pixel, cut at the border.
struct Window {
  long long b;
  int top, left, rows, columns;
  __device__ explicit Window(const long long* where) {
    using T = RowTraits;
    b = where[0];
    const int y = static_cast<int>(where[1]), x = static_cast<int>(where[2]);
    top = y > T::kBefore ? y - T::kBefore : 0;
    left = x > T::kBefore ? x - T::kBefore : 0;
    rows = (y + T::kAfter < T::kHeight ? y + T::kAfter + 1 : T::kHeight) - top;
    columns = (x + T::kAfter < T::kWidth ? x + T::kAfter + 1 : T::kWidth) - left;
  }
  __device__ int values() const { return RowTraits::kChannels * rows * columns; }
  // Where the nth value of the window lies in an image.
  __device__ int offset(int n) const {
    const int x = n % columns, line = n / columns;
    return line / rows * RowTraits::kPixels + (top + line % rows) * RowTraits::kWidth + left + x;
  }
};

}  // namespace pyflocality

extern __shared__ float pyflocality_shared[];

//   images    [count, C, H, W] as stored
//   noisy     [B, C, H, W], in the units of the stored values
//   distance  [R, count]
// Grid: (32 images, row).
extern "C" __global__ void __launch_bounds__(pyflocality::RowTraits::kThreads)
    window_distances(const pyflocality::Stored* __restrict__ images, long long count,
                     const float* __restrict__ noisy, const long long* __restrict__ where,
                     float* __restrict__ distance) {
  using namespace pyflocality;
  using T = RowTraits;
  const long long row = blockIdx.y;
  const Window window(where + 3 * row);
  const int lane = threadIdx.x % 32, place = threadIdx.x / 32;
  const float* target = noisy + window.b * T::kValues;
  for (int turn = 0; turn < T::kImages; turn += T::kAtOnce) {
    const long long image = static_cast<long long>(blockIdx.x) * T::kImages + turn + place;
    const Stored* values = images + (image < count ? image : count - 1) * T::kValues;
    float sum = 0.0f;
    for (int n = lane; n < window.values(); n += 32) {
      const int offset = window.offset(n);
      const float gap = static_cast<float>(values[offset]) - target[offset];
      sum += gap * gap;
    }
    pyflocality_shared[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && image < count) {
      sum = 0.0f;
      for (int k = 0; k < 32; ++k) sum += pyflocality_shared[threadIdx.x + k];
      distance[row * count + image] = sum;
    }
    __syncthreads();
  }
}

//   images   [count, C, H, W] as stored
//   centre   [B, C, H, W]: values are taken relative to it
//   weight   [R, count], of zero sum over the images of a row
//   partial  [splits, R, C, H, W], zero outside of the windows
// Grid: (256 values of the window, row, split of the training images).
extern "C" __global__ void __launch_bounds__(pyflocality::RowTraits::kThreads)
    window_weighted_sums(const pyflocality::Stored* __restrict__ images, long long count,
                         long long images_per_split, const float* __restrict__ centre,
                         const long long* __restrict__ where, const float* __restrict__ weight,
                         float* __restrict__ partial) {
  using namespace pyflocality;
  using T = RowTraits;
  const long long row = blockIdx.y, split = blockIdx.z;
  const Window window(where + 3 * row);
  const int n = blockIdx.x * T::kThreads + threadIdx.x;
  if (n >= window.values()) return;
  const int offset = window.offset(n);
  const float base = centre[window.b * T::kValues + offset];
  const long long end = (split + 1) * images_per_split;
  const long long last = end < count ? end : count;
  float sum = 0.0f;
  for (long long image = split * images_per_split; image < last; ++image) {
    // At small noise most images weigh nothing: they need not be read.
    const float own = weight[row * count + image];
    if (own != 0.0f) {
      sum += own * (static_cast<float>(images[image * T::kValues + offset]) - base);
    }
  }
  partial[(split * gridDim.y + row) * T::kValues + offset] = sum;
}
