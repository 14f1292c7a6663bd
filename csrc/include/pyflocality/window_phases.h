// Phases that the window kernels share, each run by all threads of a block between barriers.
//
// A plane holds one value per pixel of the region: of one image the squared differences to the
// noisy image, or its product with a tangent, summed over the channels; then their sums along the
// rows; then over the windows.
#pragma once

#include "pyflocality/online_softmax.h"
#include "pyflocality/window_sums.h"
#include "pyflocality/window_traits.h"

namespace pyflocality {

using Stored = StoredAs<WindowTraits::kBytes>::Type;

// A tile of pixels and the region that its windows reach.
struct Tile {
  int x, y;
  int left, top, columns, rows;
};

__device__ inline Tile tile_of(int index) {
  using T = WindowTraits;
  Tile tile;
  // Where one tile is all, the compiler is to know its sizes.
  if (T::kTiles == 1) index = 0;
  tile.x = index % T::kTilesAcross * T::kTileWidth;
  tile.y = index / T::kTilesAcross * T::kTileHeight;
  const int left = tile.x - T::kBefore, top = tile.y - T::kBefore;
  const int right = tile.x + T::kTileWidth + T::kAfter;
  const int bottom = tile.y + T::kTileHeight + T::kAfter;
  tile.left = left > 0 ? left / T::kQuad * T::kQuad : 0;
  tile.top = top > 0 ? top : 0;
  tile.columns = (right < T::kWidth ? right : T::kWidth) - tile.left;
  tile.rows = (bottom < T::kHeight ? bottom : T::kHeight) - tile.top;
  return tile;
}

// Byte j of a word as a float. On the device, as the last digits of 2^23, which are exact: the
// conversion instruction runs at a fraction of the rate of the two that this takes.
__device__ inline float byte_of(unsigned word, int j) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650u + j)) - 8388608.0f;
#else
  return static_cast<float>((word >> (8 * j)) & 255u);
#endif
}

// Four values of a row from column x, a multiple of 4, on; zero beyond its end.
__device__ inline void load_quad(const unsigned char* row, int x, float (&values)[4]) {
  if (WindowTraits::kVector) {
    const unsigned word = *reinterpret_cast<const unsigned*>(row + x);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = byte_of(word, j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[j] = x + j < WindowTraits::kWidth ? static_cast<float>(row[x + j]) : 0.0f;
    }
  }
}

__device__ inline void load_quad(const float* row, int x, float (&values)[4]) {
  if (WindowTraits::kVector) {
    const float4 quad = *reinterpret_cast<const float4*>(row + x);
    values[0] = quad.x, values[1] = quad.y, values[2] = quad.z, values[3] = quad.w;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = x + j < WindowTraits::kWidth ? row[x + j] : 0.0f;
  }
}

// The value in the range of the data nearest to a noisy one. Values are taken relative to it
// where their covariances are wanted: at small noise both are close, at large noise neither is far.
__device__ inline float centre(float noisy) {
  using S = StoredAs<WindowTraits::kBytes>;
  return noisy < S::kLowest ? S::kLowest : noisy > S::kHighest ? S::kHighest : noisy;
}

// The images that a block takes at once: `count` of them from `first` on. Beyond, the last one is
// read again and given no weight.
struct ImageGroup {
  const Stored* first;
  int count;
  __device__ const Stored* row(int image, int channel, int y) const {
    using T = WindowTraits;
    const long long place = image < count ? image : count - 1;
    return first + place * T::kValues + channel * T::kPixels + y * T::kWidth;
  }
};

// How many images a split has, of `count` in all, from `first` on.
__device__ inline int images_of_split(long long first, long long count,
                                      long long images_per_split) {
  const long long rest = count - first;
  return static_cast<int>(rest < images_per_split ? rest : images_per_split);
}

// Rows [row, row + rows) of the region: squared differences, and tangents times values.
__device__ inline void fill_band(const Tile& tile, int row, int rows, const ImageGroup& images,
                                 const float* noisy, const float* tangents, float* band) {
  using T = WindowTraits;
  constexpr int kStored = T::kTangents > 0 ? T::kTangents : 1;
  // As many as keep their loads in flight together within the registers: four bytes are one word.
  // Fewer where the sums along lines, or the place of a tile, need registers of their own.
  constexpr bool kFewer = !T::kUnrolled || (!T::kBytes && T::kTiles > 1);
  constexpr int kWanted = (T::kBytes && T::kVector ? 4 : 2) >> (T::kTangents + kFewer);
  constexpr int kPossible = kWanted < T::kImages ? kWanted : T::kImages;
  constexpr int kTogether = kPossible > 0 ? kPossible : 1;
  static_assert(T::kImages % kTogether == 0, "whole groups of images");
  const int quads = (tile.columns + T::kQuad - 1) / T::kQuad;
  for (int item = threadIdx.x; item < rows * quads; item += T::kThreads) {
    const int line = item / quads, column = item % quads * T::kQuad;
    const int x = tile.left + column, y = tile.top + row + line;
#pragma unroll 1
    for (int m = 0; m < T::kImages; m += kTogether) {
      float distance[kTogether][4] = {}, product[kStored][kTogether][4] = {};
      constexpr int kMost = T::kTangents > 0 ? 3 : kFewer && !T::kBytes ? 1 : 4;
      constexpr int kUnroll = T::kChannels <= kMost ? T::kChannels : 1;
#pragma unroll kUnroll
      for (int c = 0; c < T::kChannels; ++c) {
        const int offset = c * T::kPixels + y * T::kWidth;
        float target[4], tangent[kStored][4];
        load_quad(noisy + offset, x, target);
#pragma unroll
        for (int t = 0; t < T::kTangents; ++t) {
          load_quad(tangents + t * T::kValues + offset, x, tangent[t]);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          float values[4];
          load_quad(images.row(m + i, c, y), x, values);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float gap = values[j] - target[j];
            distance[i][j] += gap * gap;
#pragma unroll
            for (int t = 0; t < T::kTangents; ++t) {
              product[t][i][j] += tangent[t][j] * (values[j] - centre(target[j]));
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        float* place = band + (m + i) * T::kBandPlane + line * T::kBandStride + column;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (column + j < tile.columns) {
            place[j] = distance[i][j];
#pragma unroll
            for (int t = 0; t < T::kTangents; ++t) {
              place[(t + 1) * T::kImages * T::kBandPlane + j] = product[t][i][j];
            }
          }
        }
      }
    }
  }
}

// Sums of a window along one line of shared memory, which starts `origin` pixels into a line of the
// image; emit as in window_sums. Blocks are cut where the image's are, so that the same window has
// the same sum, to the last bit, whatever the tile: what one kernel sums another sums again.
template <typename Emit>
__device__ inline void sum_line(const float* line, int stride, int length, int origin, int before,
                                float* tails, const Emit& emit) {
  using T = WindowTraits;
  const int phase = T::kTiles == 1 ? 0 : origin % T::kWindow;
  const auto element = [&](int x) { return x < phase ? 0.0f : line[(x - phase) * stride]; };
  const auto emit_own = [&](int x, float sum) {
    if (x >= phase) emit(x - phase, sum);
  };
  if constexpr (T::kUnrolled) {
    RegisterTails<T::kWindow> partials;
    window_sums<T::kWindow, true>(phase + length, before, element, partials, emit_own);
  } else {
    StridedTails partials{tails + threadIdx.x, T::kLineThreads};
    window_sums<T::kWindow, false>(phase + length, before, element, partials, emit_own);
  }
}

// Window sums along the rows [row, row + rows) of the region, a thread a line.
__device__ inline void sum_rows(const Tile& tile, int row, int rows, int before, float* shared) {
  using T = WindowTraits;
  if (threadIdx.x >= T::kLineThreads) return;
  for (int item = threadIdx.x; item < T::kPlanes * rows; item += T::kLineThreads) {
    const int plane = item / rows, line = item % rows;
    float* values = shared + plane * T::kBandPlane + line * T::kBandStride;
    float* sums = shared + T::kSumOffset + plane * T::kSumPlane + (row + line) * T::kSumStride;
    sum_line(values, 1, tile.columns, tile.left, before, shared + T::kTailOffset,
             [&](int x, float sum) {
               if (T::kInPlace) {
                 sums[x] = sum;
               } else {
                 // The columns of the tile, which are all that the columns' sums are wanted of.
                 const int column = tile.left + x - tile.x;
                 if (column >= 0 && column < T::kTileWidth) sums[column] = sum;
               }
             });
  }
}

// Where the tile's column lies in a plane of sums.
__device__ inline int sum_column(const Tile& tile, int column) {
  return WindowTraits::kInPlace ? tile.x - tile.left + column : column;
}

// Window sums along the tile's columns of the row sums, in place, a thread a line.
__device__ inline void sum_columns(const Tile& tile, int before, float* shared) {
  using T = WindowTraits;
  if (threadIdx.x >= T::kLineThreads) return;
  const int width = T::kWidth - tile.x < T::kTileWidth ? T::kWidth - tile.x : T::kTileWidth;
  for (int item = threadIdx.x; item < T::kPlanes * width; item += T::kLineThreads) {
    const int plane = item / width, column = item % width;
    float* sums = shared + T::kSumOffset + plane * T::kSumPlane + sum_column(tile, column);
    sum_line(sums, T::kSumStride, tile.rows, tile.top, before, shared + T::kTailOffset,
             [&](int y, float sum) { sums[y * T::kSumStride] = sum; });
  }
}

// Distances of every pixel of the tile, and its tangents' products, to a group of images.
__device__ inline void window_planes(const Tile& tile, const ImageGroup& images, const float* noisy,
                                     const float* tangents, float* shared) {
  using T = WindowTraits;
#pragma unroll 1
  for (int row = 0; row < tile.rows; row += T::kBandRows) {
    const int rows = tile.rows - row < T::kBandRows ? tile.rows - row : T::kBandRows;
    fill_band(tile, row, rows, images, noisy, tangents, shared);
    __syncthreads();
    sum_rows(tile, row, rows, T::kBefore, shared);
    __syncthreads();
  }
  sum_columns(tile, T::kBefore, shared);
  __syncthreads();
}

// Column quads of the region beyond the image's last column read no further than their row.
__device__ inline bool inside(int x, int y) {
  return x < WindowTraits::kWidth && y < WindowTraits::kHeight;
}

}  // namespace pyflocality
