// Online softmax of a tile of images, lane by lane. Included by kernel files.

// Images a tile holds.
constexpr int kTileImages = kTileVectors * kLanes;

// Takes a tile of images into the sums of one query.
//
//   distance       weighted squared distances of the tile's images
//   scale          factor of the distances in the power of two, positive and finite
//   reach          distance above the minimum beyond which images cannot change the result
//   values, stride the tile's values, kTileImages of them for each of `count` answered values,
//                  `stride` apart
//   minimum        smallest distance so far
//   sums           kLanes sums of weights, then kLanes sums of weighted values for each value
//
// Weights count from the minimum, and the difference is taken before the factor: what matters at
// small noise are the few nearest images, and their differences are exact.
template <typename Stored>
inline void take_in(const Vec (&distance)[kTileVectors], float scale, float reach,
                    const Stored* values, std::size_t stride, std::size_t count, float* minimum,
                    float* sums) {
  Vec lowest = distance[0];
  for (int i = 1; i < kTileVectors; ++i) lowest = min(lowest, distance[i]);
  // Equal distances count even where adding the reach rounds away.
  if (!any_at_most(lowest, broadcast(*minimum + reach))) return;

  if (any_less(lowest, broadcast(*minimum))) {
    const float lower = smallest(lowest);
    const Vec decay = broadcast(exp2_of_negative((lower - *minimum) * scale));
    for (std::size_t k = 0; k <= count; ++k) {
      store(sums + k * kLanes, mul(decay, load(sums + k * kLanes)));
    }
    *minimum = lower;
  }

  const Vec base = broadcast(*minimum), factor = broadcast(-scale);
  Vec weight[kTileVectors];
  for (int i = 0; i < kTileVectors; ++i) {
    weight[i] = exp2_of_negative(mul(sub(distance[i], base), factor));
  }
  Vec total = load(sums);
  for (int i = 0; i < kTileVectors; ++i) total = add(total, weight[i]);
  store(sums, total);
  for (std::size_t k = 0; k < count; ++k) {
    Vec weighted = load(sums + (k + 1) * kLanes);
    for (int i = 0; i < kTileVectors; ++i) {
      weighted = multiply_add(weight[i], load(values + k * stride + i * kLanes), weighted);
    }
    store(sums + (k + 1) * kLanes, weighted);
  }
}

// Images [count, dim] as a tile with the images side by side: tile [dim, kTileImages]. Missing
// images are zero.
template <typename Stored>
inline void load_tile(const Stored* images, std::size_t count, std::size_t dim, Stored* tile) {
  constexpr std::size_t kStrip = 64;
  if (count < static_cast<std::size_t>(kTileImages)) {
    std::fill_n(tile, dim * kTileImages, Stored{0});
  }
  for (std::size_t strip = 0; strip < dim; strip += kStrip) {
    const std::size_t end = std::min(strip + kStrip, dim);
    for (std::size_t i = 0; i < count; ++i) {
      const Stored* image = images + i * dim;
      for (std::size_t d = strip; d < end; ++d) tile[d * kTileImages + i] = image[d];
    }
  }
}

// Distances that keep missing images out: minus infinity for those present, infinity beyond.
inline void missing_images(std::size_t count, Vec (&floor)[kTileVectors]) {
  alignas(64) float lanes[kTileImages];
  for (int i = 0; i < kTileImages; ++i) {
    const bool present = static_cast<std::size_t>(i) < count;
    lanes[i] =
        present ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
  }
  for (int i = 0; i < kTileVectors; ++i) floor[i] = load(lanes + i * kLanes);
}
