// One compilation of the window posterior, for the instruction set around it.

#include "simd/posterior.h"

// Sums of every `window` neighbours in a line of `length` tiles, zero beyond its ends, whatever
// the window at three additions an element: the line, with half a window of zeros before and
// behind, is cut into blocks of one window. A window then is the tail of a block and the head of
// the next one. All terms are added, none subtracted, so small sums keep their digits beside
// large ones.
//
//   line     values; element x at line + x * stride
//   scratch  room for 2 (length + window - 1) tiles
//   visit    visit(x, sum) for every x
template <typename Visit>
inline void window_sums(const float* line, std::size_t stride, std::size_t length,
                        std::size_t window, float* scratch, const Visit& visit) {
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
  for (std::size_t x = 0; x < length; ++x) {
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
    for (std::size_t q = 0; q < queries; ++q) {
      const float* sums = scratch.sums.data() + q * sums_of_query();
      state.minimum[q] = scratch.minimum.data()[q];
      for (int k = 0; k < kLanes; ++k) {
        state.total[q] += sums[k];
        for (std::size_t c = 0; c < shape_.channels; ++c) {
          state.weighted[q * shape_.channels + c] += sums[(c + 1) * kLanes + k];
        }
      }
    }
  }

  void scan_query(std::size_t b, std::size_t count, Scratch& scratch) const {
    const std::size_t height = shape_.height, width = shape_.width, window = shape_.window;
    const Stored* tile = scratch.tile.data();
    float* plane = scratch.plane.data();
    for (std::size_t y = 0; y < height; ++y) {
      float* row = plane + y * width * kTileImages;
      squared_differences(b, tile, y, row);
      // A sum is written behind what is still to be read: the line is in `scratch` by then.
      window_sums(row, kTileImages, width, window, scratch.line.data(),
                  [&](std::size_t x, const Vec(&sum)[kTileVectors]) {
                    for (int i = 0; i < kTileVectors; ++i) {
                      store(row + x * kTileImages + i * kLanes, sum[i]);
                    }
                  });
    }
    Vec floor[kTileVectors];
    missing_images(count, floor);
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    for (std::size_t x = 0; x < width; ++x) {
      window_sums(plane + x * kTileImages, width * kTileImages, height, window,
                  scratch.line.data(), [&](std::size_t y, Vec(&sum)[kTileVectors]) {
                    for (int i = 0; i < kTileVectors; ++i) sum[i] = max(sum[i], floor[i]);
                    const std::size_t pixel = y * width + x, q = b * pixels_ + pixel;
                    take_in(sum, scale, reach, tile + pixel * kTileImages,
                            pixels_ * kTileImages, shape_.channels, scratch.minimum.data() + q,
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
      for (int i = 0; i < kTileVectors; ++i) store(row + x * kTileImages + i * kLanes, sum[i]);
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
