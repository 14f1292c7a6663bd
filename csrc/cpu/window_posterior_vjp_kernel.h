// One compilation of the window posterior's second pass, for the instruction set around it.

template <typename Stored>
class WindowVjp {
 public:
  WindowVjp(const TypedPass<Stored>& pass, const WindowShape& shape,
            const PosteriorWeights& weights)
      : pass_(pass),
        shape_(shape),
        places_(weights.cotangents == nullptr ? places_inside(shape) : all_places(shape)),
        weights_(weights),
        pixels_(shape.pixels()),
        dim_(pass.dim),
        sums_of_set_(sums_of_set(pass, weights)) {}

  struct Scratch {
    const WindowVjp& vjp;
    TileRoom<Stored> tiles{vjp.pass_, kTilesAtHand};
    AlignedArray<float> weights{vjp.pixels_ * kTileImages}, factors{vjp.pixels_ * kTileImages};
    AlignedArray<float> line{line_size(vjp.shape_)}, sums{vjp.sets() * vjp.sums_of_set_ * kLanes};
  };

  Scratch scratch() const { return {*this}; }
  ScanState state() const { return {sets(), sums_of_set_}; }
  double scale(std::size_t) const { return 1.0; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.sums.data(), sets() * sums_of_set_ * kLanes, 0.0f);
    for_each_tile(pass_, first, last, pass_.batch.count, scratch.tiles,
                  [&](std::size_t b, const ImageTile<Stored>& tile) {
                    pass_.checkpoint();
                    const Box box = weigh_windows(b, tile, scratch);
                    if (box.bottom != 0) add_tile(b, tile, box, scratch);
                  });
    collect_sums(scratch.sums.data(), state);
  }

 private:
  // The smallest rectangle that holds some pixels.
  struct Box {
    std::size_t top, bottom = 0, left, right = 0;  // empty while bottom is 0

    void add(std::size_t y, std::size_t x) {
      top = bottom == 0 ? y : std::min(top, y);
      left = bottom == 0 ? x : std::min(left, x);
      bottom = std::max(bottom, y + 1);
      right = std::max(right, x + 1);
    }
  };

  std::size_t sets() const { return pass_.batch.count * weights_.count; }

  // Posterior weights of a tile's images for every window; the pixels where any is not zero.
  Box weigh_windows(std::size_t b, const ImageTile<Stored>& tile, const Scratch& scratch) const {
    Vec floor[kTileVectors];
    missing_images(tile.number, floor);
    const float scale = pass_.batch.scale[b], reach = pass_.reach(b);
    float* weights = scratch.weights.data();
    Box box;
    window_distances(shape_, places_, tile.images, pass_.batch.noisy + b * dim_, weights,
                     scratch.line.data(), [&](std::size_t pixel, Vec(&sum)[kTileVectors]) {
                       const std::size_t q = b * pixels_ + pixel;
                       for (int i = 0; i < kTileVectors; ++i) sum[i] = max(sum[i], floor[i]);
                       if (weigh_known(sum, scale, reach, weights_.minimum[q], weights_.total[q])) {
                         box.add(pixel / shape_.width, pixel % shape_.width);
                       } else {
                         for (int i = 0; i < kTileVectors; ++i) sum[i] = zero();
                       }
                       store_vectors(weights + pixel * kTileImages, sum);
                     });
    return box;
  }

  // Adds what a tile contributes to all sums of a noisy image.
  void add_tile(std::size_t b, const ImageTile<Stored>& tile, const Box& box,
                const Scratch& scratch) const {
    if (weights_.cotangents == nullptr) {
      add_windows(b, b, tile, box, scratch.weights.data(), scratch);
      return;
    }
    for (std::size_t set = b * weights_.count; set < (b + 1) * weights_.count; ++set) {
      for (std::size_t y = box.top; y < box.bottom; ++y) {
        for (std::size_t x = box.left; x < box.right; ++x) {
          multiply(b, set, y * shape_.width + x, tile, scratch);
        }
      }
      add_windows(b, set, tile, box, scratch.factors.data(), scratch);
    }
  }

  // Weights of a tile at a pixel times their cotangent's products with the values there.
  void multiply(std::size_t b, std::size_t set, std::size_t pixel, const ImageTile<Stored>& tile,
                const Scratch& scratch) const {
    const std::size_t answered = pass_.values.answered();
    Vec factor[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) factor[i] = zero();
    for (std::size_t d = pixel; d < dim_; d += pixels_) {
      for_each_answer(pass_, tile, d, [&](std::size_t a, const auto* values) {
        const Vec cotangent = broadcast(weights_.cotangents[(set * answered + a) * dim_ + d]);
        const Vec mean = broadcast(weights_.mean[(b * answered + a) * dim_ + d]);
        for (int i = 0; i < kTileVectors; ++i) {
          const Vec gap = sub(load(values + i * kLanes), mean);
          factor[i] = multiply_add(cotangent, gap, factor[i]);
        }
      });
    }
    for (int i = 0; i < kTileVectors; ++i) {
      const Vec weights = load(scratch.weights.data() + pixel * kTileImages + i * kLanes);
      factor[i] = mul(factor[i], weights);
    }
    store_vectors(scratch.factors.data() + pixel * kTileImages, factor);
  }

  // Adds the values of a tile's images under the factors of the windows of the pixels in a box.
  void add_windows(std::size_t b, std::size_t set, const ImageTile<Stored>& tile, const Box& box,
                   float* plane, const Scratch& scratch) const {
    const std::size_t width = shape_.width;
    // The window of a pixel q holds d where the window of d, turned round, holds q.
    const std::size_t before = shape_.window / 2, after = shape_.window - 1 - before;
    const std::size_t top = box.top > before ? box.top - before : 0;
    const std::size_t left = box.left > before ? box.left - before : 0;
    const std::size_t bottom = std::min(box.bottom + after, shape_.height);
    const std::size_t right = std::min(box.right + after, width);
    const auto start = [&](std::size_t first, std::size_t origin) {
      return static_cast<std::ptrdiff_t>(first) - static_cast<std::ptrdiff_t>(after + origin);
    };
    for (std::size_t x = box.left; x < box.right; ++x) {
      float* column = plane + x * kTileImages;
      line_sums(column + box.top * width * kTileImages, width * kTileImages, box.bottom - box.top,
                shape_.window, start(top, box.top), bottom - top, scratch.line.data(),
                [&](std::size_t k, const Vec(&sum)[kTileVectors]) {
                  store_vectors(column + (top + k) * width * kTileImages, sum);
                });
    }
    for (std::size_t y = top; y < bottom; ++y) {
      line_sums(plane + (y * width + box.left) * kTileImages, kTileImages, box.right - box.left,
                shape_.window, start(left, box.left), right - left, scratch.line.data(),
                [&](std::size_t k, const Vec(&sum)[kTileVectors]) {
                  add_values(b, set, y * width + left + k, tile, sum, scratch);
                });
    }
  }

  void add_values(std::size_t b, std::size_t set, std::size_t pixel, const ImageTile<Stored>& tile,
                  const Vec (&factor)[kTileVectors], const Scratch& scratch) const {
    Vec largest = zero();
    for (int i = 0; i < kTileVectors; ++i) {
      largest = max(largest, max(factor[i], sub(zero(), factor[i])));
    }
    if (!any_less(zero(), largest)) return;
    float* sums = scratch.sums.data() + set * sums_of_set_ * kLanes;
    for (std::size_t d = pixel; d < dim_; d += pixels_) {
      add_factored(pass_, weights_, b, d, factor, tile, sums);
    }
  }

  const TypedPass<Stored> pass_;
  const WindowShape shape_;
  const WindowPlaces places_;
  const PosteriorWeights weights_;
  const std::size_t pixels_, dim_, sums_of_set_;
};
