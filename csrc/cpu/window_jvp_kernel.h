// One compilation of the window posterior with tangents, for the instruction set around it.

#include "simd/posterior.h"
#include "simd/windows.h"

template <typename Stored>
class WindowJvpScan {
 public:
  WindowJvpScan(const WindowShape& shape, const Stored* images, const Segments& segments,
                const NoisyBatch& batch, const Tangents& tangents, const Checkpoint& checkpoint)
      : shape_(shape),
        images_(images),
        segments_(segments),
        batch_(batch),
        tangents_(tangents),
        pixels_(shape.height * shape.width),
        dim_(shape.channels * pixels_),
        checkpoint_(checkpoint) {}

  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, batch_.batch * pixels_, tangents_.sums(shape_.channels),
        [&] { return std::make_unique<Scratch>(shape_, batch_.batch, 1 + tangents_.count); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [&](std::size_t q) { return batch_.scale[q / pixels_]; }, tangents_.count);
  }

 private:
  // Tiles at hand: a noisy image's sums, which are many, are fetched once for all of them.
  static constexpr std::size_t kTiles = 4;
  // Tangents that share the reading of a tile.
  static constexpr int kGroup = 2;

  // What a thread works in. There is a set of sums [pixels, 1 + channels, kLanes] for the weights
  // of every noisy image, and one for each of its tangents with the weights times c. What belongs
  // to pixels lies in the order of their turn, which is by columns. All sums of a pixel count from
  // those of its nearest image: the values of its channels, then c by tangent.
  struct Scratch {
    Scratch(const WindowShape& shape, std::size_t batch, std::size_t sets)
        : tiles(kTiles * shape.channels * shape.height * shape.width * kTileImages),
          weights(shape.height * shape.width * kTileImages),
          planes(kGroup * shape.height * shape.width * kTileImages),
          line(2 * (std::max(shape.height, shape.width) + shape.window) * kTileImages),
          minimum(batch * shape.height * shape.width),
          nearest(batch * shape.height * shape.width * (shape.channels + sets - 1)),
          sums(batch * sets * shape.height * shape.width * (1 + shape.channels) * kLanes),
          matters(shape.height * shape.width),
          nearer(shape.height * shape.width) {}
    AlignedArray<Stored> tiles;
    AlignedArray<float> weights, planes, line, minimum, nearest, sums;
    AlignedArray<bool> matters;  // pixels whose weights are not all zero
    AlignedArray<int> nearer;    // which image of the tile is nearer than all before, or -1
  };

  std::size_t sums_of_pixel() const { return (1 + shape_.channels) * kLanes; }

  // Set 0 is that of the weights, set 1 + k that of tangent k.
  float* sums(const Scratch& scratch, std::size_t b, std::size_t set, std::size_t turn) const {
    const std::size_t place = (b * (1 + tangents_.count) + set) * pixels_ + turn;
    return scratch.sums.data() + place * sums_of_pixel();
  }

  float* nearest(const Scratch& scratch, std::size_t b, std::size_t turn) const {
    const std::size_t place = b * pixels_ + turn;
    return scratch.nearest.data() + place * (shape_.channels + tangents_.count);
  }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    const std::size_t queries = batch_.batch * pixels_;
    std::fill_n(scratch.minimum.data(), queries, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.nearest.data(), queries * (shape_.channels + tangents_.count), 0.0f);
    std::fill_n(scratch.sums.data(), queries * (1 + tangents_.count) * sums_of_pixel(), 0.0f);
    for (std::size_t group = first; group < last; group += kTiles * kTileImages) {
      const std::size_t end = std::min(group + kTiles * kTileImages, last);
      for (std::size_t image = group; image < end; image += kTileImages) {
        load_tile(images_ + image * dim_, std::min<std::size_t>(kTileImages, end - image), dim_,
                  scratch.tiles.data() + (image - group) * dim_);
      }
      for (std::size_t b = 0; b < batch_.batch; ++b) {
        for (std::size_t image = group; image < end; image += kTileImages) {
          checkpoint_();
          scan_tile(b, scratch.tiles.data() + (image - group) * dim_,
                    std::min<std::size_t>(kTileImages, end - image), scratch);
        }
      }
    }
    for (std::size_t q = 0; q < queries; ++q) collect(q / pixels_, q % pixels_, scratch, state);
  }

  // Adds up the lanes of a pixel's sums.
  void collect(std::size_t b, std::size_t pixel, const Scratch& scratch, ScanState& state) const {
    const std::size_t channels = shape_.channels, q = b * pixels_ + pixel;
    const std::size_t turn = pixel % shape_.width * shape_.height + pixel / shape_.width;
    double* values = state.weighted.data() + q * tangents_.sums(channels);
    double* inner = values + channels;
    double* cross = inner + tangents_.count;
    state.minimum[q] = scratch.minimum.data()[b * pixels_ + turn];
    for (std::size_t set = 0; set <= tangents_.count; ++set) {
      const float* lanes = sums(scratch, b, set, turn);
      double& total = set == 0 ? state.total[q] : inner[set - 1];
      double* products = set == 0 ? values : cross + (set - 1) * channels;
      for (int k = 0; k < kLanes; ++k) {
        total += lanes[k];
        for (std::size_t c = 0; c < channels; ++c) products[c] += lanes[(c + 1) * kLanes + k];
      }
    }
    const float* from = nearest(scratch, b, turn);
    count_from_means(
        state.total[q], channels, tangents_.count, values, [&](std::size_t c) { return from[c]; },
        [&](std::size_t k) { return from[channels + k]; });
  }

  void scan_tile(std::size_t b, const Stored* tile, std::size_t count,
                 const Scratch& scratch) const {
    if (!weigh_pixels(b, tile, count, scratch)) return;
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
    // A sum is written behind what is still to be read: the line is in scratch by then.
    const auto sum_line = [&](float* line, std::size_t stride, std::size_t length) {
      window_sums(line, stride, length, shape_.window, 0, length, scratch.line.data(),
                  [&](std::size_t x, const Vec(&sum)[kTileVectors]) {
                    store_tile(line + x * stride, sum);
                  });
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
        for (int p = 0; p < kPlanes; ++p) store_tile(place(p, pixel), sums[p]);
      }
      for (int p = 0; p < kPlanes; ++p) sum_line(place(p, y * width), kTileImages, width);
    }
    std::size_t turn = 0;
    for (std::size_t x = 0; x < width; ++x) {
      for (int p = 0; p < kPlanes; ++p) sum_line(place(p, x), width * kTileImages, height);
      for (std::size_t pixel = x; pixel < pixels_; pixel += width, ++turn) {
        Vec sums[kPlanes][kTileVectors];
        for (int p = 0; p < kPlanes; ++p) {
          for (int i = 0; i < kTileVectors; ++i) sums[p][i] = load(place(p, pixel) + i * kLanes);
        }
        visit(pixel, turn, sums);
      }
    }
  }

  // Takes in the weights of all pixels and keeps them; false where none of them matters.
  bool weigh_pixels(std::size_t b, const Stored* tile, std::size_t count,
                    const Scratch& scratch) const {
    const float* noisy = batch_.noisy + b * dim_;
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    Vec floor[kTileVectors];
    missing_images(count, floor);
    bool any = false;
    const auto add_square = [&](std::size_t d, const Stored* values, Vec(&sums)[1][kTileVectors]) {
      const Vec target = broadcast(noisy[d]);
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec gap = sub(target, load(values + i * kLanes));
        sums[0][i] = multiply_add(gap, gap, sums[0][i]);
      }
    };
    const auto take_in_pixel = [&](std::size_t pixel, std::size_t turn,
                                   const Vec(&sum)[1][kTileVectors]) {
      Vec distance[kTileVectors], weight[1][kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) distance[i] = max(sum[0][i], floor[i]);
      bool nearer = false;
      const auto decay = [&](Vec factor) {
        nearer = true;
        for (std::size_t set = 0; set <= tangents_.count; ++set) {
          shrink(factor, 1 + shape_.channels, sums(scratch, b, set, turn));
        }
      };
      float* minimum = scratch.minimum.data() + b * pixels_ + turn;
      const bool matters = weigh(distance, scale, reach, minimum, decay, weight[0]);
      scratch.matters.data()[turn] = matters;
      if (!matters) return;
      any = true;
      scratch.nearer.data()[turn] = nearer ? image_at(distance, *minimum) : -1;
      if (nearer) count_values_from(b, pixel, turn, tile, scratch);
      store_tile(scratch.weights.data() + turn * kTileImages, weight[0]);
      add_pixel(b, 0, pixel, turn, weight, tile, scratch);
    };
    sum_windows<1>(tile, scratch, add_square, take_in_pixel);
    return any;
  }

  // Counts the values of a pixel from those of the image of a tile that is nearest to it now.
  void count_values_from(std::size_t b, std::size_t pixel, std::size_t turn, const Stored* tile,
                         const Scratch& scratch) const {
    const int image = scratch.nearer.data()[turn];
    float* from = nearest(scratch, b, turn);
    for (std::size_t c = 0, d = pixel; d < dim_; ++c, d += pixels_) {
      const auto stored =
          static_cast<float>(tile[d * kTileImages + static_cast<std::size_t>(image)]);
      const float next = stored - tangents_.centre[b * dim_ + d];
      for (std::size_t set = 0; set <= tangents_.count; ++set) {
        float* lanes = sums(scratch, b, set, turn);
        add_multiple(from[c] - next, lanes, lanes + (1 + c) * kLanes);
      }
      from[c] = next;
    }
  }

  // Takes in kCount tangents from tangent k on.
  template <int kCount>
  void take_in_tangents(std::size_t b, std::size_t k, const Stored* tile,
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
      float* from = nearest(scratch, b, turn) + shape_.channels + k;
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
        for (std::size_t c = 0; c <= shape_.channels; ++c) {
          add_multiple(from[p] - next[p], weights + c * kLanes, products + c * kLanes);
        }
        from[p] = next[p];
      }
    };
    sum_windows<kCount>(tile, scratch, add_products, take_in_pixel);
  }

  // Adds a pixel's factors of a tile, and their products with its values, to kSets sets of sums.
  template <int kSets>
  void add_pixel(std::size_t b, std::size_t set, std::size_t pixel, std::size_t turn,
                 const Vec (&factors)[kSets][kTileVectors], const Stored* tile,
                 const Scratch& scratch) const {
    float* lanes[kSets];
    for (int p = 0; p < kSets; ++p) {
      lanes[p] = sums(scratch, b, set + static_cast<std::size_t>(p), turn);
      add_terms(factors[p], lanes[p]);
    }
    const float* from = nearest(scratch, b, turn);
    for (std::size_t d = pixel; d < dim_; d += pixels_) {
      const Vec origin = broadcast(tangents_.centre[b * dim_ + d]), start = broadcast(*from++);
      Vec value[kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) {
        value[i] = sub(sub(load(tile + d * kTileImages + i * kLanes), origin), start);
      }
      for (int p = 0; p < kSets; ++p) add_products(factors[p], value, lanes[p] += kLanes);
    }
  }

  const WindowShape shape_;
  const Stored* images_;
  const Segments& segments_;
  const NoisyBatch& batch_;
  const Tangents& tangents_;
  const std::size_t pixels_, dim_;
  const Checkpoint& checkpoint_;
};

template <typename Stored>
void window_posterior_jvp(const WindowShape& shape, const Stored* images, std::size_t count,
                          const NoisyBatch& batch, const Tangents& tangents,
                          const ScanResult& result, std::size_t threads,
                          const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages);
  copy_state(
      WindowJvpScan<Stored>(shape, images, segments, batch, tangents, checkpoint).run(threads),
      result);
}
