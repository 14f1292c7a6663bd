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
PYFLOCALITY_INLINE void add_terms(const Vec (&terms)[kTileVectors], float* sum) {
  Vec total = load(sum);
  for (int i = 0; i < kTileVectors; ++i) total = add(total, terms[i]);
  store(sum, total);
}

// Adds the products of a tile's weights and values to a sum of kLanes lanes.
PYFLOCALITY_INLINE void add_products(const Vec (&weight)[kTileVectors],
                                     const Vec (&value)[kTileVectors], float* sum) {
  Vec total = load(sum);
  for (int i = 0; i < kTileVectors; ++i) total = multiply_add(weight[i], value[i], total);
  store(sum, total);
}

// Adds the products of a tile's weights and `count` values, kTileImages of each, `stride` apart, to
// as many sums.
template <typename Number>
inline void add_weighted(const Vec (&weight)[kTileVectors], const Number* values,
                         std::size_t stride, std::size_t count, float* sums) {
  for (std::size_t k = 0; k < count; ++k) {
    Vec value[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) value[i] = load(values + k * stride + i * kLanes);
    add_products(weight, value, sums + k * kLanes);
  }
}

// What a query answers of a tile: kTileImages of each of some values of the images, and behind
// these of their value images, `stride` apart.
template <typename Stored>
struct Answers {
  const Stored* images;
  std::size_t image_values;
  const float* values;
  std::size_t value_values, stride;
};

// Takes a tile of images into the sums of one query.
//
//   sums           kLanes sums of weights, then kLanes sums of weighted values for each value
//
// and the rest as in weigh().
template <typename Stored>
inline void take_in(const Vec (&distance)[kTileVectors], float scale, float reach,
                    const Answers<Stored>& answers, float* minimum, float* sums) {
  Vec weight[kTileVectors];
  const std::size_t count = answers.image_values + answers.value_values;
  const auto decay = [&](Vec factor) { shrink(factor, count + 1, sums); };
  if (!weigh(distance, scale, reach, minimum, decay, weight)) return;
  add_terms(weight, sums);
  sums += kLanes;
  add_weighted(weight, answers.images, answers.stride, answers.image_values, sums);
  sums += answers.image_values * kLanes;
  add_weighted(weight, answers.values, answers.stride, answers.value_values, sums);
}

// Images [count, dim] as a tile with the images side by side: tile [dim, kTileImages]. Missing
// images are zero.
template <typename Stored>
inline void load_tile(const Stored* images, std::size_t count, std::size_t dim, Stored* tile) {
  constexpr std::size_t kStrip = 64;
  std::size_t turned = 0;  // values of all images that are there
  if (count < static_cast<std::size_t>(kTileImages)) {
    std::fill_n(tile, dim * kTileImages, Stored{0});
  } else if constexpr (std::is_same<Stored, float>::value) {
    for (; turned + kTurned <= dim; turned += kTurned) {
      for (std::size_t i = 0; i < count; i += kTurned) {
        transpose(images + i * dim + turned, dim, tile + turned * kTileImages + i, kTileImages);
      }
    }
  }
  for (std::size_t strip = turned; strip < dim; strip += kStrip) {
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

// A tile of `number` images [dim, kTileImages], with their value images [R, dim, kTileImages].
template <typename Stored>
struct ImageTile {
  const Stored* images;
  const float* values;
  std::size_t number;
};

// Room for tiles of a pass, `at_hand` of them at a time; where `answers` is false, values are left
// out.
template <typename Stored>
struct TileRoom {
  TileRoom(const TypedPass<Stored>& pass, std::size_t at_hand, bool answers = true)
      : at_hand(at_hand),
        values_dim(answers ? pass.values.number * pass.dim : 0),
        images(at_hand * pass.dim * kTileImages),
        values(at_hand * values_dim * kTileImages) {}

  const std::size_t at_hand, values_dim;
  AlignedArray<Stored> images;
  AlignedArray<float> values;
};

// Calls visit(b, tile) for every one of `batch` noisy images and every tile of the images
// [first, last), of which the last holds less. What belongs to a noisy image, if it is much, is
// fetched once for all tiles that there is room for.
template <typename Stored, typename Visit>
inline void for_each_tile(const TypedPass<Stored>& pass, std::size_t first, std::size_t last,
                          std::size_t batch, const TileRoom<Stored>& room, const Visit& visit) {
  const std::size_t dim = pass.dim, values_dim = room.values_dim;
  for (std::size_t group = first; group < last; group += room.at_hand * kTileImages) {
    const std::size_t end = std::min(group + room.at_hand * kTileImages, last);
    const auto tile = [&](std::size_t image) {
      return ImageTile<Stored>{room.images.data() + (image - group) * dim,
                               room.values.data() + (image - group) * values_dim,
                               std::min<std::size_t>(kTileImages, end - image)};
    };
    for (std::size_t image = group; image < end; image += kTileImages) {
      const std::size_t number = tile(image).number;
      load_tile(pass.images + image * dim, number, dim, room.images.data() + (image - group) * dim);
      if (values_dim > 0) {
        load_tile(pass.values.values + image * values_dim, number, values_dim,
                  room.values.data() + (image - group) * values_dim);
      }
    }
    for (std::size_t b = 0; b < batch; ++b) {
      for (std::size_t image = group; image < end; image += kTileImages) visit(b, tile(image));
    }
  }
}

// Calls visit(a, values) for every answered image a, with a tile's values of it at input d.
template <typename Stored, typename Visit>
inline void for_each_answer(const TypedPass<Stored>& pass, const ImageTile<Stored>& tile,
                            std::size_t d, const Visit& visit) {
  std::size_t a = 0;
  if (pass.values.with_image) visit(a++, tile.images + d * kTileImages);
  for (std::size_t r = 0; r < pass.values.number; ++r) {
    visit(a++, tile.values + (r * pass.dim + d) * kTileImages);
  }
}

// Sums of one set of a second pass: of the weights alone one for each value of the answered images,
// along a cotangent one for each value of the images.
template <typename Stored>
inline std::size_t sums_of_set(const TypedPass<Stored>& pass, const PosteriorWeights& weights) {
  return (weights.cotangents == nullptr ? pass.values.answered() : 1) * pass.dim;
}

// Adds the values of a tile's images at input d under some factors to the sums of a set.
template <typename Stored>
inline void add_factored(const TypedPass<Stored>& pass, const PosteriorWeights& weights,
                         std::size_t b, std::size_t d, const Vec (&factors)[kTileVectors],
                         const ImageTile<Stored>& tile, float* sums) {
  Vec value[kTileVectors];
  if (weights.cotangents == nullptr) {
    for_each_answer(pass, tile, d, [&](std::size_t a, const auto* values) {
      for (int i = 0; i < kTileVectors; ++i) value[i] = load(values + i * kLanes);
      add_products(factors, value, sums + (a * pass.dim + d) * kLanes);
    });
    return;
  }
  const Vec centre = broadcast(weights.centre[b * pass.dim + d]);
  const Stored* values = tile.images + d * kTileImages;
  for (int i = 0; i < kTileVectors; ++i) value[i] = sub(load(values + i * kLanes), centre);
  add_products(factors, value, sums + d * kLanes);
}

// The sums of a second pass, which has no minimum of its own: lanes [sums, kLanes].
inline void collect_sums(const float* lanes, ScanState& state) {
  std::fill(state.minimum.begin(), state.minimum.end(), 0.0f);
  for (double& sum : state.weighted) {
    add_lanes(lanes, sum);
    lanes += kLanes;
  }
}
