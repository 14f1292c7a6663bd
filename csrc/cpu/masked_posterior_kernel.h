// One compilation of the masked posterior's kernels, for the instruction set around it.

#include "simd/image_tile.h"
#include "simd/masks.h"

// Scans for kBatch noisy images at once.
template <typename Stored, int kBatch, bool kCentred>
class MaskedScan {
 public:
  MaskedScan(const TypedPass<Stored>& pass, const DifferenceTree& tree, std::size_t first_noisy)
      : pass_(pass), tree_(tree), targets_(pass.dim * kBatch) {
    for (std::size_t b = 0; b < kBatch; ++b) {
      fill_targets<kCentred>(pass, first_noisy + b, kBatch, targets_.data() + b);
      scale_[b] = pass.batch.scale[first_noisy + b];
      reach_[b] = pass.reach(first_noisy + b);
    }
  }

  // What a thread works in; queries lie in the order the tree visits outputs.
  struct Scratch {
    const MaskedScan& scan;
    TileRoom<Stored> tile{scan.pass_, 1, scan.answered() > 0};
    AlignedArray<float> slots{scan.tree_.slots * kBatch * kTileImages};
    AlignedArray<float> minimum{scan.queries()}, sums{scan.queries() * scan.sums_of_query()};
  };

  Scratch scratch() const { return {*this}; }
  ScanState state() const { return {queries(), answered()}; }
  double scale(std::size_t q) const { return scale_[q % kBatch]; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), queries(), std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sums.data(), queries() * sums_of_query(), 0.0f);
    for_each_tile(pass_, first, last, 1, scratch.tile,
                  [&](std::size_t, const ImageTile<Stored>& tile) {
                    pass_.checkpoint();
                    scan_tile(tile, scratch);
                  });
    const float* minimum = scratch.minimum.data();
    const float* sums = scratch.sums.data();
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.output == DifferenceTree::kSilent) continue;
      for (std::size_t b = 0; b < kBatch; ++b, sums += sums_of_query()) {
        const std::size_t q = static_cast<std::size_t>(node.output) * kBatch + b;
        state.minimum[q] = *minimum++;
        add_lanes(sums, state.total[q]);
        for (std::size_t k = 0; k < answered(); ++k) {
          add_lanes(sums + (1 + k) * kLanes, state.weighted[q * answered() + k]);
        }
      }
    }
  }

 private:
  std::size_t queries() const { return tree_.outputs * kBatch; }
  std::size_t answered() const { return tree_.answered() * pass_.values.answered(); }
  std::size_t sums_of_query() const { return (1 + answered()) * kLanes; }

  void scan_tile(const ImageTile<Stored>& tile, const Scratch& scratch) const {
    Vec floor[kTileVectors];
    missing_images(tile.number, floor);
    const bool partial = tile.number < static_cast<std::size_t>(kTileImages);
    const std::size_t step = sums_of_query();
    Answers<Stored> answers{tile.images, pass_.values.with_image ? tree_.answered() : 0,
                            tile.values, pass_.values.number * tree_.answered(),
                            pass_.dim * kTileImages};
    float* minimum = scratch.minimum.data();
    float* lanes = scratch.sums.data();
    const auto answer = [&](std::size_t output, const Vec(&sums)[kBatch][kTileVectors]) {
      if (tree_.answered() == 1) {
        const std::size_t own = tree_.answers[output] * kTileImages;
        answers.images = tile.images + own;
        answers.values = tile.values + own;
      }
      for (int b = 0; b < kBatch; ++b, ++minimum, lanes += step) {
        Vec distance[kTileVectors];
        for (int i = 0; i < kTileVectors; ++i) {
          distance[i] = partial ? max(sums[b][i], floor[i]) : sums[b][i];
        }
        take_in(distance, scale_[b], reach_[b], answers, minimum, lanes);
      }
    };
    sum_over_masks(tree_, tile.images,
                   GapTerms<kBatch, kCentred>{targets_.data(), pass_.batch.centre},
                   scratch.slots.data(), answer);
  }

  const TypedPass<Stored> pass_;
  const DifferenceTree& tree_;
  AlignedArray<float> targets_;
  float scale_[kBatch], reach_[kBatch];
};

#include "masked_posterior_jvp_kernel.h"
#include "masked_posterior_vjp_kernel.h"

struct Kernels {
  template <typename Stored>
  static void scan(const TypedPass<Stored>& pass, const DifferenceTree& tree,
                   const ScanResult& result) {
    if (pass.batch.centre != nullptr) {
      scan_groups<true>(pass, tree, result);
    } else {
      scan_groups<false>(pass, tree, result);
    }
  }

  template <typename Stored>
  static void jvp(const TypedPass<Stored>& pass, const DifferenceTree& tree,
                  const Tangents& tangents, const ScanResult& result) {
    for (std::size_t b = 0; b < pass.batch.count; ++b) {
      std::size_t first = 0;
      const auto run = [&](auto group) {
        jvp_group<decltype(group)::value>(pass, tree, tangents, b, first, result);
        first += decltype(group)::value;
      };
      // At least once: without any tangent the means are still asked for.
      do {
        const std::size_t left = tangents.count - first;
        if (left > 4) {
          run(std::integral_constant<int, 8>());
        } else if (left > 1) {
          run(std::integral_constant<int, 4>());
        } else {
          run(std::integral_constant<int, 1>());
        }
      } while (first < tangents.count);
    }
  }

  template <typename Stored>
  static void vjp(const TypedPass<Stored>& pass, const DifferenceTree& tree,
                  const DifferenceTree& answers, const PosteriorWeights& weights, double* sums) {
    const auto run = [&](const auto& vjp) {
      const ScanState state = run_kernel(vjp, {pass.count, kTileImages}, pass.threads);
      std::copy(state.weighted.begin(), state.weighted.end(), sums);
    };
    if (pass.batch.centre != nullptr) {
      run(MaskedVjp<Stored, true>(pass, tree, answers, weights));
    } else {
      run(MaskedVjp<Stored, false>(pass, tree, answers, weights));
    }
  }

 private:
  // Groups of noisy images that fill the registers, then smaller ones for the rest.
  template <bool kCentred, typename Stored>
  static void scan_groups(const TypedPass<Stored>& pass, const DifferenceTree& tree,
                          const ScanResult& result) {
    std::size_t first = 0;
    const auto run = [&](auto group) {
      constexpr std::size_t kBatch = decltype(group)::value;
      for (; pass.batch.count - first >= kBatch; first += kBatch) {
        scan_group<kBatch, kCentred>(pass, tree, first, result);
      }
    };
    run(std::integral_constant<int, 8>());
    run(std::integral_constant<int, 4>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
  }

  template <int kBatch, bool kCentred, typename Stored>
  static void scan_group(const TypedPass<Stored>& pass, const DifferenceTree& tree,
                         std::size_t first, const ScanResult& result) {
    const MaskedScan<Stored, kBatch, kCentred> scan(pass, tree, first);
    const ScanState state = run_kernel(scan, {pass.count, kTileImages}, pass.threads);
    std::vector<double> left_out(tree.outputs);
    for (std::size_t b = 0; b < kBatch; ++b) {
      if constexpr (kCentred) {
        left_out =
            squares_over_masks(tree, pass.batch.noisy + (first + b) * pass.dim, pass.batch.centre);
      }
      for (std::size_t m = 0; m < tree.outputs; ++m) {
        const std::size_t from = m * kBatch + b, to = (first + b) * tree.outputs + m;
        result.minimum[to] = state.minimum[from] + left_out[m];
        result.total[to] = state.total[from];
        std::copy_n(state.weighted.data() + from * state.sums, state.sums,
                    result.weighted + to * state.sums);
      }
    }
  }

  // Tangents from `first` on, as far as there are any, of noisy image b.
  template <int kTangents, typename Stored>
  static void jvp_group(const TypedPass<Stored>& pass, const DifferenceTree& tree,
                        const Tangents& tangents, std::size_t b, std::size_t first,
                        const ScanResult& result) {
    using Scan = MaskedJvp<Stored, kTangents>;
    const std::size_t dim = pass.dim, sums = tangents.sums(1);
    const ScanState state =
        run_kernel(Scan(pass, tree, tangents, b, first), {pass.count, kTileImages}, pass.threads);
    const float* centre = tangents.centre + b * dim;
    const std::vector<double> left_out =
        squares_over_masks(tree, pass.batch.noisy + b * dim, centre);
    for (std::size_t m = 0; m < tree.outputs; ++m) {
      const std::size_t to = b * tree.outputs + m;
      result.minimum[to] = state.minimum[m] + left_out[m];
      result.total[to] = state.total[m];
      result.weighted[to * sums] = state.weighted[m * Scan::kValues];
    }
    const std::size_t last = std::min(tangents.count, first + kTangents);
    std::vector<double> products(dim);
    for (std::size_t k = first; k < last; ++k) {
      const float* tangent = tangents.tangents + (b * tangents.count + k) * dim;
      for (std::size_t d = 0; d < dim; ++d) {
        products[d] = static_cast<double>(tangent[d]) * centre[d];
      }
      const std::vector<double> offset = sums_over_masks(tree, products);
      for (std::size_t m = 0; m < tree.outputs; ++m) {
        const double* inner = state.weighted.data() + m * Scan::kValues + 1 + (k - first);
        double* weighted = result.weighted + (b * tree.outputs + m) * sums;
        weighted[1 + k] = inner[0] + offset[m] * state.total[m];
        weighted[1 + tangents.count + k] = inner[kTangents];
      }
    }
  }
};
