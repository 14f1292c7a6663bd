// One compilation of the equivariant posterior, for the instruction set around it.

#include "simd/posterior.h"
#include "simd/windows.h"

template <typename Stored>
class EquivariantScan {
 public:
  EquivariantScan(const WindowShape& shape, bool circular, const Stored* images,
                  const Segments& segments, const NoisyBatch& batch, const Checkpoint& checkpoint)
      : shape_(shape),
        images_(images),
        segments_(segments),
        batch_(batch),
        pixels_(shape.height * shape.width),
        reaches_{negligible_power(segments.count) +
                 std::log2(static_cast<float>(shape.height * shape.width))},
        rows_(shifts(shape.height, shape.window, circular)),
        columns_(shifts(shape.width, shape.window, circular)),
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
  // Along one axis: patches at p in [first, last) are compared with the query at p + shift, taken
  // around the image's end where it is periodic; their windows read places [begin, end).
  struct Shift {
    std::size_t first, last, begin, end, shift;
  };

  static std::vector<Shift> shifts(std::size_t length, std::size_t window, bool circular) {
    const std::size_t half = window / 2;
    const std::size_t inner = length > 2 * half ? length - 2 * half : 0;
    std::vector<Shift> found;
    if (circular) {
      for (std::size_t shift = 0; shift < length; ++shift) {
        found.push_back({half, half + inner, 0, length, shift});
      }
      return found;
    }
    found.push_back({0, length, 0, length, 0});
    for (std::size_t shift = 1; shift < inner; ++shift) {
      const std::size_t many = inner - shift;
      found.push_back({half, half + many, 0, many + 2 * half, shift});
      // A shift back, as one around the end that never meets it.
      found.push_back({half + shift, half + inner, shift, length, length - shift});
    }
    return found;
  }

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
      const std::size_t count = std::min<std::size_t>(kTileImages, last - image);
      load_tile(images_ + image * dim, count, dim, scratch.tile.data());
      Vec floor[kTileVectors];
      missing_images(count, floor);
      for (std::size_t b = 0; b < batch_.batch; ++b) {
        for (const Shift& row : rows_) {
          checkpoint_();
          for (const Shift& column : columns_) scan_shift(b, row, column, floor, scratch);
        }
      }
    }
    collect_lanes(scratch.minimum.data(), scratch.sums.data(), shape_.channels, state);
  }

  void scan_shift(std::size_t b, const Shift& rows, const Shift& columns,
                  const Vec (&floor)[kTileVectors], Scratch& scratch) const {
    const std::size_t width = shape_.width;
    const Stored* tile = scratch.tile.data();
    float* plane = scratch.plane.data();
    for (std::size_t y = rows.begin; y < rows.end; ++y) {
      float* row = plane + y * width * kTileImages;
      squared_differences(b, tile, y, (y + rows.shift) % shape_.height, columns, row);
      window_sums(row + columns.begin * kTileImages, kTileImages, columns.end - columns.begin,
                  shape_.window, columns.first - columns.begin, columns.last - columns.begin,
                  scratch.line.data(), [&](std::size_t x, const Vec(&sum)[kTileVectors]) {
                    store_tile(row + (columns.begin + x) * kTileImages, sum);
                  });
    }
    const float scale = batch_.scale[b], reach = reaches_ / scale;
    for (std::size_t x = columns.first; x < columns.last; ++x) {
      const std::size_t query_x = (x + columns.shift) % width;
      window_sums(plane + (rows.begin * width + x) * kTileImages, width * kTileImages,
                  rows.end - rows.begin, shape_.window, rows.first - rows.begin,
                  rows.last - rows.begin, scratch.line.data(),
                  [&](std::size_t place, Vec(&sum)[kTileVectors]) {
                    for (int i = 0; i < kTileVectors; ++i) sum[i] = max(sum[i], floor[i]);
                    const std::size_t y = rows.begin + place;
                    const std::size_t query_y = (y + rows.shift) % shape_.height;
                    const std::size_t q = b * pixels_ + query_y * width + query_x;
                    take_in(sum, scale, reach, tile + (y * width + x) * kTileImages,
                            pixels_ * kTileImages, shape_.channels, scratch.minimum.data() + q,
                            scratch.sums.data() + q * sums_of_query());
                  });
    }
  }

  // Summed over the channels, for one row of the images against one of the noisy image.
  void squared_differences(std::size_t b, const Stored* tile, std::size_t y, std::size_t query_y,
                           const Shift& columns, float* row) const {
    const float* noisy = batch_.noisy + b * shape_.channels * pixels_ + query_y * shape_.width;
    for (std::size_t x = columns.begin; x < columns.end; ++x) {
      std::size_t query_x = x + columns.shift;
      if (query_x >= shape_.width) query_x -= shape_.width;
      Vec sum[kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) sum[i] = zero();
      for (std::size_t c = 0; c < shape_.channels; ++c) {
        const Vec target = broadcast(noisy[c * pixels_ + query_x]);
        const Stored* values = tile + (c * pixels_ + y * shape_.width + x) * kTileImages;
        for (int i = 0; i < kTileVectors; ++i) {
          const Vec gap = sub(target, load(values + i * kLanes));
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
  const float reaches_;
  const std::vector<Shift> rows_, columns_;
  const Checkpoint& checkpoint_;
};

template <typename Stored>
void equivariant_posterior(const WindowShape& shape, bool circular, const Stored* images,
                           std::size_t count, const NoisyBatch& batch, const ScanResult& result,
                           std::size_t threads, const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages, 48);
  copy_state(
      EquivariantScan<Stored>(shape, circular, images, segments, batch, checkpoint).run(threads),
      result);
}
