// One compilation of the window posterior's kernels, for the instruction set around it.

#include "simd/image_tile.h"
#include "simd/windows.h"

template <typename Stored>
class WindowScan {
 public:
  // A query answers its channels of all answered images, or nothing.
  WindowScan(const TypedPass<Stored>& pass, const WindowShape& shape, const WindowPlaces& places,
             bool answers)
      : pass_(pass),
        shape_(shape),
        places_(places),
        image_values_(answers && pass.values.with_image ? shape.channels : 0),
        value_values_(answers ? pass.values.number * shape.channels : 0) {}

  using Scratch = WindowSums<Stored>;
  Scratch scratch() const { return {pass_, shape_, answered()}; }
  ScanState state() const { return {pass_.batch.count * shape_.pixels(), answered()}; }
  double scale(std::size_t q) const { return pass_.batch.scale[q / shape_.pixels()]; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    scratch.clear();
    for_each_tile(pass_, first, last, pass_.batch.count, scratch.tile,
                  [&](std::size_t b, const ImageTile<Stored>& tile) {
                    if (b == 0) pass_.checkpoint();
                    scan_tile(b, tile, scratch);
                  });
    scratch.collect(state);
  }

 private:
  std::size_t answered() const { return image_values_ + value_values_; }

  void scan_tile(std::size_t b, const ImageTile<Stored>& tile, const Scratch& scratch) const {
    Vec floor[kTileVectors];
    missing_images(tile.number, floor);
    const float scale = pass_.batch.scale[b], reach = pass_.reach(b);
    const std::size_t pixels = shape_.pixels();
    window_distances(shape_, places_, tile.images, pass_.batch.noisy + b * pass_.dim,
                     scratch.plane.data(), scratch.line.data(),
                     [&](std::size_t pixel, Vec(&sum)[kTileVectors]) {
                       for (int i = 0; i < kTileVectors; ++i) sum[i] = max(sum[i], floor[i]);
                       const std::size_t q = b * pixels + pixel;
                       const Answers<Stored> answers{
                           tile.images + pixel * kTileImages, image_values_,
                           tile.values + pixel * kTileImages, value_values_, pixels * kTileImages};
                       take_in(sum, scale, reach, answers, scratch.minimum.data() + q,
                               scratch.sums.data() + q * scratch.of_query);
                     });
  }

  const TypedPass<Stored> pass_;
  const WindowShape shape_;
  const WindowPlaces places_;
  const std::size_t image_values_, value_values_;
};

#include "window_posterior_jvp_kernel.h"
#include "window_posterior_vjp_kernel.h"

struct Kernels {
  template <typename Stored>
  static void scan(const TypedPass<Stored>& pass, const WindowShape& shape,
                   const WindowPlaces& places, bool answers, const ScanResult& result) {
    const WindowScan<Stored> scan(pass, shape, places, answers);
    run_kernel(scan, {pass.count, kTileImages}, pass.threads).copy_to(result);
  }

  template <typename Stored>
  static void jvp(const TypedPass<Stored>& pass, const WindowShape& shape, const Tangents& tangents,
                  const ScanResult& result) {
    const WindowJvp<Stored> scan(pass, shape, tangents);
    run_kernel(scan, {pass.count, kTileImages}, pass.threads).copy_to(result);
  }

  template <typename Stored>
  static void vjp(const TypedPass<Stored>& pass, const WindowShape& shape,
                  const PosteriorWeights& weights, double* sums) {
    const WindowVjp<Stored> vjp(pass, shape, weights);
    const ScanState state = run_kernel(vjp, {pass.count, kTileImages}, pass.threads);
    std::copy(state.weighted.begin(), state.weighted.end(), sums);
  }
};
