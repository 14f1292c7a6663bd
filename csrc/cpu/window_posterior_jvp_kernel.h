// One compilation of the window posterior's scan with tangents, for the instruction set around it.

template <typename Stored>
class WindowJvp {
 public:
  WindowJvp(const TypedPass<Stored>& pass, const WindowShape& shape, const Tangents& tangents)
      : pass_(pass),
        shape_(shape),
        tangents_(tangents),
        pixels_(shape.pixels()),
        dim_(pass.dim),
        answered_(pass.values.answered() * shape.channels) {}

  // What a thread works in. There is a set of sums [pixels, 1 + answered, kLanes] for the weights
  // of every noisy image, and one for each of its tangents with the weights times c. What belongs
  // to pixels lies in the order of their turn, which is by columns. All sums of a pixel count from
  // those of its nearest image: the values it answers, then c by tangent.
  struct Scratch {
    const WindowJvp& jvp;
    TileRoom<Stored> tiles{jvp.pass_, kTilesAtHand};
    AlignedArray<float> weights{jvp.pixels_ * kTileImages};
    AlignedArray<float> planes{kGroup * jvp.pixels_ * kTileImages}, line{line_size(jvp.shape_)};
    AlignedArray<float> minimum{jvp.queries()}, nearest{jvp.queries() * jvp.starts_of_pixel()};
    AlignedArray<float> sums{jvp.queries() * (1 + jvp.tangents_.count) * jvp.sums_of_pixel()};
    AlignedArray<bool> matters{jvp.pixels_};  // pixels whose weights are not all zero
    AlignedArray<int> nearer{jvp.pixels_};    // image of the tile nearer than all before, or -1
  };

  Scratch scratch() const { return {*this}; }
  ScanState state() const { return {queries(), tangents_.sums(answered_), tangents_.count}; }
  double scale(std::size_t q) const { return pass_.batch.scale[q / pixels_]; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), queries(), std::numeric_limits<float>::infinity());
    std::fill_n(scratch.nearest.data(), queries() * starts_of_pixel(), 0.0f);
    std::fill_n(scratch.sums.data(), queries() * (1 + tangents_.count) * sums_of_pixel(), 0.0f);
    for_each_tile(pass_, first, last, pass_.batch.count, scratch.tiles,
                  [&](std::size_t b, const ImageTile<Stored>& tile) {
                    pass_.checkpoint();
                    scan_tile(b, tile, scratch);
                  });
    for (std::size_t q = 0; q < queries(); ++q) collect(q / pixels_, q % pixels_, scratch, state);
  }

 private:
  // Tangents that share the reading of a tile.
  static constexpr int kGroup = 2;

  std::size_t queries() const { return pass_.batch.count * pixels_; }
  std::size_t sums_of_pixel() const { return (1 + answered_) * kLanes; }
  std::size_t starts_of_pixel() const { return answered_ + tangents_.count; }

  // Set 0 is that of the weights, set 1 + k that of tangent k.
  float* sums(const Scratch& scratch, std::size_t b, std::size_t set, std::size_t turn) const {
    const std::size_t place = (b * (1 + tangents_.count) + set) * pixels_ + turn;
    return scratch.sums.data() + place * sums_of_pixel();
  }

  float* nearest(const Scratch& scratch, std::size_t b, std::size_t turn) const {
    return scratch.nearest.data() + (b * pixels_ + turn) * starts_of_pixel();
  }

  std::size_t turn_of(std::size_t pixel) const {
    return pixel % shape_.width * shape_.height + pixel / shape_.width;
  }

  // Adds up the lanes of a pixel's sums.
  void collect(std::size_t b, std::size_t pixel, const Scratch& scratch, ScanState& state) const {
    const std::size_t q = b * pixels_ + pixel, turn = turn_of(pixel);
    double* values = state.weighted.data() + q * tangents_.sums(answered_);
    double* inner = values + answered_;
    double* cross = inner + tangents_.count;
    state.minimum[q] = scratch.minimum.data()[b * pixels_ + turn];
    for (std::size_t set = 0; set <= tangents_.count; ++set) {
      const float* lanes = sums(scratch, b, set, turn);
      double& total = set == 0 ? state.total[q] : inner[set - 1];
      double* products = set == 0 ? values : cross + (set - 1) * answered_;
      add_lanes(lanes, total);
      for (std::size_t k = 0; k < answered_; ++k) add_lanes(lanes += kLanes, products[k]);
    }
    const float* from = nearest(scratch, b, turn);
    count_from_means(
        state.total[q], answered_, tangents_.count, values, [&](std::size_t k) { return from[k]; },
        [&](std::size_t k) { return from[answered_ + k]; });
  }

  // Calls visit(k, values, centre) for every answered value k of a pixel, with a tile's own and
  // what they are counted from.
  template <typename Visit>
  void for_each_value(std::size_t b, std::size_t pixel, const ImageTile<Stored>& tile,
                      const Visit& visit) const {
    for (std::size_t c = 0, d = pixel; d < dim_; ++c, d += pixels_) {
      for_each_answer(pass_, tile, d, [&](std::size_t a, const auto* values) {
        const bool image = a == 0 && pass_.values.with_image;
        visit(a * shape_.channels + c, values, image ? tangents_.centre[b * dim_ + d] : 0.0f);
      });
    }
  }

  void scan_tile(std::size_t b, const ImageTile<Stored>& tile, const Scratch& scratch) const {
    if (!weigh_pixels(b, tile, scratch)) return;
    std::size_t k = 0;
    for (; k + kGroup <= tangents_.count; k += kGroup) {
      take_in_tangents<kGroup>(b, k, tile, scratch);
    }
    for (; k < tangents_.count; ++k) take_in_tangents<1>(b, k, tile, scratch);
  }

  // Window sums of kPlanes planes of terms: add_channel(d, values, sums) adds the terms of input d
  // to a pixel's sums, visit(pixel, turn, sums) is given the window sums.
  template <int kPlanes, typename Add, typename Visit>
  void sum_windows(const Stored* tile, const Scratch& scratch, const Add& add_channel,
                   const Visit& visit) const {
    const std::size_t height = shape_.height, width = shape_.width;
    const auto place = [&](int plane, std::size_t pixel) {
      return scratch.planes.data() +
             (static_cast<std::size_t>(plane) * pixels_ + pixel) * kTileImages;
    };
    const auto sum_all = [&](float* line, std::size_t stride, std::size_t length) {
      sum_line(line, stride, length, shape_.window, 0, length, scratch.line.data());
    };
    for (std::size_t y = 0; y < height; ++y) {
      for (std::size_t pixel = y * width; pixel < (y + 1) * width; ++pixel) {
        Vec sums[kPlanes][kTileVectors];
        for (int p = 0; p < kPlanes; ++p) {
          for (int i = 0; i < kTileVectors; ++i) sums[p][i] = zero();
        }
        for (std::size_t d = pixel; d < dim_; d += pixels_) {
          add_channel(d, tile + d * kTileImages, sums);
        }
        for (int p = 0; p < kPlanes; ++p) store_vectors(place(p, pixel), sums[p]);
      }
      for (int p = 0; p < kPlanes; ++p) sum_all(place(p, y * width), kTileImages, width);
    }
    std::size_t turn = 0;
    for (std::size_t x = 0; x < width; ++x) {
      for (int p = 0; p < kPlanes; ++p) sum_all(place(p, x), width * kTileImages, height);
      for (std::size_t pixel = x; pixel < pixels_; pixel += width, ++turn) {
        Vec sums[kPlanes][kTileVectors];
        for (int p = 0; p < kPlanes; ++p) load_vectors(place(p, pixel), sums[p]);
        visit(pixel, turn, sums);
      }
    }
  }

  // Takes in the weights of all pixels and keeps them; false where none of them matters.
  bool weigh_pixels(std::size_t b, const ImageTile<Stored>& tile, const Scratch& scratch) const {
    const float scale = pass_.batch.scale[b], reach = pass_.reach(b);
    Vec floor[kTileVectors];
    missing_images(tile.number, floor);
    bool any = false;
    const auto take_in_pixel = [&](std::size_t pixel, Vec(&distance)[kTileVectors]) {
      const std::size_t turn = turn_of(pixel);
      Vec weight[1][kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) distance[i] = max(distance[i], floor[i]);
      bool nearer = false;
      const auto decay = [&](Vec factor) {
        nearer = true;
        for (std::size_t set = 0; set <= tangents_.count; ++set) {
          shrink(factor, 1 + answered_, sums(scratch, b, set, turn));
        }
      };
      float* minimum = scratch.minimum.data() + b * pixels_ + turn;
      const bool matters = weigh(distance, scale, reach, minimum, decay, weight[0]);
      scratch.matters.data()[turn] = matters;
      if (!matters) return;
      any = true;
      scratch.nearer.data()[turn] = nearer ? image_at(distance, *minimum) : -1;
      if (nearer) count_values_from(b, pixel, turn, tile, scratch);
      store_vectors(scratch.weights.data() + turn * kTileImages, weight[0]);
      add_pixel(b, 0, pixel, turn, weight, tile, scratch);
    };
    window_distances(shape_, all_places(shape_), tile.images, pass_.batch.noisy + b * dim_,
                     scratch.planes.data(), scratch.line.data(), take_in_pixel);
    return any;
  }

  // Counts the values of a pixel from those of the image of a tile that is nearest to it now.
  void count_values_from(std::size_t b, std::size_t pixel, std::size_t turn,
                         const ImageTile<Stored>& tile, const Scratch& scratch) const {
    const auto image = static_cast<std::size_t>(scratch.nearer.data()[turn]);
    float* from = nearest(scratch, b, turn);
    for_each_value(b, pixel, tile, [&](std::size_t k, const auto* values, float centre) {
      const float next = static_cast<float>(values[image]) - centre;
      for (std::size_t set = 0; set <= tangents_.count; ++set) {
        float* lanes = sums(scratch, b, set, turn);
        add_multiple(from[k] - next, lanes, lanes + (1 + k) * kLanes);
      }
      from[k] = next;
    });
  }

  // Takes in kCount tangents from tangent k on.
  template <int kCount>
  void take_in_tangents(std::size_t b, std::size_t k, const ImageTile<Stored>& tile,
                        const Scratch& scratch) const {
    const float* tangents = tangents_.tangents + (b * tangents_.count + k) * dim_;
    const float* centre = tangents_.centre + b * dim_;
    const auto add_products = [&](std::size_t d, const Stored* values,
                                  Vec(&inner)[kCount][kTileVectors]) {
      const Vec origin = broadcast(centre[d]);
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec value = sub(load(values + i * kLanes), origin);
        for (int p = 0; p < kCount; ++p) {
          const Vec factor = broadcast(tangents[static_cast<std::size_t>(p) * dim_ + d]);
          inner[p][i] = multiply_add(factor, value, inner[p][i]);
        }
      }
    };
    const auto take_in_pixel = [&](std::size_t pixel, std::size_t turn,
                                   Vec(&inner)[kCount][kTileVectors]) {
      if (!scratch.matters.data()[turn]) return;
      float* from = nearest(scratch, b, turn) + answered_ + k;
      const int image = scratch.nearer.data()[turn];
      float next[kCount];
      for (int p = 0; p < kCount; ++p) next[p] = image < 0 ? from[p] : number_of(inner[p], image);
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec weight = load(scratch.weights.data() + turn * kTileImages + i * kLanes);
        for (int p = 0; p < kCount; ++p) {
          inner[p][i] = mul(sub(inner[p][i], broadcast(from[p])), weight);
        }
      }
      add_pixel(b, 1 + k, pixel, turn, inner, tile, scratch);
      // The weights have taken in this tile by now, and so must c have.
      for (int p = 0; p < kCount && image >= 0; ++p) {
        const float* weights = sums(scratch, b, 0, turn);
        float* products = sums(scratch, b, 1 + k + static_cast<std::size_t>(p), turn);
        for (std::size_t v = 0; v <= answered_; ++v) {
          add_multiple(from[p] - next[p], weights + v * kLanes, products + v * kLanes);
        }
        from[p] = next[p];
      }
    };
    sum_windows<kCount>(tile.images, scratch, add_products, take_in_pixel);
  }

  // Adds a pixel's factors of a tile, and their products with its values, to kSets sets of sums.
  template <int kSets>
  void add_pixel(std::size_t b, std::size_t set, std::size_t pixel, std::size_t turn,
                 const Vec (&factors)[kSets][kTileVectors], const ImageTile<Stored>& tile,
                 const Scratch& scratch) const {
    float* lanes[kSets];
    for (int p = 0; p < kSets; ++p) {
      lanes[p] = sums(scratch, b, set + static_cast<std::size_t>(p), turn);
      add_terms(factors[p], lanes[p]);
    }
    const float* from = nearest(scratch, b, turn);
    for_each_value(b, pixel, tile, [&](std::size_t k, const auto* values, float centre) {
      const Vec origin = broadcast(centre), start = broadcast(from[k]);
      Vec value[kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) {
        value[i] = sub(sub(load(values + i * kLanes), origin), start);
      }
      for (int p = 0; p < kSets; ++p) add_products(factors[p], value, lanes[p] + (1 + k) * kLanes);
    });
  }

  const TypedPass<Stored> pass_;
  const WindowShape shape_;
  const Tangents tangents_;
  const std::size_t pixels_, dim_, answered_;
};
