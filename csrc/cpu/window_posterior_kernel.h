// One compilation of the window posterior, for the instruction set around it.

#include "simd/posterior.h"
#include "simd/windows.h"

template <typename Stored>
class WindowScan {
 public:
  WindowScan(const WindowShape& shape, const Stored* images, const Segments& segments,
             const NoisyBatch& batch, const Checkpoint& checkpoint)
      : shape_(shape),
        images_(images),
        segments_(segments),
        batch_(batch),
        pixels_(shape.height * shape.width),
        checkpoint_(checkpoint) {}

  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, batch_.batch * pixels_, shape_.channels,
        [&] { return std::make_unique<Scratch>(shape_, batch_.batch); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [&](std::size_t q) { return batch_.scale[q / pixels_]; });
  }

 private:
  struct Scratch {
    Scratch(const WindowShape& shape, std::size_t batch)
        : tile(shape.channels * shape.height * shape.width * kTileImages),
          plane(shape.height * shape.width * kTileImages),
          line(2 * (std::max(shape.height, shape.width) + shape.window) * kTileImages),
          minimum(batch * shape.height * shape.width),
          sums(batch * shape.height * shape.width * (shape.channels + 1) * kLanes) {}
    AlignedArray<Stored> tile;
    AlignedArray<float> plane, line, minimum, sums;
  };

  std::size_t sums_of_query() const { return (shape_.channels + 1) * kLanes; }

  void scan(std::size_t first, std::size_t last, Scratch& scratch, ScanState& state) const {
    const std::size_t queries = batch_.batch * pixels_, dim = shape_.channels * pixels_;
    std::fill_n(scratch.minimum.data(), queries, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sums.data(), queries * sums_of_query(), 0.0f);
    for (std::size_t image = first; image < last; image += kTileImages) {
      checkpoint_();
      const std::size_t count = std::min<std::size_t>(kTileImages, last - image);
      load_tile(images_ + image * dim, count, dim, scratch.tile.data());
      for (std::size_t b = 0; b < batch_.batch; ++b) scan_query(b, count, scratch);
    }
    collect_lanes(scratch.minimum.data(), scratch.sums.data(), shape_.channels, state);
  }

  void scan_query(std::size_t b, std::size_t count, Scratch& scratch) const {
    const std::size_t height = shape_.height, width = shape_.width, window = shape_.window;
    const Stored* tile = scratch.tile.data();
    float* plane = scratch.plane.data();
    for (std::size_t y = 0; y < height; ++y) {
      float* row = plane + y * width * kTileImages;
      squared_differences(b, tile, y, row);
      // A sum is written behind what is still to be read: the line is in `scratch` by then.
      window_sums(row, kTileImages, width, window, 0, width, scratch.line.data(),
                  [&](std::size_t x, const Vec(&sum)[kTileVectors]) {
                    store_tile(row + x * kTileImages, sum);
                  });
    }
    Vec floor[kTileVectors];
    missing_images(count, floor);
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    for (std::size_t x = 0; x < width; ++x) {
      window_sums(plane + x * kTileImages, width * kTileImages, height, window, 0, height,
                  scratch.line.data(), [&](std::size_t y, Vec(&sum)[kTileVectors]) {
                    for (int i = 0; i < kTileVectors; ++i) sum[i] = max(sum[i], floor[i]);
                    const std::size_t pixel = y * width + x, q = b * pixels_ + pixel;
                    take_in(sum, scale, reach, tile + pixel * kTileImages, pixels_ * kTileImages,
                            shape_.channels, scratch.minimum.data() + q,
                            scratch.sums.data() + q * sums_of_query());
                  });
    }
  }

  // Summed over the channels, for one row of pixels.
  void squared_differences(std::size_t b, const Stored* tile, std::size_t y, float* row) const {
    for (std::size_t x = 0; x < shape_.width; ++x) {
      Vec sum[kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) sum[i] = zero();
      for (std::size_t c = 0; c < shape_.channels; ++c) {
        const std::size_t d = c * pixels_ + y * shape_.width + x;
        const Vec target = broadcast(batch_.noisy[b * shape_.channels * pixels_ + d]);
        for (int i = 0; i < kTileVectors; ++i) {
          const Vec gap = sub(target, load(tile + d * kTileImages + i * kLanes));
          sum[i] = multiply_add(gap, gap, sum[i]);
        }
      }
      store_tile(row + x * kTileImages, sum);
    }
  }

  const WindowShape shape_;
  const Stored* images_;
  const Segments& segments_;
  const NoisyBatch& batch_;
  const std::size_t pixels_;
  const Checkpoint& checkpoint_;
};

template <typename Stored>
void window_posterior(const WindowShape& shape, const Stored* images, std::size_t count,
                      const NoisyBatch& batch, const ScanResult& result, std::size_t threads,
                      const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages);
  copy_state(WindowScan<Stored>(shape, images, segments, batch, checkpoint).run(threads), result);
}
