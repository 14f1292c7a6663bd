// Squared distances over windows of tiles of images. Included by kernel files after
// simd/windows.h.

// Squared differences from a noisy image [channels, height, width], summed over the channels: one
// row of pixels.
template <typename Stored>
inline void squared_differences(const WindowShape& shape, const float* noisy, const Stored* tile,
                                std::size_t y, float* row) {
  const std::size_t pixels = shape.height * shape.width;
  for (std::size_t x = 0; x < shape.width; ++x) {
    Vec sum[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) sum[i] = zero();
    for (std::size_t c = 0; c < shape.channels; ++c) {
      const std::size_t d = c * pixels + y * shape.width + x;
      const Vec target = broadcast(noisy[d]);
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec gap = sub(target, load(tile + d * kTileImages + i * kLanes));
        sum[i] = multiply_add(gap, gap, sum[i]);
      }
    }
    store_tile(row + x * kTileImages, sum);
  }
}

// Squared distances of a tile of images over the windows of some pixels.
//
//   places   the pixels
//   plane    room for [height, width] tiles
//   line     room for 2 (max(height, width) + window) tiles
//   visit    visit(pixel, distance), by columns; it may overwrite that pixel's tile of the plane
template <typename Stored, typename Visit>
inline void window_distances(const WindowShape& shape, const WindowPlaces& places,
                             const Stored* tile, const float* noisy, float* plane, float* line,
                             const Visit& visit) {
  const std::size_t height = shape.height, width = shape.width;
  for (std::size_t y = 0; y < height; ++y) {
    float* row = plane + y * width * kTileImages;
    squared_differences(shape, noisy, tile, y, row);
    // A sum is written behind what is still to be read: the line is in scratch by then.
    window_sums(row, kTileImages, width, shape.window, places.left, places.right, line,
                [&](std::size_t x, const Vec(&sum)[kTileVectors]) {
                  store_tile(row + x * kTileImages, sum);
                });
  }
  for (std::size_t x = places.left; x < places.right; ++x) {
    window_sums(plane + x * kTileImages, width * kTileImages, height, shape.window, places.top,
                places.bottom, line,
                [&](std::size_t y, Vec(&sum)[kTileVectors]) { visit(y * width + x, sum); });
  }
}
