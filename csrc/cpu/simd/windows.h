// Sums and squared distances over windows of tiles of images. Included by kernel files after
// simd/image_tile.h.

// Sums of `window` neighbours in a line of `length` tiles, zero beyond its ends, whatever the
// window at three additions an element: the line, as far as the sums reach, is cut into blocks of
// one window. A window then is the tail of a block and the head of the next one. All terms are
// added, none subtracted, so small sums keep their digits beside large ones.
//
//   line          values; element x at line + x * stride
//   start, count  sum k, of `count`, begins at element start + k, which may lie before the line
//   scratch       room for 2 (count + window - 1) tiles
//   visit         visit(k, sum) for every sum; it may overwrite the line
template <typename Visit>
inline void line_sums(const float* line, std::size_t stride, std::size_t length, std::size_t window,
                      std::ptrdiff_t start, std::size_t count, float* scratch, const Visit& visit) {
  const std::size_t padded = count + window - 1;
  float* head = scratch;
  float* tail = scratch + padded * kTileImages;
  const auto value = [&](std::size_t place, int i) {
    const std::ptrdiff_t x = start + static_cast<std::ptrdiff_t>(place);
    const bool inside = x >= 0 && x < static_cast<std::ptrdiff_t>(length);
    return inside ? load(line + static_cast<std::size_t>(x) * stride + i * kLanes) : zero();
  };
  for (std::size_t block = 0; block < padded; block += window) {
    const std::size_t end = std::min(block + window, padded);
    for (int i = 0; i < kTileVectors; ++i) {
      Vec sum = zero();
      for (std::size_t place = block; place < end; ++place) {
        sum = add(sum, value(place, i));
        store(head + place * kTileImages + i * kLanes, sum);
      }
      sum = zero();
      for (std::size_t place = end; place-- > block;) {
        sum = add(sum, value(place, i));
        store(tail + place * kTileImages + i * kLanes, sum);
      }
    }
  }
  for (std::size_t k = 0; k < count; ++k) {
    Vec sum[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) {
      sum[i] = load(tail + k * kTileImages + i * kLanes);
      // A window that is a block of its own has no head in the next one.
      if (k % window != 0) {
        sum[i] = add(sum[i], load(head + (k + window - 1) * kTileImages + i * kLanes));
      }
    }
    visit(k, sum);
  }
}

// The same for the windows around elements [first, last): visit(x, sum). The window of x begins
// half a window before it, the larger half where it is even.
template <typename Visit>
inline void window_sums(const float* line, std::size_t stride, std::size_t length,
                        std::size_t window, std::size_t first, std::size_t last, float* scratch,
                        const Visit& visit) {
  const auto start = static_cast<std::ptrdiff_t>(first) - static_cast<std::ptrdiff_t>(window / 2);
  line_sums(line, stride, length, window, start, last - first, scratch,
            [&](std::size_t k, Vec(&sum)[kTileVectors]) { visit(first + k, sum); });
}

// The same in place of the line's own elements. A sum is written behind what is still to be read:
// the line is in scratch by then.
inline void sum_line(float* line, std::size_t stride, std::size_t length, std::size_t window,
                     std::size_t first, std::size_t last, float* scratch) {
  window_sums(
      line, stride, length, window, first, last, scratch,
      [&](std::size_t x, const Vec(&sum)[kTileVectors]) { store_vectors(line + x * stride, sum); });
}

// Squared differences between a row of pixels of a tile [channels, height, width], columns
// [first, last), and of a noisy image, `shift` columns further and around its end, summed over the
// channels.
template <typename Stored>
inline void squared_differences(const WindowShape& shape, const Stored* tile, const float* noisy,
                                std::size_t first, std::size_t last, std::size_t shift,
                                float* row) {
  const std::size_t pixels = shape.pixels();
  for (std::size_t x = first; x < last; ++x) {
    const std::size_t noisy_x = x + shift < shape.width ? x + shift : x + shift - shape.width;
    Vec sum[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) sum[i] = zero();
    for (std::size_t c = 0; c < shape.channels; ++c) {
      const Vec target = broadcast(noisy[c * pixels + noisy_x]);
      const Stored* values = tile + (c * pixels + x) * kTileImages;
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec gap = sub(target, load(values + i * kLanes));
        sum[i] = multiply_add(gap, gap, sum[i]);
      }
    }
    store_vectors(row + x * kTileImages, sum);
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
    squared_differences(shape, tile + y * width * kTileImages, noisy + y * width, 0, width, 0, row);
    sum_line(row, kTileImages, width, shape.window, places.left, places.right, line);
  }
  for (std::size_t x = places.left; x < places.right; ++x) {
    window_sums(plane + x * kTileImages, width * kTileImages, height, shape.window, places.top,
                places.bottom, line,
                [&](std::size_t y, Vec(&sum)[kTileVectors]) { visit(y * width + x, sum); });
  }
}

// Room for line_sums().
inline std::size_t line_size(const WindowShape& shape) {
  return 2 * (std::max(shape.height, shape.width) + shape.window) * kTileImages;
}

// What a thread works in where there is a query for every pixel of each noisy image: a tile, and
// for every query its minimum, a sum of weights and sums of `values` weighted values.
template <typename Stored>
struct WindowSums {
  WindowSums(const TypedPass<Stored>& pass, const WindowShape& shape, std::size_t values)
      : queries(pass.batch.count * shape.pixels()),
        of_query((values + 1) * kLanes),
        tile(pass, 1, values > 0),
        plane(shape.pixels() * kTileImages),
        line(line_size(shape)),
        minimum(queries),
        sums(queries * of_query) {}

  void clear() const {
    std::fill_n(minimum.data(), queries, std::numeric_limits<float>::infinity());
    std::fill_n(sums.data(), queries * of_query, 0.0f);
  }

  // Adds up the lanes of the sums.
  void collect(ScanState& state) const {
    const float* lanes = sums.data();
    auto weighted = state.weighted.begin();
    for (std::size_t q = 0; q < queries; ++q, lanes += of_query) {
      state.minimum[q] = minimum.data()[q];
      add_lanes(lanes, state.total[q]);
      for (std::size_t k = kLanes; k < of_query; k += kLanes) add_lanes(lanes + k, *weighted++);
    }
  }

  const std::size_t queries, of_query;
  TileRoom<Stored> tile;
  AlignedArray<float> plane, line, minimum, sums;
};
