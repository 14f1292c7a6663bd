// One compilation of the spread of weights over masks, for the instruction set around it.

#include "simd/posterior.h"

template <typename Stored, bool kCentred>
class MaskedAdjoint {
 public:
  MaskedAdjoint(const DifferenceTree& tree, const DifferenceTree& answers, const Stored* images,
                const Segments& segments, const NoisyBatch& batch, const MaskedWeights& weights,
                const Checkpoint& checkpoint)
      : tree_(tree),
        answers_(answers),
        images_(images),
        segments_(segments),
        batch_(batch),
        weights_(weights),
        dim_(tree.inputs_count),
        checkpoint_(checkpoint),
        targets_(batch.batch * dim_),
        minimum_(batch.batch * tree.outputs) {
    // What the scan subtracts from the values, and its minima: as it computes them, to the bit.
    for (std::size_t b = 0; b < batch.batch; ++b) {
      const float* row = batch.noisy + b * dim_;
      for (std::size_t d = 0; d < dim_; ++d) {
        targets_[b * dim_ + d] = kCentred ? 2.0f * (row[d] - batch.centre[d]) : row[d];
      }
      std::vector<double> left_out(tree.outputs);
      if constexpr (kCentred) left_out = squares_over_masks(tree, row, batch.centre);
      for (std::size_t m = 0; m < tree.outputs; ++m) {
        const std::size_t q = b * tree.outputs + m;
        minimum_[q] = static_cast<float>(weights.minimum[q] - left_out[m]);
      }
    }
  }

  // A state whose minimum and total are of no meaning.
  ScanState run(std::size_t threads) const {
    return scan_segments<Scratch>(
        segments_, threads, batch_.batch * weights_.sums(), dim_,
        [&] { return std::make_unique<Scratch>(tree_, answers_, batch_.batch * weights_.sums()); },
        [&](std::size_t segment, Scratch& scratch, ScanState& state) {
          scan(segments_.first(segment), segments_.last(segment), scratch, state);
        },
        [](std::size_t) { return 1.0; });
  }

 private:
  using Tile = Vec[kTileVectors];
  // Tiles at hand: a noisy image's sums, which are many, are fetched once for all of them.
  static constexpr std::size_t kTiles = 4;

  struct Scratch {
    Scratch(const DifferenceTree& tree, const DifferenceTree& answers, std::size_t sets)
        : tiles(kTiles * tree.inputs_count * kTileImages),
          weights(tree.outputs * kTileImages),
          factors(tree.inputs_count * kTileImages),
          slots(std::max(tree.slots, answers.slots) * kTileImages),
          sums(sets * tree.inputs_count * kLanes),
          matters(tree.outputs),
          live(answers.slots) {}
    AlignedArray<Stored> tiles;
    AlignedArray<float> weights, factors, slots, sums;
    AlignedArray<bool> matters;  // outputs whose weights are not all zero
    AlignedArray<bool> live;     // slots that hold factors
  };

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.sums.data(), batch_.batch * weights_.sums() * dim_ * kLanes, 0.0f);
    std::fill_n(scratch.live.data(), answers_.slots, false);
    for (std::size_t group = first; group < last; group += kTiles * kTileImages) {
      const std::size_t end = std::min(group + kTiles * kTileImages, last);
      for (std::size_t image = group; image < end; image += kTileImages) {
        load_tile(images_ + image * dim_, std::min<std::size_t>(kTileImages, end - image), dim_,
                  scratch.tiles.data() + (image - group) * dim_);
      }
      for (std::size_t b = 0; b < batch_.batch; ++b) {
        for (std::size_t image = group; image < end; image += kTileImages) {
          checkpoint_();
          add_tile(b, scratch.tiles.data() + (image - group) * dim_,
                   std::min<std::size_t>(kTileImages, end - image), scratch);
        }
      }
    }
    std::fill(state.minimum.begin(), state.minimum.end(), 0.0f);
    const float* lanes = scratch.sums.data();
    for (double& sum : state.weighted) {
      for (int k = 0; k < kLanes; ++k) sum += *lanes++;
    }
  }

  void add_tile(std::size_t b, const Stored* tile, std::size_t count,
                const Scratch& scratch) const {
    if (!weigh_outputs(b, tile, count, scratch)) return;
    for (std::size_t k = 0; k < weights_.sums(); ++k) {
      gather(b, b * weights_.sums() + k, tile, scratch);
      add_values(b, b * weights_.sums() + k, tile, scratch);
    }
  }

  // Posterior weights of a tile's images for every output; false where none of them matters.
  bool weigh_outputs(std::size_t b, const Stored* tile, std::size_t count,
                     const Scratch& scratch) const {
    Tile floor, sum;
    missing_images(count, floor);
    const float scale = batch_.scale[b], reach = negligible_power(segments_.count) / scale;
    bool any = false;
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.from == DifferenceTree::kFromEmpty) {
        for (int i = 0; i < kTileVectors; ++i) sum[i] = zero();
      } else if (node.from != DifferenceTree::kFromLast) {
        load_sums(scratch.slots.data() + static_cast<std::size_t>(node.from) * kTileImages, sum);
      }
      const std::uint32_t* inputs = tree_.inputs.data() + node.begin;
      accumulate<true>(b, tile, inputs, node.plus, sum);
      accumulate<false>(b, tile, inputs + node.plus, node.minus, sum);
      if (node.keep != DifferenceTree::kNowhere) {
        store_sums(sum, scratch.slots.data() + static_cast<std::size_t>(node.keep) * kTileImages);
      }
      if (node.output == DifferenceTree::kSilent) continue;
      const auto output = static_cast<std::size_t>(node.output);
      const float minimum = minimum_[b * tree_.outputs + output];
      Tile distance;
      Vec lowest = max(sum[0], floor[0]);
      for (int i = 0; i < kTileVectors; ++i) {
        distance[i] = max(sum[i], floor[i]);
        lowest = min(lowest, distance[i]);
      }
      const bool matters = any_at_most(lowest, broadcast(minimum + reach));
      scratch.matters.data()[output] = matters;
      if (!matters) continue;
      any = true;
      const auto inverse = static_cast<float>(1.0 / weights_.total[b * tree_.outputs + output]);
      for (int i = 0; i < kTileVectors; ++i) {
        // No distance lies below the minimum but by rounding.
        const Vec gap = max(sub(distance[i], broadcast(minimum)), zero());
        distance[i] = mul(exp2_of_negative(mul(gap, broadcast(-scale))), broadcast(inverse));
      }
      store_sums(distance, scratch.weights.data() + output * kTileImages);
    }
    return any;
  }

  // The scan's arithmetic for one noisy image.
  template <bool kPlus>
  void accumulate(std::size_t b, const Stored* tile, const std::uint32_t* inputs, std::size_t count,
                  Tile& sum) const {
    const float* targets = targets_.data() + b * dim_;
    for (const std::uint32_t* input = inputs; input != inputs + count; ++input) {
      const Stored* values = tile + std::size_t{*input} * kTileImages;
      const Vec target = broadcast(targets[*input]);
      for (int i = 0; i < kTileVectors; ++i) {
        Vec value = load(values + i * kLanes);
        if constexpr (kCentred) value = sub(value, broadcast(batch_.centre[*input]));
        const Vec gap = sub(value, target);
        const Vec factor = kCentred ? value : gap;
        sum[i] = kPlus ? multiply_add(factor, gap, sum[i]) : multiply_sub(factor, gap, sum[i]);
      }
    }
  }

  // Factors of all inputs of a tile, by the tree of the answers from its last node to its first.
  void gather(std::size_t b, std::size_t set, const Stored* tile, const Scratch& scratch) const {
    std::fill_n(scratch.factors.data(), dim_ * kTileImages, 0.0f);
    Tile sum;
    bool live = false;  // whether there is anything but zero in it
    // The node behind a node continues its sum, or does not.
    bool continues = false;
    for (auto node = answers_.nodes.rbegin(); node != answers_.nodes.rend(); ++node) {
      live = live && continues;
      const auto take_in = [&](const Tile& terms) {
        for (int i = 0; i < kTileVectors; ++i) sum[i] = live ? add(sum[i], terms[i]) : terms[i];
        live = true;
      };
      if (node->keep != DifferenceTree::kNowhere) {
        const auto slot = static_cast<std::size_t>(node->keep);
        if (scratch.live.data()[slot]) {
          Tile kept;
          load_sums(scratch.slots.data() + slot * kTileImages, kept);
          take_in(kept);
          scratch.live.data()[slot] = false;
        }
      }
      if (node->output != DifferenceTree::kSilent &&
          scratch.matters.data()[static_cast<std::size_t>(node->output)]) {
        Tile own;
        factor(b, set, static_cast<std::size_t>(node->output), tile, scratch, own);
        take_in(own);
      }
      continues = node->from == DifferenceTree::kFromLast;
      if (!live) continue;
      hand_out(*node, sum, scratch);
      if (node->from >= 0) {
        const auto slot = static_cast<std::size_t>(node->from);
        float* place = scratch.slots.data() + slot * kTileImages;
        if (scratch.live.data()[slot]) {
          Tile kept;
          load_sums(place, kept);
          take_in(kept);
        }
        store_sums(sum, place);
        scratch.live.data()[slot] = true;
      }
    }
  }

  // The factor of an output: its weights, or these times what a cotangent makes of its value.
  void factor(std::size_t b, std::size_t set, std::size_t output, const Stored* tile,
              const Scratch& scratch, Tile& result) const {
    load_sums(scratch.weights.data() + output * kTileImages, result);
    if (weights_.cotangents == nullptr) return;
    const Vec cotangent = broadcast(weights_.cotangents[set * tree_.outputs + output]);
    const Vec mean = broadcast(weights_.mean[b * tree_.outputs + output]);
    for (int i = 0; i < kTileVectors; ++i) {
      const Vec gap = sub(load(tile + output * kTileImages + i * kLanes), mean);
      result[i] = mul(result[i], mul(cotangent, gap));
    }
  }

  void hand_out(const DifferenceTree::Node& node, const Tile& sum, const Scratch& scratch) const {
    const std::uint32_t* inputs = answers_.inputs.data() + node.begin;
    const std::uint32_t* minus = inputs + node.plus;
    for (const std::uint32_t* input = inputs; input != minus; ++input) {
      float* place = scratch.factors.data() + std::size_t{*input} * kTileImages;
      for (int i = 0; i < kTileVectors; ++i) {
        store(place + i * kLanes, add(load(place + i * kLanes), sum[i]));
      }
    }
    for (const std::uint32_t* input = minus; input != minus + node.minus; ++input) {
      float* place = scratch.factors.data() + std::size_t{*input} * kTileImages;
      for (int i = 0; i < kTileVectors; ++i) {
        store(place + i * kLanes, sub(load(place + i * kLanes), sum[i]));
      }
    }
  }

  // Adds the values of a tile's images under the factors of the inputs.
  void add_values(std::size_t b, std::size_t set, const Stored* tile,
                  const Scratch& scratch) const {
    for (std::size_t d = 0; d < dim_; ++d) {
      Tile factors, value;
      load_sums(scratch.factors.data() + d * kTileImages, factors);
      for (int i = 0; i < kTileVectors; ++i) value[i] = load(tile + d * kTileImages + i * kLanes);
      if (weights_.cotangents != nullptr) {
        const Vec base = broadcast(weights_.base[b * dim_ + d]);
        for (int i = 0; i < kTileVectors; ++i) value[i] = sub(value[i], base);
      }
      add_products(factors, value, scratch.sums.data() + (set * dim_ + d) * kLanes);
    }
  }

  static void load_sums(const float* from, Tile& sums) {
    for (int i = 0; i < kTileVectors; ++i) sums[i] = load(from + i * kLanes);
  }

  static void store_sums(const Tile& sums, float* to) {
    for (int i = 0; i < kTileVectors; ++i) store(to + i * kLanes, sums[i]);
  }

  const DifferenceTree& tree_;
  const DifferenceTree& answers_;
  const Stored* images_;
  const Segments& segments_;
  const NoisyBatch& batch_;
  const MaskedWeights& weights_;
  const std::size_t dim_;
  const Checkpoint& checkpoint_;
  std::vector<float> targets_, minimum_;
};

template <typename Stored>
void masked_adjoint(const DifferenceTree& tree, const DifferenceTree& answers, const Stored* images,
                    std::size_t count, const NoisyBatch& batch, const MaskedWeights& weights,
                    double* sums, std::size_t threads, const Checkpoint& checkpoint) {
  const Segments segments(count, kTileImages);
  const auto run = [&](const auto& adjoint) {
    const ScanState state = adjoint.run(threads);
    std::copy(state.weighted.begin(), state.weighted.end(), sums);
  };
  if (batch.centre != nullptr) {
    run(MaskedAdjoint<Stored, true>(tree, answers, images, segments, batch, weights, checkpoint));
  } else {
    run(MaskedAdjoint<Stored, false>(tree, answers, images, segments, batch, weights, checkpoint));
  }
}
