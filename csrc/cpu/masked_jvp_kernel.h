// One compilation of the masked posterior with tangents, for the instruction set around it.

#include "simd/posterior.h"

// Scans for one noisy image and kTangents tangents; where fewer are left the rest are zero.
template <typename Stored, int kTangents>
class MaskedJvpScan {
 public:
  MaskedJvpScan(const DifferenceTree& tree, const Stored* images, const Segments& segments,
                const NoisyBatch& batch, const Tangents& tangents, std::size_t query,
                std::size_t first_tangent, const Checkpoint& checkpoint)
      : tree_(tree),
        images_(images),
        segments_(segments),
        dim_(tree.inputs_count),
        checkpoint_(checkpoint),
        inputs_(dim_ * kInput),
        scale_(batch.scale[query]),
        reach_(negligible_power(segments.count) / scale_) {
    std::fill_n(inputs_.data(), dim_ * kInput, 0.0f);
    const auto fill = [&](std::size_t place, const float* row) {
      for (std::size_t d = 0; d < dim_; ++d) inputs_.data()[d * kInput + place] = row[d];
    };
    const float* noisy = batch.noisy + query * dim_;
    const float* centre = tangents.centre + query * dim_;
    fill(1, centre);
    for (std::size_t d = 0; d < dim_; ++d) {
      inputs_.data()[d * kInput] = 2.0f * (noisy[d] - centre[d]);
    }
    const std::size_t last = std::min(tangents.count, first_tangent + kTangents);
    for (std::size_t k = first_tangent; k < last; ++k) {
      fill(2 + k - first_tangent, tangents.tangents + (query * tangents.count + k) * dim_);
    }
  }

  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, dim_, kValues,
        [&] { return std::make_unique<Scratch>(dim_, tree_.slots); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [&](std::size_t) { return scale_; }, kTangents);
  }

 private:
  // The distance and an inner product for each tangent.
  using Sums = Vec[1 + kTangents][kTileVectors];
  static constexpr std::size_t kSlot = (1 + kTangents) * kTileImages;
  // What belongs to an input: twice the noisy value from the centre, the centre, tangents.
  static constexpr std::size_t kInput = 2 + kTangents;
  static constexpr std::size_t kValues = 1 + 2 * kTangents;
  static constexpr std::size_t kSumsOfQuery = (1 + kValues) * kLanes;

  // What a thread works in; queries lie in the order the tree visits outputs. The sums of a query
  // are those of weights, of weighted values, and by tangent of c and c times the value, counted
  // from those of its nearest image: value, and c by tangent.
  struct Scratch {
    Scratch(std::size_t dim, std::size_t slots)
        : tile(dim * kTileImages),
          slots(slots * kSlot),
          minimum(dim),
          nearest(dim * (1 + kTangents)),
          sums(dim * kSumsOfQuery) {}
    AlignedArray<Stored> tile;
    AlignedArray<float> slots, minimum, nearest, sums;
  };

  void scan(std::size_t first, std::size_t last, Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), dim_, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.nearest.data(), dim_ * (1 + kTangents), 0.0f);
    std::fill_n(scratch.sums.data(), dim_ * kSumsOfQuery, 0.0f);
    for (std::size_t image = first; image < last; image += kTileImages) {
      checkpoint_();
      const std::size_t count = std::min<std::size_t>(kTileImages, last - image);
      load_tile(images_ + image * dim_, count, dim_, scratch.tile.data());
      scan_tile(count, scratch);
    }
    const float* minimum = scratch.minimum.data();
    const float* nearest = scratch.nearest.data();
    const float* sums = scratch.sums.data();
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.output == DifferenceTree::kSilent) continue;
      const auto q = static_cast<std::size_t>(node.output);
      double* weighted = state.weighted.data() + q * kValues;
      state.minimum[q] = *minimum++;
      for (int lane = 0; lane < kLanes; ++lane, ++sums) {
        state.total[q] += sums[0];
        weighted[0] += sums[kLanes];
        for (int k = 0; k < kTangents; ++k) {
          weighted[1 + k] += sums[(2 + 2 * k) * kLanes];
          weighted[1 + kTangents + k] += sums[(3 + 2 * k) * kLanes];
        }
      }
      sums += kSumsOfQuery - kLanes;
      count_from_means(
          state.total[q], 1, kTangents, weighted, [&](std::size_t) { return nearest[0]; },
          [&](std::size_t k) { return nearest[1 + k]; });
      nearest += 1 + kTangents;
    }
  }

  void scan_tile(std::size_t count, Scratch& scratch) const {
    const Stored* tile = scratch.tile.data();
    Vec floor[kTileVectors];
    missing_images(count, floor);
    Sums sums;
    float* minimum = scratch.minimum.data();
    float* nearest = scratch.nearest.data();
    float* lanes = scratch.sums.data();
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.from == DifferenceTree::kFromEmpty) {
        for (int k = 0; k <= kTangents; ++k) {
          for (int i = 0; i < kTileVectors; ++i) sums[k][i] = zero();
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
      take_in_output(tile, static_cast<std::size_t>(node.output), floor, sums, minimum, nearest,
                     lanes);
      ++minimum;
      nearest += 1 + kTangents;
      lanes += kSumsOfQuery;
    }
  }

  void take_in_output(const Stored* tile, std::size_t output, const Vec (&floor)[kTileVectors],
                      const Sums& sums, float* minimum, float* nearest, float* lanes) const {
    Vec distance[kTileVectors], weight[kTileVectors], value[kTileVectors];
    bool nearer = false;
    for (int i = 0; i < kTileVectors; ++i) distance[i] = max(sums[0][i], floor[i]);
    const auto decay = [&](Vec factor) {
      shrink(factor, 1 + kValues, lanes);
      nearer = true;
    };
    if (!weigh(distance, scale_, reach_, minimum, decay, weight)) return;
    const Vec centre = broadcast(inputs_.data()[output * kInput + 1]);
    for (int i = 0; i < kTileVectors; ++i) {
      value[i] = sub(load(tile + output * kTileImages + i * kLanes), centre);
    }
    if (nearer) count_from(image_at(distance, *minimum), value, sums, nearest, lanes);
    const Vec origin = broadcast(nearest[0]);
    for (int i = 0; i < kTileVectors; ++i) value[i] = sub(value[i], origin);
    add_terms(weight, lanes);
    add_products(weight, value, lanes + kLanes);
    for (int k = 1; k <= kTangents; ++k) {
      Vec inner[kTileVectors];
      const Vec start = broadcast(nearest[k]);
      for (int i = 0; i < kTileVectors; ++i) inner[i] = mul(weight[i], sub(sums[k][i], start));
      add_terms(inner, lanes + 2 * k * kLanes);
      add_products(inner, value, lanes + (2 * k + 1) * kLanes);
    }
  }

  // Counts the sums of a query from another image of a tile.
  static void count_from(int image, const Vec (&value)[kTileVectors], const Sums& sums,
                         float* nearest, float* lanes) {
    const float from = number_of(value, image), moved = nearest[0] - from;
    float* values = lanes + kLanes;
    for (int k = 1; k <= kTangents; ++k) {
      const float inner_from = number_of(sums[k], image), inner_moved = nearest[k] - inner_from;
      float* inner = lanes + 2 * k * kLanes;
      float* products = inner + kLanes;
      add_multiple(moved, inner, products);
      add_multiple(inner_moved, values, products);
      add_multiple(inner_moved * moved, lanes, products);
      add_multiple(inner_moved, lanes, inner);
      nearest[k] = inner_from;
    }
    add_multiple(moved, lanes, values);
    nearest[0] = from;
  }

  static void keep(const Sums& sums, float* slot) {
    for (int k = 0; k <= kTangents; ++k) {
      for (int i = 0; i < kTileVectors; ++i, slot += kLanes) store(slot, sums[k][i]);
    }
  }

  static void recall(const float* slot, Sums& sums) {
    for (int k = 0; k <= kTangents; ++k) {
      for (int i = 0; i < kTileVectors; ++i, slot += kLanes) sums[k][i] = load(slot);
    }
  }

  // Adds or subtracts the terms of some inputs: what stands for the squared difference, and the
  // products with the tangents.
  template <bool kPlus>
  void accumulate(const Stored* tile, const std::uint32_t* inputs, std::size_t count,
                  Sums& sums) const {
    if (count == 0) return;
    const auto add_product = [](Vec a, Vec b, Vec sum) {
      return kPlus ? multiply_add(a, b, sum) : multiply_sub(a, b, sum);
    };
    // A copy element by element: the compiler keeps it in registers.
    Sums local;
#pragma GCC unroll 16
    for (int k = 0; k <= kTangents; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) local[k][i] = sums[k][i];
    }
    for (const std::uint32_t* input = inputs; input != inputs + count; ++input) {
      const Stored* values = tile + std::size_t{*input} * kTileImages;
      const float* of_input = inputs_.data() + std::size_t{*input} * kInput;
      const Vec target = broadcast(of_input[0]), centre = broadcast(of_input[1]);
      Vec value[kTileVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) {
        value[i] = sub(load(values + i * kLanes), centre);
        local[0][i] = add_product(value[i], sub(value[i], target), local[0][i]);
      }
#pragma GCC unroll 16
      for (int k = 1; k <= kTangents; ++k) {
        const Vec tangent = broadcast(of_input[1 + k]);
#pragma GCC unroll 8
        for (int i = 0; i < kTileVectors; ++i) {
          local[k][i] = add_product(tangent, value[i], local[k][i]);
        }
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k <= kTangents; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) sums[k][i] = local[k][i];
    }
  }

  const DifferenceTree& tree_;
  const Stored* images_;
  const Segments& segments_;
  const std::size_t dim_;
  const Checkpoint& checkpoint_;
  AlignedArray<float> inputs_;
  const float scale_, reach_;
};

template <typename Stored, int kTangents>
void masked_jvp_group(const DifferenceTree& tree, const Stored* images, std::size_t count,
                      const NoisyBatch& batch, const Tangents& tangents, std::size_t query,
                      std::size_t first_tangent, const ScanResult& result, std::size_t threads,
                      const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages);
  const ScanState state = MaskedJvpScan<Stored, kTangents>(tree, images, segments, batch, tangents,
                                                           query, first_tangent, checkpoint)
                              .run(threads);
  const std::size_t dim = tree.inputs_count, sums = tangents.sums(1);
  const float* centre = tangents.centre + query * dim;
  const std::vector<double> left_out = squares_over_masks(tree, batch.noisy + query * dim, centre);
  for (std::size_t m = 0; m < tree.outputs; ++m) {
    const std::size_t to = query * tree.outputs + m;
    result.minimum[to] = state.minimum[m] + left_out[m];
    result.total[to] = state.total[m];
    result.weighted[to * sums] = state.weighted[m * (1 + 2 * kTangents)];
  }
  const std::size_t last = std::min(tangents.count, first_tangent + kTangents);
  std::vector<double> products(dim);
  for (std::size_t k = first_tangent; k < last; ++k) {
    const float* tangent = tangents.tangents + (query * tangents.count + k) * dim;
    for (std::size_t d = 0; d < dim; ++d) {
      products[d] = static_cast<double>(tangent[d]) * centre[d];
    }
    const std::vector<double> offset = sums_over_masks(tree, products);
    for (std::size_t m = 0; m < tree.outputs; ++m) {
      const double* from = state.weighted.data() + m * (1 + 2 * kTangents);
      const double* inner = from + 1 + (k - first_tangent);
      double* weighted = result.weighted + (query * tree.outputs + m) * sums;
      weighted[1 + k] = inner[0] + offset[m] * state.total[m];
      weighted[1 + tangents.count + k] = inner[kTangents];
    }
  }
}

// Groups of tangents that fill the registers, and smaller ones for the rest.
template <typename Stored>
void masked_posterior_jvp(const DifferenceTree& tree, const Stored* images, std::size_t count,
                          const NoisyBatch& batch, const Tangents& tangents,
                          const ScanResult& result, std::size_t threads,
                          const Checkpoint& checkpoint) {
  for (std::size_t b = 0; b < batch.batch; ++b) {
    std::size_t first = 0;
    const auto run = [&](auto group) {
      constexpr int kTangents = decltype(group)::value;
      masked_jvp_group<Stored, kTangents>(tree, images, count, batch, tangents, b, first, result,
                                          threads, checkpoint);
      first += kTangents;
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
