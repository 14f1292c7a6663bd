// Sizes of a window kernel, constants of one compilation. The launcher plans them
// (`kernels/geometry.py`) and passes them as macros; what the two must agree on
// is asserted here.
#pragma once

#include "pyflocality/pixel.h"

namespace pyflocality {

struct WindowTraits {
  // Training images: bytes or floats, [N, C, H, W]; kVector where four neighbouring values can be
  // read at once.
  static constexpr bool kBytes = PYFLOCALITY_BYTES;
  static constexpr bool kVector = PYFLOCALITY_VECTOR;
  static constexpr int kChannels = PYFLOCALITY_CHANNELS;
  static constexpr int kHeight = PYFLOCALITY_HEIGHT;
  static constexpr int kWidth = PYFLOCALITY_WIDTH;
  static constexpr int kPixels = kHeight * kWidth;
  static constexpr int kValues = kChannels * kPixels;

  // The window of a pixel: kBefore pixels before it and kAfter behind it, along both axes.
  static constexpr int kWindow = PYFLOCALITY_WINDOW;
  static constexpr int kBefore = kWindow / 2;
  static constexpr int kAfter = kWindow - 1 - kBefore;
  // Beyond this the sums of a block do not fit into registers.
  static constexpr bool kUnrolled = kWindow <= 15;

  // Tangents of a derivative pass, each with a plane of its own beside the distances.
  static constexpr int kTangents = PYFLOCALITY_TANGENTS;

  // A block of kThreads answers a tile of pixels, four neighbours a thread, and takes kImages
  // images at a time. It holds the tile and what its windows reach, the region, in bands of rows.
  static constexpr int kThreads = PYFLOCALITY_THREADS;
  static constexpr int kMinBlocks = PYFLOCALITY_MIN_BLOCKS;
  static constexpr int kImages = PYFLOCALITY_IMAGES;
  static constexpr int kQuad = 4;
  static constexpr int kTileHeight = PYFLOCALITY_TILE_HEIGHT;
  static constexpr int kTileWidth = PYFLOCALITY_TILE_WIDTH;
  static constexpr int kTileQuads = (kTileWidth + kQuad - 1) / kQuad;
  static constexpr int kTilesAcross = (kWidth + kTileWidth - 1) / kTileWidth;
  static constexpr int kTiles = kTilesAcross * ((kHeight + kTileHeight - 1) / kTileHeight);
  static constexpr int kRegionHeight = PYFLOCALITY_REGION_HEIGHT;
  static constexpr int kRegionWidth = PYFLOCALITY_REGION_WIDTH;
  static constexpr int kBandRows = PYFLOCALITY_BAND_ROWS;
  static constexpr int kBands = (kRegionHeight + kBandRows - 1) / kBandRows;
  static constexpr bool kInPlace = kBands == 1;

  // Shared memory, in floats: squared differences; row sums, over them where one band holds all;
  // partial sums of the lines. Odd strides keep the lines of a warp in different banks.
  static constexpr int kPlanes = kImages * (1 + kTangents);
  static constexpr int kBandStride = kRegionWidth | 1;
  static constexpr int kBandPlane = kBandRows * kBandStride;
  static constexpr int kSumStride = kInPlace ? kBandStride : kTileWidth | 1;
  static constexpr int kSumPlane = kInPlace ? kBandPlane : kRegionHeight * kSumStride;
  static constexpr int kSumOffset = kInPlace ? 0 : kPlanes * kBandPlane;
  static constexpr int kLineThreads = PYFLOCALITY_LINE_THREADS;
  static constexpr int kLongest = kRegionHeight > kRegionWidth ? kRegionHeight : kRegionWidth;
  static constexpr int kTails = kWindow < kLongest ? kWindow : kLongest;
  static constexpr int kTailOffset = kSumOffset + kPlanes * kSumPlane;
  static constexpr int kTailFloats = kUnrolled ? 0 : kTails * kLineThreads;
  static constexpr int kSharedBytes = 4 * (kTailOffset + kTailFloats);

  static_assert(kWindow >= 1 && kWindow < 2 * (kHeight > kWidth ? kHeight : kWidth),
                "a larger window has nothing more to cover");
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  static_assert(kTileWidth == kWidth || kTileWidth % kQuad == 0, "tiles are cut between quads");
  static_assert(!kVector || kWidth % kQuad == 0, "rows must start at whole quads");
  static_assert(kRegionHeight == kHeight || kRegionHeight >= kTileHeight + kWindow - 1,
                "the region holds every window of the tile");
  static_assert(kRegionWidth == kWidth || kRegionWidth >= kTileWidth + kWindow - 1 + kQuad - 1,
                "the region holds every window of the tile from a whole quad on");
  static_assert(kLineThreads >= 1 && kLineThreads <= kThreads, "a line each for these threads");
  static_assert(kSharedBytes == PYFLOCALITY_SHARED_BYTES, "the launcher counts as the kernel does");
};

}  // namespace pyflocality
