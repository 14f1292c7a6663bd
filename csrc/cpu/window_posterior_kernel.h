// One compilation of the window posterior, for the instruction set around it.

#include "simd/posterior.h"
#include "simd/windows.h"
#include "simd/windows_distances.h"

template <typename Stored>
class WindowScan {
 public:
  WindowScan(const WindowShape& shape, const WindowPlaces& places, std::size_t values,
             const Stored* images, const Segments& segments, const NoisyBatch& batch,
             const Checkpoint& checkpoint)
      : shape_(shape),
        places_(places),
        values_(values),
        images_(images),
        segments_(segments),
        batch_(batch),
        pixels_(shape.height * shape.width),
        checkpoint_(checkpoint) {}

  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, batch_.batch * pixels_, values_,
        [&] { return std::make_unique<Scratch>(shape_, values_, batch_.batch); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [&](std::size_t q) { return batch_.scale[q / pixels_]; });
  }

 private:
  struct Scratch {
    Scratch(const WindowShape& shape, std::size_t values, std::size_t batch)
        : tile(shape.channels * shape.height * shape.width * kTileImages),
          plane(shape.height * shape.width * kTileImages),
          line(2 * (std::max(shape.height, shape.width) + shape.window) * kTileImages),
          minimum(batch * shape.height * shape.width),
          sums(batch * shape.height * shape.width * (values + 1) * kLanes) {}
    AlignedArray<Stored> tile;
    AlignedArray<float> plane, line, minimum, sums;
  };

  std::size_t sums_of_query() const { return (values_ + 1) * kLanes; }

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
    collect_lanes(scratch.minimum.data(), scratch.sums.data(), values_, state);
  }

  void scan_query(std::size_t b, std::size_t count, Scratch& scratch) const {
    const Stored* tile = scratch.tile.data();
    Vec floor[kTileVectors];
    missing_images(count, floor);
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    const float* noisy = batch_.noisy + b * shape_.channels * pixels_;
    window_distances(shape_, places_, tile, noisy, scratch.plane.data(), scratch.line.data(),
                     [&](std::size_t pixel, Vec(&sum)[kTileVectors]) {
                       for (int i = 0; i < kTileVectors; ++i) sum[i] = max(sum[i], floor[i]);
                       const std::size_t q = b * pixels_ + pixel;
                       take_in(sum, scale, reach, tile + pixel * kTileImages, pixels_ * kTileImages,
                               values_, scratch.minimum.data() + q,
                               scratch.sums.data() + q * sums_of_query());
                     });
  }

  const WindowShape shape_;
  const WindowPlaces places_;
  const std::size_t values_;  // that a query answers
  const Stored* images_;
  const Segments& segments_;
  const NoisyBatch& batch_;
  const std::size_t pixels_;
  const Checkpoint& checkpoint_;
};

template <typename Stored>
void window_posterior(const WindowShape& shape, const WindowPlaces& places, std::size_t values,
                      const Stored* images, std::size_t count, const NoisyBatch& batch,
                      const ScanResult& result, std::size_t threads, const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages);
  const WindowScan<Stored> scan(shape, places, values, images, segments, batch, checkpoint);
  copy_state(scan.run(threads), result);
}
