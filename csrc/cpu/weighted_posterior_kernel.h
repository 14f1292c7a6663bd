// One compilation of the weighted posterior's kernel, for the instruction set around it.

#include "simd/image_tile.h"

// Scans for one noisy image.
template <typename Stored>
class WeightedScan {
 public:
  WeightedScan(const TypedPass<Stored>& pass, const InputWeights& weights, std::size_t noisy)
      : pass_(pass),
        weights_(weights),
        noisy_(pass.batch.noisy + noisy * pass.dim),
        scale_(pass.batch.scale[noisy]),
        reach_(pass.reach(noisy)) {}

  // What a thread works in.
  struct Scratch {
    const WeightedScan& scan;
    TileRoom<Stored> tile{scan.pass_, 1};
    AlignedArray<float> squares{scan.pass_.dim * kTileImages};
    AlignedArray<float> minimum{scan.weights_.outputs};
    AlignedArray<float> sums{scan.weights_.outputs * scan.sums_of_query()};
  };

  Scratch scratch() const { return {*this}; }
  ScanState state() const { return {weights_.outputs, answered()}; }
  double scale(std::size_t) const { return scale_; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    const std::size_t outputs = weights_.outputs, step = sums_of_query();
    std::fill_n(scratch.minimum.data(), outputs, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sums.data(), outputs * step, 0.0f);
    for_each_tile(pass_, first, last, 1, scratch.tile,
                  [&](std::size_t, const ImageTile<Stored>& tile) {
                    pass_.checkpoint();
                    scan_tile(tile, scratch);
                  });
    for (std::size_t q = 0; q < outputs; ++q) {
      const float* sums = scratch.sums.data() + q * step;
      state.minimum[q] = scratch.minimum.data()[q];
      add_lanes(sums, state.total[q]);
      for (std::size_t k = 0; k < answered(); ++k) {
        add_lanes(sums + (1 + k) * kLanes, state.weighted[q * answered() + k]);
      }
    }
  }

 private:
  static constexpr std::size_t kOutputs = InputWeights::kOutputs;
  using Sums = Vec[kOutputs][kTileVectors];

  std::size_t answered() const { return pass_.values.answered(); }
  std::size_t sums_of_query() const { return (1 + answered()) * kLanes; }

  void scan_tile(const ImageTile<Stored>& tile, const Scratch& scratch) const {
    Vec floor[kTileVectors];
    missing_images(tile.number, floor);
    form_squares(tile.images, scratch.squares.data());
    Answers<Stored> answers{tile.images, pass_.values.with_image ? std::size_t{1} : 0, tile.values,
                            pass_.values.number, pass_.dim * kTileImages};
    for (std::size_t block = 0; block + 1 < weights_.begin.size(); ++block) {
      Sums sums;
      sum_block(scratch.squares.data(), block, sums);
      const std::size_t first = block * kOutputs;
      const std::size_t last = std::min(first + kOutputs, weights_.outputs);
      for (std::size_t q = first; q < last; ++q) {
        const std::size_t own = std::size_t{weights_.answers[q]} * kTileImages;
        answers.images = tile.images + own;
        answers.values = tile.values + own;
        Vec distance[kTileVectors];
        for (int i = 0; i < kTileVectors; ++i) distance[i] = max(sums[q - first][i], floor[i]);
        take_in(distance, scale_, reach_, answers, scratch.minimum.data() + q,
                scratch.sums.data() + q * sums_of_query());
      }
    }
  }

  // The squares of a tile's differences from the noisy image.
  void form_squares(const Stored* images, float* squares) const {
    for (std::size_t d = 0; d < pass_.dim; ++d) {
      const Vec target = broadcast(noisy_[d]);
      for (int i = 0; i < kTileVectors; ++i) {
        const std::size_t place = d * kTileImages + i * kLanes;
        const Vec gap = sub(load(images + place), target);
        store(squares + place, mul(gap, gap));
      }
    }
  }

  // The weighted sums of the squares for the outputs of a block.
  void sum_block(const float* squares, std::size_t block, Sums& result) const {
    Sums sums;
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kOutputs; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) sums[k][i] = zero();
    }
    const std::size_t end = weights_.begin[block + 1];
    for (std::size_t entry = weights_.begin[block]; entry < end; ++entry) {
      const float* weight = weights_.weights.data() + entry * kOutputs;
      Vec square[kTileVectors];
      load_vectors(squares + std::size_t{weights_.inputs[entry]} * kTileImages, square);
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kOutputs; ++k) {
        const Vec factor = broadcast(weight[k]);
#pragma GCC unroll 8
        for (int i = 0; i < kTileVectors; ++i) {
          sums[k][i] = multiply_add(factor, square[i], sums[k][i]);
        }
      }
    }
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kOutputs; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) result[k][i] = sums[k][i];
    }
  }

  const TypedPass<Stored> pass_;
  const InputWeights& weights_;
  const float* noisy_;
  const float scale_, reach_;
};

struct Kernels {
  template <typename Stored>
  static void scan(const TypedPass<Stored>& pass, const InputWeights& weights,
                   const ScanResult& result) {
    const std::size_t sums = pass.values.answered();
    for (std::size_t b = 0; b < pass.batch.count; ++b) {
      const std::size_t to = b * weights.outputs;
      const ScanState state = run_kernel(WeightedScan<Stored>(pass, weights, b),
                                         {pass.count, kTileImages}, pass.threads);
      state.copy_to({result.minimum + to, result.total + to, result.weighted + to * sums});
    }
  }
};
