// One compilation of the equivariant posterior, for the instruction set around it.

#include "simd/image_tile.h"
#include "simd/windows.h"

template <typename Stored>
class EquivariantScan {
 public:
  EquivariantScan(const TypedPass<Stored>& pass, const WindowShape& shape, bool circular)
      : pass_(pass),
        shape_(shape),
        reaches_(negligible_power(pass.count) + std::log2(static_cast<float>(shape.pixels()))),
        rows_(shifts(shape.height, shape.window, circular)),
        columns_(shifts(shape.width, shape.window, circular)) {}

  using Scratch = WindowSums<Stored>;
  Scratch scratch() const { return {pass_, shape_, shape_.channels}; }
  ScanState state() const { return {pass_.batch.count * shape_.pixels(), shape_.channels}; }
  double scale(std::size_t q) const { return pass_.batch.scale[q / shape_.pixels()]; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    scratch.clear();
    for_each_tile(pass_, first, last, pass_.batch.count, scratch.tile,
                  [&](std::size_t b, const ImageTile<Stored>& tile) {
                    Vec floor[kTileVectors];
                    missing_images(tile.number, floor);
                    for (const Shift& row : rows_) {
                      pass_.checkpoint();
                      for (const Shift& column : columns_) {
                        scan_shift(b, tile.images, row, column, floor, scratch);
                      }
                    }
                  });
    scratch.collect(state);
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
    std::vector<Shift> result;
    if (circular) {
      for (std::size_t shift = 0; shift < length; ++shift) {
        result.push_back({half, half + inner, 0, length, shift});
      }
      return result;
    }
    result.push_back({0, length, 0, length, 0});
    for (std::size_t shift = 1; shift < inner; ++shift) {
      const std::size_t many = inner - shift;
      result.push_back({half, half + many, 0, many + 2 * half, shift});
      // A shift back, as one around the end that never meets it.
      result.push_back({half + shift, half + inner, shift, length, length - shift});
    }
    return result;
  }

  void scan_shift(std::size_t b, const Stored* tile, const Shift& rows, const Shift& columns,
                  const Vec (&floor)[kTileVectors], const Scratch& scratch) const {
    const std::size_t width = shape_.width, pixels = shape_.pixels();
    const float* noisy = pass_.batch.noisy + b * pass_.dim;
    float* plane = scratch.plane.data();
    for (std::size_t y = rows.begin; y < rows.end; ++y) {
      float* row = plane + y * width * kTileImages;
      squared_differences(shape_, tile + y * width * kTileImages,
                          noisy + (y + rows.shift) % shape_.height * width, columns.begin,
                          columns.end, columns.shift, row);
      sum_line(row + columns.begin * kTileImages, kTileImages, columns.end - columns.begin,
               shape_.window, columns.first - columns.begin, columns.last - columns.begin,
               scratch.line.data());
    }
    const float scale = pass_.batch.scale[b], reach = reaches_ / scale;
    for (std::size_t x = columns.first; x < columns.last; ++x) {
      const std::size_t query_x = (x + columns.shift) % width;
      window_sums(
          plane + (rows.begin * width + x) * kTileImages, width * kTileImages,
          rows.end - rows.begin, shape_.window, rows.first - rows.begin, rows.last - rows.begin,
          scratch.line.data(), [&](std::size_t place, Vec(&sum)[kTileVectors]) {
            for (int i = 0; i < kTileVectors; ++i) sum[i] = max(sum[i], floor[i]);
            const std::size_t y = rows.begin + place;
            const std::size_t query_y = (y + rows.shift) % shape_.height;
            const std::size_t q = b * pixels + query_y * width + query_x;
            const Answers<Stored> answers{tile + (y * width + x) * kTileImages, shape_.channels,
                                          nullptr, 0, pixels * kTileImages};
            take_in(sum, scale, reach, answers, scratch.minimum.data() + q,
                    scratch.sums.data() + q * scratch.of_query);
          });
    }
  }

  const TypedPass<Stored> pass_;
  const WindowShape shape_;
  const float reaches_;
  const std::vector<Shift> rows_, columns_;
};

struct Kernels {
  template <typename Stored>
  static void scan(const TypedPass<Stored>& pass, const WindowShape& shape, bool circular,
                   const ScanResult& result) {
    const EquivariantScan<Stored> scan(pass, shape, circular);
    run_kernel(scan, {pass.count, kTileImages, 48}, pass.threads).copy_to(result);
  }
};
