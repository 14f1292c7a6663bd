// One compilation of the masked posterior's kernels, for the instruction set around it.

#include "simd/image_tile.h"
#include "simd/masks.h"

// A noisy image as GapTerms takes it, its values `stride` apart.
template <bool kCentred, typename Stored>
inline void fill_targets(const TypedPass<Stored>& pass, std::size_t noisy, std::size_t stride,
                         float* targets) {
  const float* image = pass.batch.noisy + noisy * pass.dim;
  for (std::size_t d = 0; d < pass.dim; ++d) {
    targets[d * stride] = kCentred ? 2.0f * (image[d] - pass.batch.centre[d]) : image[d];
  }
}

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
    explicit Scratch(const MaskedScan& scan)
        : tile(scan.pass_.dim * kTileImages),
          slots(scan.tree_.slots * kBatch * kTileImages),
          minimum(scan.queries()),
          sums(scan.queries() * kSumsOfQuery) {}
    AlignedArray<Stored> tile;
    AlignedArray<float> slots, minimum, sums;
  };

  ScanState state() const { return {queries(), tree_.answered()}; }
  double scale(std::size_t q) const { return scale_[q % kBatch]; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), queries(), std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sums.data(), queries() * kSumsOfQuery, 0.0f);
    for_each_tile(pass_, first, last, 1, 1, scratch.tile.data(),
                  [&](std::size_t, const Stored* tile, std::size_t number) {
                    pass_.checkpoint();
                    scan_tile(tile, number, scratch);
                  });
    const float* minimum = scratch.minimum.data();
    const float* sums = scratch.sums.data();
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.output == DifferenceTree::kSilent) continue;
      for (std::size_t b = 0; b < kBatch; ++b, sums += kSumsOfQuery) {
        const std::size_t q = static_cast<std::size_t>(node.output) * kBatch + b;
        state.minimum[q] = *minimum++;
        add_lanes(sums, state.total[q]);
        if (tree_.answered() == 1) add_lanes(sums + kLanes, state.weighted[q]);
      }
    }
  }

 private:
  static constexpr std::size_t kSumsOfQuery = 2 * kLanes;  // weights, weighted values

  std::size_t queries() const { return tree_.outputs * kBatch; }

  void scan_tile(const Stored* tile, std::size_t number, const Scratch& scratch) const {
    Vec floor[kTileVectors];
    missing_images(number, floor);
    const bool partial = number < static_cast<std::size_t>(kTileImages);
    const std::size_t answered = tree_.answered();
    float* minimum = scratch.minimum.data();
    float* lanes = scratch.sums.data();
    const auto answer = [&](std::size_t output, const Vec(&sums)[kBatch][kTileVectors]) {
      const Stored* values = tile + answered * output * kTileImages;
      for (int b = 0; b < kBatch; ++b, ++minimum, lanes += kSumsOfQuery) {
        Vec distance[kTileVectors];
        for (int i = 0; i < kTileVectors; ++i) {
          distance[i] = partial ? max(sums[b][i], floor[i]) : sums[b][i];
        }
        take_in(distance, scale_[b], reach_[b], values, 0, answered, minimum, lanes);
      }
    };
    sum_over_masks(tree_, tile, GapTerms<kBatch, kCentred>{targets_.data(), pass_.batch.centre},
                   scratch.slots.data(), answer);
  }

  const TypedPass<Stored> pass_;
  const DifferenceTree& tree_;
  AlignedArray<float> targets_;
  float scale_[kBatch], reach_[kBatch];
};

// Scans for one noisy image and kTangents tangents; where fewer are left the rest are zero.
template <typename Stored, int kTangents>
class MaskedJvp {
 public:
  static constexpr std::size_t kValues = 1 + 2 * kTangents;

  MaskedJvp(const TypedPass<Stored>& pass, const DifferenceTree& tree, const Tangents& tangents,
            std::size_t noisy, std::size_t first_tangent)
      : pass_(pass),
        tree_(tree),
        of_inputs_(pass.dim * Terms::kOfInput),
        scale_(pass.batch.scale[noisy]),
        reach_(pass.reach(noisy)) {
    const std::size_t dim = pass.dim, last = std::min(tangents.count, first_tangent + kTangents);
    const float* image = pass.batch.noisy + noisy * dim;
    const float* centre = tangents.centre + noisy * dim;
    for (std::size_t d = 0; d < dim; ++d) {
      float* place = of_inputs_.data() + d * Terms::kOfInput;
      std::fill_n(place, Terms::kOfInput, 0.0f);
      place[0] = 2.0f * (image[d] - centre[d]);
      place[1] = centre[d];
      for (std::size_t k = first_tangent; k < last; ++k) {
        place[2 + k - first_tangent] = tangents.tangents[(noisy * tangents.count + k) * dim + d];
      }
    }
  }

  // What a thread works in; queries lie in the order the tree visits outputs. The sums of a query
  // are those of weights, of weighted values, and by tangent of c and c times the value, counted
  // from those of its nearest image: value, and c by tangent.
  struct Scratch {
    explicit Scratch(const MaskedJvp& scan)
        : tile(scan.pass_.dim * kTileImages),
          slots(scan.tree_.slots * Terms::kSums * kTileImages),
          minimum(scan.pass_.dim),
          nearest(scan.pass_.dim * Terms::kSums),
          sums(scan.pass_.dim * kSumsOfQuery) {}
    AlignedArray<Stored> tile;
    AlignedArray<float> slots, minimum, nearest, sums;
  };

  ScanState state() const { return {pass_.dim, kValues, kTangents}; }
  double scale(std::size_t) const { return scale_; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.minimum.data(), pass_.dim, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.nearest.data(), pass_.dim * Terms::kSums, 0.0f);
    std::fill_n(scratch.sums.data(), pass_.dim * kSumsOfQuery, 0.0f);
    for_each_tile(pass_, first, last, 1, 1, scratch.tile.data(),
                  [&](std::size_t, const Stored* tile, std::size_t number) {
                    pass_.checkpoint();
                    scan_tile(tile, number, scratch);
                  });
    const float* minimum = scratch.minimum.data();
    const float* nearest = scratch.nearest.data();
    const float* sums = scratch.sums.data();
    for (const DifferenceTree::Node& node : tree_.nodes) {
      if (node.output == DifferenceTree::kSilent) continue;
      const auto q = static_cast<std::size_t>(node.output);
      double* weighted = state.weighted.data() + q * kValues;
      state.minimum[q] = *minimum++;
      add_lanes(sums, state.total[q]);
      add_lanes(sums + kLanes, weighted[0]);
      for (int k = 0; k < kTangents; ++k) {
        add_lanes(sums + (2 + 2 * k) * kLanes, weighted[1 + k]);
        add_lanes(sums + (3 + 2 * k) * kLanes, weighted[1 + kTangents + k]);
      }
      sums += kSumsOfQuery;
      count_from_means(
          state.total[q], 1, kTangents, weighted, [&](std::size_t) { return nearest[0]; },
          [&](std::size_t k) { return nearest[1 + k]; });
      nearest += Terms::kSums;
    }
  }

 private:
  using Terms = TangentTerms<kTangents>;
  // The distance and an inner product for each tangent.
  using Sums = Vec[Terms::kSums][kTileVectors];
  static constexpr std::size_t kSumsOfQuery = (1 + kValues) * kLanes;

  void scan_tile(const Stored* tile, std::size_t number, const Scratch& scratch) const {
    Vec floor[kTileVectors];
    missing_images(number, floor);
    float* minimum = scratch.minimum.data();
    float* nearest = scratch.nearest.data();
    float* lanes = scratch.sums.data();
    const auto answer = [&](std::size_t output, const Sums& sums) {
      take_in_output(tile, output, floor, sums, minimum, nearest, lanes);
      ++minimum;
      nearest += Terms::kSums;
      lanes += kSumsOfQuery;
    };
    sum_over_masks(tree_, tile, Terms{of_inputs_.data()}, scratch.slots.data(), answer);
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
    const Vec centre = broadcast(of_inputs_.data()[output * Terms::kOfInput + 1]);
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

  const TypedPass<Stored> pass_;
  const DifferenceTree& tree_;
  AlignedArray<float> of_inputs_;
  const float scale_, reach_;
};

// Applies posterior weights, or their derivative along cotangents, over the masks of `answers`.
template <typename Stored, bool kCentred>
class MaskedVjp {
 public:
  MaskedVjp(const TypedPass<Stored>& pass, const DifferenceTree& tree,
            const DifferenceTree& answers, const PosteriorWeights& weights)
      : pass_(pass),
        tree_(tree),
        answers_(answers),
        weights_(weights),
        targets_(pass.batch.count * pass.dim),
        minimum_(weights.minimum, weights.minimum + pass.batch.count * tree.outputs) {
    for (std::size_t b = 0; b < pass.batch.count; ++b) {
      fill_targets<kCentred>(pass, b, 1, targets_.data() + b * pass.dim);
      if constexpr (kCentred) {
        // The scan's own minimum, to the bit.
        const std::vector<double> left_out =
            squares_over_masks(tree, pass.batch.noisy + b * pass.dim, pass.batch.centre);
        for (std::size_t m = 0; m < tree.outputs; ++m) {
          minimum_[b * tree.outputs + m] -= left_out[m];
        }
      }
    }
  }

  struct Scratch {
    explicit Scratch(const MaskedVjp& vjp)
        : tiles(kTilesAtHand * vjp.pass_.dim * kTileImages),
          weights(vjp.tree_.outputs * kTileImages),
          factors(vjp.pass_.dim * kTileImages),
          slots(std::max(vjp.tree_.slots, vjp.answers_.slots) * kTileImages),
          sums(vjp.sets() * vjp.pass_.dim * kLanes),
          matters(vjp.tree_.outputs),
          live(vjp.answers_.slots) {}
    AlignedArray<Stored> tiles;
    AlignedArray<float> weights, factors, slots, sums;
    AlignedArray<bool> matters;  // outputs whose weights are not all zero
    AlignedArray<bool> live;     // slots that hold factors
  };

  ScanState state() const { return {sets(), pass_.dim}; }
  double scale(std::size_t) const { return 1.0; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.sums.data(), sets() * pass_.dim * kLanes, 0.0f);
    std::fill_n(scratch.live.data(), answers_.slots, false);
    for_each_tile(pass_, first, last, pass_.batch.count, kTilesAtHand, scratch.tiles.data(),
                  [&](std::size_t b, const Stored* tile, std::size_t number) {
                    pass_.checkpoint();
                    if (!weigh_outputs(b, tile, number, scratch)) return;
                    for (std::size_t k = 0; k < weights_.count; ++k) {
                      const std::size_t set = b * weights_.count + k;
                      gather_factors(b, set, tile, scratch);
                      add_values(b, set, tile, scratch);
                    }
                  });
    collect_sums(scratch.sums.data(), state);
  }

 private:
  using Tile = Vec[kTileVectors];

  std::size_t sets() const { return pass_.batch.count * weights_.count; }

  // Posterior weights of a tile's images for every output; false where none of them matters.
  bool weigh_outputs(std::size_t b, const Stored* tile, std::size_t number,
                     const Scratch& scratch) const {
    Tile floor;
    missing_images(number, floor);
    const float scale = pass_.batch.scale[b], reach = pass_.reach(b);
    bool any = false;
    const auto answer = [&](std::size_t output, const Vec(&sums)[1][kTileVectors]) {
      const std::size_t q = b * tree_.outputs + output;
      Tile weights;
      for (int i = 0; i < kTileVectors; ++i) weights[i] = max(sums[0][i], floor[i]);
      const bool matters = weigh_known(weights, scale, reach, minimum_[q], weights_.total[q]);
      scratch.matters.data()[output] = matters;
      if (!matters) return;
      any = true;
      store_vectors(scratch.weights.data() + output * kTileImages, weights);
    };
    const float* targets = targets_.data() + b * pass_.dim;
    sum_over_masks(tree_, tile, GapTerms<1, kCentred>{targets, pass_.batch.centre},
                   scratch.slots.data(), answer);
    return any;
  }

  // What walk_back() hands out: the factors of an output's own values, to all inputs of its mask.
  class Factors {
   public:
    Factors(const MaskedVjp& vjp, std::size_t b, std::size_t set, const Stored* tile,
            const Scratch& scratch)
        : vjp_(vjp), b_(b), set_(set), tile_(tile), scratch_(scratch) {}

    void clear() { live_ = false; }

    void gather(std::size_t output) {
      if (!scratch_.matters.data()[output]) return;
      Tile own;
      vjp_.factor(b_, set_, output, tile_, scratch_, own);
      take_in(own);
    }

    void recall(std::size_t slot) {
      if (!scratch_.live.data()[slot]) return;
      Tile passed;
      load_vectors(place(slot), passed);
      take_in(passed);
      scratch_.live.data()[slot] = false;
    }

    void pass(std::size_t slot) {
      if (!live_) return;
      recall(slot);
      store_vectors(place(slot), sum_);
      scratch_.live.data()[slot] = true;
    }

    template <bool kPlus>
    void spread(const std::uint32_t* inputs, std::size_t count) const {
      if (!live_) return;
      for (const std::uint32_t* input = inputs; input != inputs + count; ++input) {
        float* factors = scratch_.factors.data() + std::size_t{*input} * kTileImages;
        for (int i = 0; i < kTileVectors; ++i) {
          const Vec before = load(factors + i * kLanes);
          store(factors + i * kLanes, kPlus ? add(before, sum_[i]) : sub(before, sum_[i]));
        }
      }
    }

   private:
    float* place(std::size_t slot) const { return scratch_.slots.data() + slot * kTileImages; }

    void take_in(const Tile& terms) {
      for (int i = 0; i < kTileVectors; ++i) sum_[i] = live_ ? add(sum_[i], terms[i]) : terms[i];
      live_ = true;
    }

    const MaskedVjp& vjp_;
    const std::size_t b_, set_;
    const Stored* tile_;
    const Scratch& scratch_;
    Tile sum_;
    bool live_ = false;  // whether there is anything but zero in it
  };

  // Factors of all inputs of a tile.
  void gather_factors(std::size_t b, std::size_t set, const Stored* tile,
                      const Scratch& scratch) const {
    std::fill_n(scratch.factors.data(), pass_.dim * kTileImages, 0.0f);
    Factors factors(*this, b, set, tile, scratch);
    walk_back(answers_, factors);
  }

  // The factor of an output: its weights, or these times what a cotangent makes of its value.
  void factor(std::size_t b, std::size_t set, std::size_t output, const Stored* tile,
              const Scratch& scratch, Tile& result) const {
    load_vectors(scratch.weights.data() + output * kTileImages, result);
    if (weights_.cotangents == nullptr) return;
    const Vec cotangent = broadcast(weights_.cotangents[set * tree_.outputs + output]);
    const Vec mean = broadcast(weights_.mean[b * tree_.outputs + output]);
    for (int i = 0; i < kTileVectors; ++i) {
      const Vec gap = sub(load(tile + output * kTileImages + i * kLanes), mean);
      result[i] = mul(result[i], mul(cotangent, gap));
    }
  }

  // Adds the values of a tile's images under the factors of the inputs.
  void add_values(std::size_t b, std::size_t set, const Stored* tile,
                  const Scratch& scratch) const {
    const std::size_t dim = pass_.dim;
    for (std::size_t d = 0; d < dim; ++d) {
      Tile factors;
      load_vectors(scratch.factors.data() + d * kTileImages, factors);
      add_factored(weights_, b * dim + d, factors, tile + d * kTileImages,
                   scratch.sums.data() + (set * dim + d) * kLanes);
    }
  }

  const TypedPass<Stored> pass_;
  const DifferenceTree& tree_;
  const DifferenceTree& answers_;
  const PosteriorWeights weights_;
  AlignedArray<float> targets_;
  std::vector<double> minimum_;
};

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
        if (tree.answered() == 1) result.weighted[to] = state.weighted[from];
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
