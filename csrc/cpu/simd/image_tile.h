// Online softmax of a tile of images, lane by lane. Included by kernel files.

// Images a tile holds.
constexpr int kTileImages = kTileVectors * kLanes;

inline void load_vectors(const float* from, Vec (&tile)[kTileVectors]) {
  for (int i = 0; i < kTileVectors; ++i) tile[i] = load(from + i * kLanes);
}

inline void store_vectors(float* to, const Vec (&tile)[kTileVectors]) {
  for (int i = 0; i < kTileVectors; ++i) store(to + i * kLanes, tile[i]);
}

// Weights of a tile of images in the posterior of one query; false where none of them can matter.
//
//   distance       weighted squared distances of the tile's images
//   scale          factor of the distances in the power of two, positive and finite
//   reach          distance above the minimum beyond which images cannot change the result
//   minimum        smallest distance so far
//   decay          decay(factor) is called where the minimum falls: all sums shrink by it
//
// Weights count from the minimum, and the difference is taken before the factor: what matters at
// small noise are the few nearest images, and their differences are exact.
template <typename Decay>
inline bool weigh(const Vec (&distance)[kTileVectors], float scale, float reach, float* minimum,
                  const Decay& decay, Vec (&weight)[kTileVectors]) {
  Vec lowest = distance[0];
  for (int i = 1; i < kTileVectors; ++i) lowest = min(lowest, distance[i]);
  // Equal distances count even where adding the reach rounds away.
  if (!any_at_most(lowest, broadcast(*minimum + reach))) return false;

  if (any_less(lowest, broadcast(*minimum))) {
    const float lower = smallest(lowest);
    decay(broadcast(exp2_of_negative((lower - *minimum) * scale)));
    *minimum = lower;
  }

  const Vec base = broadcast(*minimum), factor = broadcast(-scale);
  for (int i = 0; i < kTileVectors; ++i) {
    weight[i] = exp2_of_negative(mul(sub(distance[i], base), factor));
  }
  return true;
}

// Weights of a tile of images in a posterior whose minimum and total are known, in place of their
// distances; false, and nothing is done, where none of them can matter.
inline bool weigh_known(Vec (&distance)[kTileVectors], float scale, float reach, double minimum,
                        double total) {
  const auto nearest = static_cast<float>(minimum), inverse = static_cast<float>(1.0 / total);
  Vec lowest = distance[0];
  for (int i = 1; i < kTileVectors; ++i) lowest = min(lowest, distance[i]);
  if (!any_at_most(lowest, broadcast(nearest + reach))) return false;
  for (int i = 0; i < kTileVectors; ++i) {
    // No distance lies below the minimum but by rounding.
    const Vec gap = max(sub(distance[i], broadcast(nearest)), zero());
    distance[i] = mul(exp2_of_negative(mul(gap, broadcast(-scale))), broadcast(inverse));
  }
  return true;
}

// The first image of a tile at a distance.
inline int image_at(const Vec (&distance)[kTileVectors], float wanted) {
  alignas(64) float lanes[kTileImages];
  store_vectors(lanes, distance);
  return static_cast<int>(std::find(lanes, lanes + kTileImages, wanted) - lanes);
}

// The number of one image of a tile.
inline float number_of(const Vec (&numbers)[kTileVectors], int image) {
  alignas(64) float lanes[kLanes];
  store(lanes, numbers[image / kLanes]);
  return lanes[image % kLanes];
}

// Adds the kLanes lanes of a sum to a number.
inline void add_lanes(const float* lanes, double& sum) {
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
}

// Adds `factor` times the lanes of a sum to those of another.
inline void add_multiple(float factor, const float* from, float* to) {
  store(to, multiply_add(broadcast(factor), load(from), load(to)));
}

// Shrinks `count` sums of kLanes lanes each.
inline void shrink(Vec factor, std::size_t count, float* sums) {
  for (std::size_t k = 0; k < count; ++k) {
    store(sums + k * kLanes, mul(factor, load(sums + k * kLanes)));
  }
}

// Adds a tile's terms to a sum of kLanes lanes.
inline void add_terms(const Vec (&terms)[kTileVectors], float* sum) {
  Vec total = load(sum);
  for (int i = 0; i < kTileVectors; ++i) total = add(total, terms[i]);
  store(sum, total);
}

// Adds the products of a tile's weights and values to a sum of kLanes lanes.
inline void add_products(const Vec (&weight)[kTileVectors], const Vec (&value)[kTileVectors],
                         float* sum) {
  Vec total = load(sum);
  for (int i = 0; i < kTileVectors; ++i) total = multiply_add(weight[i], value[i], total);
  store(sum, total);
}

// Takes a tile of images into the sums of one query.
//
//   values, stride the tile's values, kTileImages of them for each of `count` answered values,
//                  `stride` apart
//   sums           kLanes sums of weights, then kLanes sums of weighted values for each value
//
// and the rest as in weigh().
template <typename Stored>
inline void take_in(const Vec (&distance)[kTileVectors], float scale, float reach,
                    const Stored* values, std::size_t stride, std::size_t count, float* minimum,
                    float* sums) {
  Vec weight[kTileVectors];
  const auto decay = [&](Vec factor) { shrink(factor, count + 1, sums); };
  if (!weigh(distance, scale, reach, minimum, decay, weight)) return;
  add_terms(weight, sums);
  for (std::size_t k = 0; k < count; ++k) {
    Vec value[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) value[i] = load(values + k * stride + i * kLanes);
    add_products(weight, value, sums + (k + 1) * kLanes);
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
  load_vectors(lanes, floor);
}

// Tiles that a second pass has at hand.
constexpr std::size_t kTilesAtHand = 4;

// Calls visit(b, tile, number) for every one of `batch` noisy images and every tile of the images
// [first, last), of which the last holds less. The tiles are formed `at_hand` at a time: what
// belongs to a noisy image, if it is much, is fetched once for all of them.
template <typename Pass, typename Visit>
inline void for_each_tile(const Pass& pass, std::size_t first, std::size_t last, std::size_t batch,
                          std::size_t at_hand, typename Pass::Stored* tiles, const Visit& visit) {
  const std::size_t dim = pass.dim;
  for (std::size_t group = first; group < last; group += at_hand * kTileImages) {
    const std::size_t end = std::min(group + at_hand * kTileImages, last);
    const auto number = [&](std::size_t image) {
      return std::min<std::size_t>(kTileImages, end - image);
    };
    for (std::size_t image = group; image < end; image += kTileImages) {
      load_tile(pass.images + image * dim, number(image), dim, tiles + (image - group) * dim);
    }
    for (std::size_t b = 0; b < batch; ++b) {
      for (std::size_t image = group; image < end; image += kTileImages) {
        visit(b, tiles + (image - group) * dim, number(image));
      }
    }
  }
}

// Adds the values of a tile's images at an input under some factors to a sum of a second pass.
//
//   place  the input's place in a batch: b * dim + d
template <typename Stored>
inline void add_factored(const PosteriorWeights& weights, std::size_t place,
                         const Vec (&factors)[kTileVectors], const Stored* values, float* sum) {
  Vec value[kTileVectors];
  for (int i = 0; i < kTileVectors; ++i) value[i] = load(values + i * kLanes);
  if (weights.cotangents != nullptr) {
    const Vec centre = broadcast(weights.centre[place]);
    for (int i = 0; i < kTileVectors; ++i) value[i] = sub(value[i], centre);
  }
  add_products(factors, value, sum);
}

// The sums of a second pass, which has no minimum of its own: lanes [sums, kLanes].
inline void collect_sums(const float* lanes, ScanState& state) {
  std::fill(state.minimum.begin(), state.minimum.end(), 0.0f);
  for (double& sum : state.weighted) {
    add_lanes(lanes, sum);
    lanes += kLanes;
  }
}
