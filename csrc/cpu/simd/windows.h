// Sums over windows of tiles of images. Included by kernel files after simd/posterior.h.

// Sums of every `window` neighbours in a line of `length` tiles, zero beyond its ends, whatever
// the window at three additions an element: the line, with half a window of zeros before and
// behind, is cut into blocks of one window. A window then is the tail of a block and the head of
// the next one. All terms are added, none subtracted, so small sums keep their digits beside
// large ones.
//
//   line         values; element x at line + x * stride
//   first, last  elements to visit
//   scratch      room for 2 (length + window - 1) tiles
//   visit        visit(x, sum) for x in [first, last)
template <typename Visit>
inline void window_sums(const float* line, std::size_t stride, std::size_t length,
                        std::size_t window, std::size_t first, std::size_t last, float* scratch,
                        const Visit& visit) {
  const std::size_t half = window / 2, padded = length + window - 1;
  float* head = scratch;
  float* tail = scratch + padded * kTileImages;
  const auto value = [&](std::size_t place, int i) {
    const bool inside = place >= half && place < half + length;
    return inside ? load(line + (place - half) * stride + i * kLanes) : zero();
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
  for (std::size_t x = first; x < last; ++x) {
    Vec sum[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) {
      sum[i] = load(tail + x * kTileImages + i * kLanes);
      // A window that is a block of its own has no head in the next one.
      if (x % window != 0) {
        sum[i] = add(sum[i], load(head + (x + window - 1) * kTileImages + i * kLanes));
      }
    }
    visit(x, sum);
  }
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
