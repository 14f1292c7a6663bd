// One compilation of the spread of weights over windows, for the instruction set around it.

#include "simd/posterior.h"
#include "simd/windows.h"
#include "simd/windows_distances.h"

template <typename Stored>
class WindowAdjoint {
 public:
  WindowAdjoint(const WindowShape& shape, const Stored* images, const Segments& segments,
                const NoisyBatch& batch, const WindowWeights& weights, const Checkpoint& checkpoint)
      : shape_(shape),
        places_(weights.cotangents == nullptr ? places_inside(shape) : all_places(shape)),
        images_(images),
        segments_(segments),
        batch_(batch),
        weights_(weights),
        pixels_(shape.height * shape.width),
        dim_(shape.channels * pixels_),
        checkpoint_(checkpoint) {}

  // A state whose minimum and total are of no meaning.
  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, batch_.batch * weights_.sums(), dim_,
        [&] { return std::make_unique<Scratch>(shape_, batch_.batch * weights_.sums()); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [](std::size_t) { return 1.0; });
  }

 private:
  // Tiles at hand: a noisy image's sums, which are many, are fetched once for all of them.
  static constexpr std::size_t kTiles = 4;

  struct Scratch {
    Scratch(const WindowShape& shape, std::size_t sets)
        : tiles(kTiles * shape.channels * shape.height * shape.width * kTileImages),
          weights(shape.height * shape.width * kTileImages),
          factors(shape.height * shape.width * kTileImages),
          line(2 * (std::max(shape.height, shape.width) + shape.window) * kTileImages),
          sums(sets * shape.channels * shape.height * shape.width * kLanes) {}
    AlignedArray<Stored> tiles;
    AlignedArray<float> weights, factors, line, sums;
  };

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

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.sums.data(), batch_.batch * weights_.sums() * dim_ * kLanes, 0.0f);
    for (std::size_t group = first; group < last; group += kTiles * kTileImages) {
      const std::size_t end = std::min(group + kTiles * kTileImages, last);
      for (std::size_t image = group; image < end; image += kTileImages) {
        load_tile(images_ + image * dim_, std::min<std::size_t>(kTileImages, end - image), dim_,
                  scratch.tiles.data() + (image - group) * dim_);
      }
      for (std::size_t b = 0; b < batch_.batch; ++b) {
        for (std::size_t image = group; image < end; image += kTileImages) {
          checkpoint_();
          const Stored* tile = scratch.tiles.data() + (image - group) * dim_;
          const Box box =
              weigh_windows(b, tile, std::min<std::size_t>(kTileImages, end - image), scratch);
          if (box.bottom != 0) add_tile(b, tile, box, scratch);
        }
      }
    }
    std::fill(state.minimum.begin(), state.minimum.end(), 0.0f);
    const float* lanes = scratch.sums.data();
    for (double& sum : state.weighted) {
      for (int k = 0; k < kLanes; ++k) sum += *lanes++;
    }
  }

  // Posterior weights of a tile's images for every window; the pixels where any is not zero.
  Box weigh_windows(std::size_t b, const Stored* tile, std::size_t count,
                    const Scratch& scratch) const {
    Vec floor[kTileVectors];
    missing_images(count, floor);
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    float* weights = scratch.weights.data();
    Box box;
    window_distances(shape_, places_, tile, batch_.noisy + b * dim_, weights, scratch.line.data(),
                     [&](std::size_t pixel, Vec(&sum)[kTileVectors]) {
                       const std::size_t q = b * pixels_ + pixel;
                       const auto minimum = static_cast<float>(weights_.minimum[q]);
                       const auto inverse = static_cast<float>(1.0 / weights_.total[q]);
                       Vec lowest = max(sum[0], floor[0]);
                       for (int i = 0; i < kTileVectors; ++i) {
                         sum[i] = max(sum[i], floor[i]);
                         lowest = min(lowest, sum[i]);
                       }
                       const bool matters = any_at_most(lowest, broadcast(minimum + reach));
                       if (matters) box.add(pixel / shape_.width, pixel % shape_.width);
                       for (int i = 0; i < kTileVectors; ++i) {
                         sum[i] = matters ? weight(sum[i], minimum, scale, inverse) : zero();
                       }
                       store_tile(weights + pixel * kTileImages, sum);
                     });
    return box;
  }

  static Vec weight(Vec distance, float minimum, float scale, float inverse_total) {
    // No distance lies below the minimum but by rounding.
    const Vec gap = max(sub(distance, broadcast(minimum)), zero());
    return mul(exp2_of_negative(mul(gap, broadcast(-scale))), broadcast(inverse_total));
  }

  // Adds what a tile contributes to all sums of a noisy image.
  void add_tile(std::size_t b, const Stored* tile, const Box& box, const Scratch& scratch) const {
    if (weights_.cotangents == nullptr) {
      spread(b, b, tile, box, scratch.weights.data(), scratch);
      return;
    }
    for (std::size_t set = b * weights_.count; set < (b + 1) * weights_.count; ++set) {
      for (std::size_t y = box.top; y < box.bottom; ++y) {
        for (std::size_t x = box.left; x < box.right; ++x) {
          multiply(b, set, y * shape_.width + x, tile, scratch);
        }
      }
      spread(b, set, tile, box, scratch.factors.data(), scratch);
    }
  }

  // Weights of a tile at a pixel times their cotangent's products with the values there.
  void multiply(std::size_t b, std::size_t set, std::size_t pixel, const Stored* tile,
                const Scratch& scratch) const {
    Vec factor[kTileVectors];
    for (int i = 0; i < kTileVectors; ++i) factor[i] = zero();
    for (std::size_t d = pixel; d < dim_; d += pixels_) {
      const Vec cotangent = broadcast(weights_.cotangents[set * dim_ + d]);
      const Vec mean = broadcast(weights_.mean[b * dim_ + d]);
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec gap = sub(load(tile + d * kTileImages + i * kLanes), mean);
        factor[i] = multiply_add(cotangent, gap, factor[i]);
      }
    }
    for (int i = 0; i < kTileVectors; ++i) {
      const Vec weights = load(scratch.weights.data() + pixel * kTileImages + i * kLanes);
      factor[i] = mul(factor[i], weights);
    }
    store_tile(scratch.factors.data() + pixel * kTileImages, factor);
  }

  // Adds the values of a tile's images under the factors of the windows of the pixels in a box.
  void spread(std::size_t b, std::size_t set, const Stored* tile, const Box& box, float* plane,
              const Scratch& scratch) const {
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
                  store_tile(column + (top + k) * width * kTileImages, sum);
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

  void add_values(std::size_t b, std::size_t set, std::size_t pixel, const Stored* tile,
                  const Vec (&factor)[kTileVectors], const Scratch& scratch) const {
    Vec largest = zero();
    for (int i = 0; i < kTileVectors; ++i) {
      largest = max(largest, max(factor[i], sub(zero(), factor[i])));
    }
    if (!any_less(zero(), largest)) return;
    for (std::size_t d = pixel; d < dim_; d += pixels_) {
      Vec value[kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) value[i] = load(tile + d * kTileImages + i * kLanes);
      if (weights_.cotangents != nullptr) {
        const Vec centre = broadcast(weights_.centre[b * dim_ + d]);
        for (int i = 0; i < kTileVectors; ++i) value[i] = sub(value[i], centre);
      }
      add_products(factor, value, scratch.sums.data() + (set * dim_ + d) * kLanes);
    }
  }

  const WindowShape shape_;
  const WindowPlaces places_;
  const Stored* images_;
  const Segments& segments_;
  const NoisyBatch& batch_;
  const WindowWeights& weights_;
  const std::size_t pixels_, dim_;
  const Checkpoint& checkpoint_;
};

template <typename Stored>
void window_adjoint(const WindowShape& shape, const Stored* images, std::size_t count,
                    const NoisyBatch& batch, const WindowWeights& weights, double* sums,
                    std::size_t threads, const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages);
  const WindowAdjoint<Stored> adjoint(shape, images, segments, batch, weights, checkpoint);
  const ScanState state = adjoint.run(threads);
  std::copy(state.weighted.begin(), state.weighted.end(), sums);
}
