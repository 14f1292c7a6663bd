// One compilation of the masked posterior, for the instruction set around it.

#include "simd/posterior.h"

template <typename Stored, int kQueries, bool kCentred>
class MaskedScan {
 public:
  MaskedScan(const DifferenceTree& tree, const Stored* images, const Segments& segments,
             const NoisyBatch& batch, std::size_t first_query, const Checkpoint& checkpoint)
      : tree_(tree),
        images_(images),
        segments_(segments),
        dim_(tree.inputs_count),
        centre_(batch.centre),
        checkpoint_(checkpoint),
        noisy_(dim_ * kQueries) {
    for (int b = 0; b < kQueries; ++b) {
      const float* row = batch.noisy + (first_query + static_cast<std::size_t>(b)) * dim_;
      for (std::size_t d = 0; d < dim_; ++d) {
        noisy_.data()[d * kQueries + b] = kCentred ? 2.0f * (row[d] - centre_[d]) : row[d];
      }
      scale_[b] = batch.scale[first_query + static_cast<std::size_t>(b)];
      reach_[b] = negligible_power(segments.count) / scale_[b];
    }
  }

  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, tree_.outputs * kQueries, tree_.answered(),
        [&] { return std::make_unique<Scratch>(tree_); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [&](std::size_t q) { return scale_[q % kQueries]; });
  }

 private:
  using Sums = Vec[kQueries][kTileVectors];
  static constexpr std::size_t kSumsOfQuery = 2 * kLanes;  // weights, weighted values

  // What a thread works in; queries lie in the order the tree visits outputs.
  struct Scratch {
    explicit Scratch(const DifferenceTree& tree)
        : tile(tree.inputs_count * kTileImages),
          slots(tree.slots * kQueries * kTileImages),
          minimum(tree.outputs * kQueries),
          sums(tree.outputs * kQueries * kSumsOfQuery) {}
    AlignedArray<Stored> tile;
    AlignedArray<float> slots, minimum, sums;
  };

  void scan(std::size_t first, std::size_t last, Scratch& scratch, ScanState& state) const {
    const std::size_t queries = tree_.outputs * kQueries;
    std::fill_n(scratch.minimum.data(), queries, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sums.data(), queries * kSumsOfQuery, 0.0f);
    for (std::size_t image = first; image < last; image += kTileImages) {
      checkpoint_();
      const std::size_t count = std::min<std::size_t>(kTileImages, last - image);
      load_tile(images_ + image * dim_, count, dim_, scratch.tile.data());
      scan_tile(count, scratch);
    }
    std::size_t position = 0;
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.output == DifferenceTree::kSilent) continue;
      for (int b = 0; b < kQueries; ++b, ++position) {
        const std::size_t q = static_cast<std::size_t>(node.output) * kQueries + b;
        const float* sums = scratch.sums.data() + position * kSumsOfQuery;
        state.minimum[q] = scratch.minimum.data()[position];
        for (int k = 0; k < kLanes; ++k) {
          state.total[q] += sums[k];
          if (tree_.answered() == 1) state.weighted[q] += sums[kLanes + k];
        }
      }
    }
  }

  void scan_tile(std::size_t count, Scratch& scratch) const {
    const Stored* tile = scratch.tile.data();
    Vec floor[kTileVectors];
    missing_images(count, floor);
    const bool partial = count < static_cast<std::size_t>(kTileImages);
    const std::size_t answered = tree_.answered();
    Sums sums;
    float* minimum = scratch.minimum.data();
    float* lanes = scratch.sums.data();
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.from == DifferenceTree::kFromEmpty) {
        for (int b = 0; b < kQueries; ++b) {
          for (int i = 0; i < kTileVectors; ++i) sums[b][i] = zero();
        }
      } else if (node.from != DifferenceTree::kFromLast) {
        recall(scratch.slots.data() + static_cast<std::size_t>(node.from) * kSlot, sums);
      }
      const std::uint32_t* inputs = tree_.inputs.data() + node.begin;
      accumulate<true>(tile, inputs, node.plus, sums);
      accumulate<false>(tile, inputs + node.plus, node.minus, sums);
      if (node.keep != DifferenceTree::kNowhere) {
        keep(sums, scratch.slots.data() + static_cast<std::size_t>(node.keep) * kSlot);
      }
      if (node.output == DifferenceTree::kSilent) continue;
      const Stored* values = tile + answered * static_cast<std::size_t>(node.output) * kTileImages;
      for (int b = 0; b < kQueries; ++b, ++minimum, lanes += kSumsOfQuery) {
        Vec distance[kTileVectors];
        for (int i = 0; i < kTileVectors; ++i) {
          distance[i] = partial ? max(sums[b][i], floor[i]) : sums[b][i];
        }
        take_in(distance, scale_[b], reach_[b], values, 0, answered, minimum, lanes);
      }
    }
  }

  static constexpr std::size_t kSlot = kQueries * kTileImages;

  static void keep(const Sums& sums, float* slot) {
    for (int b = 0; b < kQueries; ++b) {
      for (int i = 0; i < kTileVectors; ++i) {
        store(slot + (b * kTileVectors + i) * kLanes, sums[b][i]);
      }
    }
  }

  static void recall(const float* slot, Sums& sums) {
    for (int b = 0; b < kQueries; ++b) {
      for (int i = 0; i < kTileVectors; ++i) {
        sums[b][i] = load(slot + (b * kTileVectors + i) * kLanes);
      }
    }
  }

  // Adds or subtracts the squared differences at some inputs, or what stands for them where both
  // sides count from a centre.
  template <bool kPlus>
  void accumulate(const Stored* tile, const std::uint32_t* inputs, std::size_t count,
                  Sums& sums) const {
    if (count == 0) return;
    // A copy element by element: the compiler keeps it in registers.
    Sums local;
#pragma GCC unroll 8
    for (int b = 0; b < kQueries; ++b) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) local[b][i] = sums[b][i];
    }
    for (const std::uint32_t* input = inputs; input != inputs + count; ++input) {
      const Stored* values = tile + std::size_t{*input} * kTileImages;
      const float* noisy = noisy_.data() + std::size_t{*input} * kQueries;
      Vec value[kTileVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) value[i] = load(values + i * kLanes);
      if constexpr (kCentred) {
        const Vec centre = broadcast(centre_[*input]);
#pragma GCC unroll 8
        for (int i = 0; i < kTileVectors; ++i) value[i] = sub(value[i], centre);
      }
#pragma GCC unroll 8
      for (int b = 0; b < kQueries; ++b) {
        const Vec target = broadcast(noisy[b]);
#pragma GCC unroll 8
        for (int i = 0; i < kTileVectors; ++i) {
          const Vec gap = sub(value[i], target);
          const Vec factor = kCentred ? value[i] : gap;
          local[b][i] = kPlus ? multiply_add(factor, gap, local[b][i])
                              : multiply_sub(factor, gap, local[b][i]);
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < kQueries; ++b) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) sums[b][i] = local[b][i];
    }
  }

  const DifferenceTree& tree_;
  const Stored* images_;
  const Segments& segments_;
  const std::size_t dim_;
  const float* centre_;
  const Checkpoint& checkpoint_;
  AlignedArray<float> noisy_;
  float scale_[kQueries], reach_[kQueries];
};

template <typename Stored, int kQueries, bool kCentred>
void masked_group(const DifferenceTree& tree, const Stored* images, std::size_t count,
                  const NoisyBatch& batch, std::size_t first_query, const ScanResult& result,
                  std::size_t threads, const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages);
  const ScanState state =
      MaskedScan<Stored, kQueries, kCentred>(tree, images, segments, batch, first_query, checkpoint)
          .run(threads);
  std::vector<double> left_out(tree.outputs);
  for (std::size_t b = 0; b < kQueries; ++b) {
    if constexpr (kCentred) {
      left_out = squares_over_masks(tree, batch.noisy + (first_query + b) * tree.inputs_count,
                                    batch.centre);
    }
    for (std::size_t m = 0; m < tree.outputs; ++m) {
      const std::size_t from = m * kQueries + b, to = (first_query + b) * tree.outputs + m;
      result.minimum[to] = state.minimum[from] + left_out[m];
      result.total[to] = state.total[from];
      if (tree.answered() == 1) result.weighted[to] = state.weighted[from];
    }
  }
}

// Groups of queries that fill the registers, then smaller ones for the rest.
template <typename Stored, bool kCentred>
void masked_groups(const DifferenceTree& tree, const Stored* images, std::size_t count,
                   const NoisyBatch& batch, const ScanResult& result, std::size_t threads,
                   const Checkpoint& checkpoint) {
  std::size_t first = 0;
  const auto run = [&](auto group) {
    constexpr int kQueries = decltype(group)::value;
    for (; batch.batch - first >= kQueries; first += kQueries) {
      masked_group<Stored, kQueries, kCentred>(tree, images, count, batch, first, result, threads,
                                               checkpoint);
    }
  };
  run(std::integral_constant<int, 8>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

template <typename Stored>
void masked_posterior(const DifferenceTree& tree, const Stored* images, std::size_t count,
                      const NoisyBatch& batch, const ScanResult& result, std::size_t threads,
                      const Checkpoint& checkpoint) {
  if (batch.centre != nullptr) {
    masked_groups<Stored, true>(tree, images, count, batch, result, threads, checkpoint);
  } else {
    masked_groups<Stored, false>(tree, images, count, batch, result, threads, checkpoint);
  }
}
