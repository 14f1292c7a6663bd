// One compilation of the masked posterior's scan with tangents, for the instruction set around it.

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
    const MaskedJvp& scan;
    TileRoom<Stored> tile{scan.pass_, 1, false};
    AlignedArray<float> slots{scan.tree_.slots * Terms::kSums * kTileImages};
    AlignedArray<float> minimum{scan.tree_.outputs}, nearest{scan.tree_.outputs * Terms::kSums};
    AlignedArray<float> sums{scan.tree_.outputs * kSumsOfQuery};
  };

  Scratch scratch() const { return {*this}; }
  ScanState state() const { return {tree_.outputs, kValues, kTangents}; }
  double scale(std::size_t) const { return scale_; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    const std::size_t outputs = tree_.outputs;
    std::fill_n(scratch.minimum.data(), outputs, std::numeric_limits<float>::infinity());
    std::fill_n(scratch.nearest.data(), outputs * Terms::kSums, 0.0f);
    std::fill_n(scratch.sums.data(), outputs * kSumsOfQuery, 0.0f);
    for_each_tile(pass_, first, last, 1, scratch.tile,
                  [&](std::size_t, const ImageTile<Stored>& tile) {
                    pass_.checkpoint();
                    scan_tile(tile.images, tile.number, scratch);
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
    const std::size_t own = tree_.answers[output];
    const Vec centre = broadcast(of_inputs_.data()[own * Terms::kOfInput + 1]);
    for (int i = 0; i < kTileVectors; ++i) {
      value[i] = sub(load(tile + own * kTileImages + i * kLanes), centre);
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
