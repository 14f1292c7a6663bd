// Applies posterior weights to whole windows: the second pass of a patch set's posterior mean, and
// the transposed derivative of the posterior mean over square windows.
//
// With p[q, i] the posterior weight of image i for the window of pixel q, from the distances and
// the minimum and total of a scan (`window_posterior`), the pass forms
//
//     out[c, d] = sum_i (sum over the q whose window holds d of a[q, i]) v_i[c, d]
//
// where a = p for a patch set, whose windows are those that fit inside the image, and
// a[q, i] = p[q, i] sum_c g[c, q] (v_i[c, q] - mean[c, q]) for a cotangent g. The inner sum is a
// window sum again, with the window turned round.
//
// Grid: (noisy image, split of the training images, chunk of quads x slice of the channels). A
// block holds whole images and writes the sums of its quads over its split; `merge_sums` joins
// the splits.

#include "pyflocality/window_phases.h"

namespace pyflocality {

struct VjpTraits : WindowTraits {
  static constexpr bool kCotangent = PYFLOCALITY_COTANGENT;
  static constexpr int kAnswers = kChannels < 4 ? kChannels : 4;
  static constexpr int kSlices = (kChannels + kAnswers - 1) / kAnswers;
  static constexpr int kQuads = kHeight * kTileQuads;
  static_assert(kInPlace && kTileHeight == kHeight && kTileWidth == kWidth, "whole images");
  static_assert(kTangents == 0, "distances alone");
};

// Pixels whose window takes part: all of them, or those whose window fits inside the image.
__device__ inline bool has_window(int x, int y) {
  using T = VjpTraits;
  if (T::kCotangent) return inside(x, y);
  return x >= T::kBefore && x + T::kAfter < T::kWidth && y >= T::kBefore &&
         y + T::kAfter < T::kHeight;
}

// What the pass knows of one noisy image: arrays over [H, W], or [C, H, W].
struct Posterior {
  const float* minimum;
  const float* inverse_total;
  const float* cotangent;
  const float* mean;
  float factor;
};

// Distances of a quad become weights, in place.
__device__ inline void weigh(int row, int column, const ImageGroup& images,
                             const Posterior& posterior, float* planes) {
  using T = VjpTraits;
  float minimum[4], inverse[4];
  load_quad(posterior.minimum + row * T::kWidth, column, minimum);
  load_quad(posterior.inverse_total + row * T::kWidth, column, inverse);
#pragma unroll 1
  for (int m = 0; m < T::kImages; ++m) {
    float* place = planes + m * T::kSumPlane + row * T::kSumStride + column;
    float weight[4], heaviest = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weight[j] = 0.0f;
      if (m < images.count && has_window(column + j, row)) {
        // The scan found the same distances, if the compiler rounded them alike.
        const float distance = place[j] < minimum[j] ? minimum[j] : place[j];
        weight[j] = relative_weight(distance, minimum[j], posterior.factor) * inverse[j];
      }
      heaviest = heaviest < weight[j] ? weight[j] : heaviest;
    }
    if (T::kCotangent && heaviest > 0.0f) {
      float slope[4] = {};
#pragma unroll 1
      for (int c = 0; c < T::kChannels; ++c) {
        float values[4], mean[4], cotangent[4];
        load_quad(images.row(m, c, row), column, values);
        load_quad(posterior.mean + c * T::kPixels + row * T::kWidth, column, mean);
        load_quad(posterior.cotangent + c * T::kPixels + row * T::kWidth, column, cotangent);
#pragma unroll
        for (int j = 0; j < 4; ++j) slope[j] += cotangent[j] * (values[j] - mean[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) weight[j] *= slope[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j < T::kWidth) place[j] = weight[j];
    }
  }
}

// Adds the weighted values of a group of images at a quad.
__device__ inline void add_values(int row, int column, int slice, const ImageGroup& images,
                                  const float* noisy, const float* planes,
                                  float (&sums)[VjpTraits::kAnswers][4]) {
  using T = VjpTraits;
#pragma unroll 1
  for (int m = 0; m < T::kImages && m < images.count; ++m) {
    const float* place = planes + m * T::kSumPlane + row * T::kSumStride + column;
    float weight[4];
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weight[j] = T::kVector || column + j < T::kWidth ? place[j] : 0.0f;
      any = any || weight[j] != 0.0f;
    }
    if (!any) continue;
#pragma unroll
    for (int c = 0; c < T::kAnswers; ++c) {
      const int channel =
          slice * T::kAnswers + c < T::kChannels ? slice * T::kAnswers + c : T::kChannels - 1;
      float values[4], base[4] = {};
      load_quad(images.row(m, channel, row), column, values);
      // The weights of a cotangent sum to zero: only the differences of the values count.
      if (T::kCotangent) load_quad(noisy + channel * T::kPixels + row * T::kWidth, column, base);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (T::kCotangent) base[j] = centre(base[j]);
        sums[c][j] += weight[j] * (values[j] - base[j]);
      }
    }
  }
}

}  // namespace pyflocality

extern __shared__ float pyflocality_shared[];

//   images                  [count, C, H, W] as stored
//   noisy                   [B, C, H, W], in the units of the stored values
//   factor                  [B]: weights are 2^(-factor distance)
//   minimum, inverse_total  [B, H, W], of the scan
//   cotangent, mean         [B, C, H, W], read where there is a cotangent
//   partial                 [splits, B, C, H, W]
extern "C" __global__ void __launch_bounds__(pyflocality::VjpTraits::kThreads,
                                             pyflocality::VjpTraits::kMinBlocks)
    window_vjp(const pyflocality::Stored* __restrict__ images, long long count,
               long long images_per_split, const float* __restrict__ noisy,
               const float* __restrict__ factor, const float* __restrict__ minimum,
               const float* __restrict__ inverse_total, const float* __restrict__ cotangent,
               const float* __restrict__ mean, float* __restrict__ partial) {
  using namespace pyflocality;
  using T = VjpTraits;
  const long long b = blockIdx.x, split = blockIdx.y;
  const int slice = blockIdx.z % T::kSlices;
  const int own = blockIdx.z / T::kSlices * T::kThreads + threadIdx.x;
  const int own_row = own / T::kTileQuads, own_column = own % T::kTileQuads * T::kQuad;
  const Tile tile = tile_of(0);
  noisy += b * T::kValues;
  const Posterior posterior{minimum + b * T::kPixels, inverse_total + b * T::kPixels,
                            cotangent + b * T::kValues, mean + b * T::kValues, factor[b]};
  float* planes = pyflocality_shared;

  float sums[T::kAnswers][4] = {};
  const long long first = split * images_per_split;
  images += first * T::kValues;
#pragma unroll 1
  for (int left = images_of_split(first, count, images_per_split); left > 0; left -= T::kImages) {
    const ImageGroup group{images, left < T::kImages ? left : T::kImages};
    images += T::kImages * static_cast<long long>(T::kValues);
    window_planes(tile, group, noisy, nullptr, planes);
    for (int quad = threadIdx.x; quad < T::kQuads; quad += T::kThreads) {
      weigh(quad / T::kTileQuads, quad % T::kTileQuads * T::kQuad, group, posterior, planes);
    }
    __syncthreads();
    sum_rows(tile, 0, T::kHeight, T::kAfter, planes);
    __syncthreads();
    sum_columns(tile, T::kAfter, planes);
    __syncthreads();
    if (own < T::kQuads) add_values(own_row, own_column, slice, group, noisy, planes, sums);
    __syncthreads();
  }
  if (own >= T::kQuads) return;
  partial += (split * gridDim.x + b) * T::kValues + own_row * T::kWidth + own_column;
#pragma unroll
  for (int c = 0; c < T::kAnswers; ++c) {
    const int channel = slice * T::kAnswers + c;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (channel < T::kChannels && own_column + j < T::kWidth) {
        partial[channel * T::kPixels + j] = sums[c][j];
      }
    }
  }
}
