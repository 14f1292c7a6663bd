// One compilation of the masked posterior's second pass, for the instruction set around it.

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
        sums_of_set_(sums_of_set(pass, weights)),
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
    const MaskedVjp& vjp;
    TileRoom<Stored> tiles{vjp.pass_, kTilesAtHand};
    AlignedArray<float> weights{vjp.tree_.outputs * kTileImages};
    AlignedArray<float> factors{vjp.pass_.dim * kTileImages};
    AlignedArray<float> slots{std::max(vjp.tree_.slots, vjp.answers_.slots) * kTileImages};
    AlignedArray<float> sums{vjp.sets() * vjp.sums_of_set_ * kLanes};
    AlignedArray<bool> matters{vjp.tree_.outputs};  // outputs whose weights are not all zero
    AlignedArray<bool> live{vjp.answers_.slots};    // slots that hold factors
  };

  Scratch scratch() const { return {*this}; }
  ScanState state() const { return {sets(), sums_of_set_}; }
  double scale(std::size_t) const { return 1.0; }

  void scan(std::size_t first, std::size_t last, const Scratch& scratch, ScanState& state) const {
    std::fill_n(scratch.sums.data(), sets() * sums_of_set_ * kLanes, 0.0f);
    std::fill_n(scratch.live.data(), answers_.slots, false);
    for_each_tile(pass_, first, last, pass_.batch.count, scratch.tiles,
                  [&](std::size_t b, const ImageTile<Stored>& tile) {
                    pass_.checkpoint();
                    if (!weigh_outputs(b, tile, scratch)) return;
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
  bool weigh_outputs(std::size_t b, const ImageTile<Stored>& tile, const Scratch& scratch) const {
    Tile floor;
    missing_images(tile.number, floor);
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
    sum_over_masks(tree_, tile.images, GapTerms<1, kCentred>{targets, pass_.batch.centre},
                   scratch.slots.data(), answer);
    return any;
  }

  // What walk_back() hands out: the factors of an output's own values, to all inputs of its mask.
  class Factors {
   public:
    Factors(const MaskedVjp& vjp, std::size_t b, std::size_t set, const ImageTile<Stored>& tile,
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
    void hand_out(const std::uint32_t* inputs, std::size_t count) const {
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
    const ImageTile<Stored>& tile_;
    const Scratch& scratch_;
    Tile sum_;
    bool live_ = false;  // whether there is anything but zero in it
  };

  // Factors of all inputs of a tile.
  void gather_factors(std::size_t b, std::size_t set, const ImageTile<Stored>& tile,
                      const Scratch& scratch) const {
    std::fill_n(scratch.factors.data(), pass_.dim * kTileImages, 0.0f);
    Factors factors(*this, b, set, tile, scratch);
    walk_back(answers_, factors);
  }

  // The factor of an output: its weights, or these times what a cotangent makes of its value.
  void factor(std::size_t b, std::size_t set, std::size_t output, const ImageTile<Stored>& tile,
              const Scratch& scratch, Tile& result) const {
    load_vectors(scratch.weights.data() + output * kTileImages, result);
    if (weights_.cotangents == nullptr) return;
    const std::size_t own = tree_.answers[output], answered = pass_.values.answered();
    Tile products;
    for_each_answer(pass_, tile, own, [&](std::size_t a, const auto* values) {
      const Vec cotangent = broadcast(weights_.cotangents[(set * answered + a) * pass_.dim + own]);
      const Vec mean = broadcast(weights_.mean[(b * answered + a) * pass_.dim + own]);
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec product = mul(cotangent, sub(load(values + i * kLanes), mean));
        products[i] = a == 0 ? product : add(products[i], product);
      }
    });
    for (int i = 0; i < kTileVectors; ++i) result[i] = mul(result[i], products[i]);
  }

  // Adds the values of a tile's images under the factors of the inputs.
  void add_values(std::size_t b, std::size_t set, const ImageTile<Stored>& tile,
                  const Scratch& scratch) const {
    float* sums = scratch.sums.data() + set * sums_of_set_ * kLanes;
    for (std::size_t d = 0; d < pass_.dim; ++d) {
      Tile factors;
      load_vectors(scratch.factors.data() + d * kTileImages, factors);
      add_factored(pass_, weights_, b, d, factors, tile, sums);
    }
  }

  const TypedPass<Stored> pass_;
  const DifferenceTree& tree_;
  const DifferenceTree& answers_;
  const PosteriorWeights weights_;
  const std::size_t sums_of_set_;
  AlignedArray<float> targets_;
  std::vector<double> minimum_;
};
