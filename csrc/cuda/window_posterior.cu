// Posterior means over square windows: one pass over the training images for a batch of noisy
// images, with any number of tangents.
//
// Grid: (noisy image, split of the training images, tile of pixels x slice of the channels).
// Noisy images are the fastest index: blocks that run together read the same training images,
// which then come from memory once and from the second-level cache for the rest of the batch. A
// block writes the state of its pixels over its split; `merge_states` joins the splits in a fixed
// order, so the result has the same bits from run to run, whatever else is in the batch.
//
// Cost of one (noisy image, image, pixel) at C = 3, by which the kernel is to be judged: 12
// instructions for the squared difference (per channel: byte to float in two, subtract,
// multiply-add), 2 x 3 additions for the sums along both axes, 5 + 3 C for the softmax (minimum,
// subtract, scale, exponential, add; per channel: byte to float in two, multiply-add), and what
// moves them between registers, shared memory and cache. That is 32 at least; the loops compiled
// for compute capability 9.0 have 50 (k = 7, bytes), against 128 lanes of a multiprocessor each
// cycle. CIFAR-10 (N 50,000, 32x32x3) at B = 8 has 4.1e8 of them: 0.46 ms at least and 0.71 ms as
// compiled on 132 multiprocessors at 1.7 GHz, beside one read of 154 MB (0.05 ms at 3 TB/s), which
// overlaps. Shared memory and the first-level cache share a path of 32 words a cycle: the sums move
// 1 + 2 + 2 + 1 words for windows up to 15, 1 + 6 + 6 + 1 above; the bytes, read twice, 2 x 3/4;
// the noisy image, read for four images at once, 3/4, for two above. 8.25 words take 0.47 ms, 17
// take 0.97 ms. The states of 481 splits are 79 MB, which the merge reads up to two and a half
// times: 0.1 ms, which does not overlap. All of this is arithmetic: none of it has been measured.

#include "pyflocality/window_phases.h"

namespace pyflocality {

struct ScanTraits : WindowTraits {
  // Sums over more channels than this would not fit into registers: slices of the channels, each
  // of which computes the distances again.
  static constexpr int kMostAnswers = kTangents > 0 ? 3 : 4;
  static constexpr int kAnswers = kChannels < kMostAnswers ? kChannels : kMostAnswers;
  static constexpr int kSlices = (kChannels + kAnswers - 1) / kAnswers;
  // Weights; weighted values; and per tangent weighted products, and those times values.
  static constexpr int kSums = (1 + kTangents) * (1 + kAnswers);
  static constexpr int kStateSums = (1 + kTangents) * (1 + kChannels);
  // Images weighed together: as many as the registers hold beside the sums.
  static constexpr bool kFew = kTangents > 0 || kAnswers > 3 || !kBytes || !kVector;
  static constexpr bool kOne = kTangents > 1 && !(kBytes && kVector);
  static constexpr int kWanted = kOne ? 1 : kFew ? 2 : 4;
  static constexpr int kTogether = kWanted < kImages ? kWanted : kImages;
  static_assert(kImages % kTogether == 0, "whole groups of images");
  static_assert(kTileHeight * kTileQuads <= kThreads, "four pixels a thread");
};

using State = OnlineSoftmax<ScanTraits::kSums>;

// Takes a group of images into the state of four neighbouring pixels.
__device__ inline void take_in(const Tile& tile, int row, int column, int slice,
                               const ImageGroup& images, const float* noisy, float factor,
                               const float* shared, State (&state)[4]) {
  using T = ScanTraits;
  constexpr int kTangentSums = T::kTangents > 0 ? T::kTangents : 1;
  const int x = tile.x + column, y = tile.y + row;
  const float* sums = shared + T::kSumOffset + (y - tile.top) * T::kSumStride;
#pragma unroll 1
  for (int m = 0; m < T::kImages && m < images.count; m += T::kTogether) {
    float weight[T::kTogether][4], product[kTangentSums][T::kTogether][4];
    float heaviest = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Pixels beyond the row have a state too, of zero distances, which nobody asks for.
      const bool valid = T::kVector || x + j < T::kWidth;
      const float* place = sums + sum_column(tile, column + j);
      float nearest = infinity();
#pragma unroll
      for (int i = 0; i < T::kTogether; ++i) {
        const int plane = (m + i) * T::kSumPlane;
        const float distance = valid ? place[plane] : 0.0f;
        weight[i][j] = m + i < images.count ? distance : infinity();
        nearest = smaller(nearest, weight[i][j]);
#pragma unroll
        for (int t = 0; t < T::kTangents; ++t) {
          const int tangent = (t + 1) * T::kImages * T::kSumPlane;
          product[t][i][j] = valid ? place[tangent + plane] : 0.0f;
        }
      }
      state[j].lower(nearest, factor);
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < T::kTogether; ++i) {
        weight[i][j] = state[j].weight(weight[i][j], factor);
        total += weight[i][j];
#pragma unroll
        for (int t = 0; t < T::kTangents; ++t) {
          product[t][i][j] *= weight[i][j];
          state[j].sums[(t + 1) * (1 + T::kAnswers)] += product[t][i][j];
        }
      }
      state[j].sums[0] += total;
      heaviest = heaviest < total ? total : heaviest;
    }
    // At small noise most images weigh nothing: their values need not be read.
    if (heaviest == 0.0f) continue;
#pragma unroll
    for (int c = 0; c < T::kAnswers; ++c) {
      // The last slice repeats the last channel, and does not store it.
      const int channel =
          slice * T::kAnswers + c < T::kChannels ? slice * T::kAnswers + c : T::kChannels - 1;
      float base[4] = {};
      if (T::kTangents > 0) {
        load_quad(noisy + channel * T::kPixels + y * T::kWidth, x, base);
#pragma unroll
        for (int j = 0; j < 4; ++j) base[j] = centre(base[j]);
      }
#pragma unroll
      for (int i = 0; i < T::kTogether; ++i) {
        float values[4];
        load_quad(images.row(m + i, channel, y), x, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float value = values[j] - base[j];
          state[j].sums[1 + c] += weight[i][j] * value;
#pragma unroll
          for (int t = 0; t < T::kTangents; ++t) {
            state[j].sums[(t + 1) * (1 + T::kAnswers) + 1 + c] += product[t][i][j] * value;
          }
        }
      }
    }
  }
}

// Writes the state of four pixels. A state is [1 + kStateSums, H W]: minimum, weights, weighted
// values of every channel, and the same again per tangent without the minimum.
__device__ inline void store_state(int x, int y, int slice, const State (&state)[4],
                                   float* partial) {
  using T = ScanTraits;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (!inside(x + j, y)) continue;
    float* place = partial + y * T::kWidth + x + j;
    if (slice == 0) place[0] = state[j].minimum;
#pragma unroll
    for (int t = 0; t <= T::kTangents; ++t) {
      const float* sums = state[j].sums + t * (1 + T::kAnswers);
      float* target = place + (1 + t * (1 + T::kChannels)) * static_cast<long long>(T::kPixels);
      if (slice == 0) target[0] = sums[0];
#pragma unroll
      for (int c = 0; c < T::kAnswers; ++c) {
        const int channel = slice * T::kAnswers + c;
        if (channel < T::kChannels) {
          target[(1 + channel) * static_cast<long long>(T::kPixels)] = sums[1 + c];
        }
      }
    }
  }
}

}  // namespace pyflocality

extern __shared__ float pyflocality_shared[];

//   images    [count, C, H, W] as stored
//   noisy     [B, C, H, W], in the units of the stored values
//   factor    [B]: weights are 2^(-factor distance)
//   tangents  [B, kTangents, C, H, W]
//   partial   [splits, B, 1 + kStateSums, H W]
extern "C" __global__ void __launch_bounds__(pyflocality::ScanTraits::kThreads,
                                             pyflocality::ScanTraits::kMinBlocks)
    window_posterior(const pyflocality::Stored* __restrict__ images, long long count,
                     long long images_per_split, const float* __restrict__ noisy,
                     const float* __restrict__ factor, const float* __restrict__ tangents,
                     float* __restrict__ partial) {
  using namespace pyflocality;
  using T = ScanTraits;
  const long long b = blockIdx.x, split = blockIdx.y;
  const int slice = blockIdx.z % T::kSlices;
  const Tile tile = tile_of(blockIdx.z / T::kSlices);
  const int row = threadIdx.x / T::kTileQuads;
  const int column = threadIdx.x % T::kTileQuads * T::kQuad;
  const bool active = row < T::kTileHeight && inside(tile.x + column, tile.y + row);
  noisy += b * T::kValues;
  tangents += b * T::kTangents * T::kValues;

  State state[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) state[j].init();
  const long long first = split * images_per_split;
  images += first * T::kValues;
#pragma unroll 1
  for (int left = images_of_split(first, count, images_per_split); left > 0; left -= T::kImages) {
    const ImageGroup group{images, left < T::kImages ? left : T::kImages};
    images += T::kImages * static_cast<long long>(T::kValues);
    window_planes(tile, group, noisy, tangents, pyflocality_shared);
    if (active) {
      take_in(tile, row, column, slice, group, noisy, factor[b], pyflocality_shared, state);
    }
    // The next group overwrites what was read: where one tile is all, by the thread that read it.
    if (T::kInPlace && T::kTiles > 1) __syncthreads();
  }
  if (active) {
    partial += (split * gridDim.x + b) * (1 + T::kStateSums) * T::kPixels;
    store_state(tile.x + column, tile.y + row, slice, state, partial);
  }
}
