// Sums over windows of tiles of images. Included by kernel files after simd/posterior.h.

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

inline void store_tile(float* p, const Vec (&tile)[kTileVectors]) {
  for (int i = 0; i < kTileVectors; ++i) store(p + i * kLanes, tile[i]);
}

// Adds up the lanes of every query's sums: weights, then weighted values.
inline void collect_lanes(const float* minimum, const float* sums, std::size_t values,
                          ScanState& state) {
  for (std::size_t q = 0; q < state.minimum.size(); ++q) {
    state.minimum[q] = minimum[q];
    for (int k = 0; k < kLanes; ++k) state.total[q] += *sums++;
    for (std::size_t c = 0; c < values; ++c) {
      for (int k = 0; k < kLanes; ++k) state.weighted[q * values + c] += *sums++;
    }
  }
}
