// Sums over masks of tiles of images, along a difference tree. Included by kernel files after
// simd/image_tile.h.

#include "simd/tree_walk.h"

// Terms of squared differences to kBatch noisy images, or what stands for them where both sides
// count from a centre: masked_posterior.h says why.
//
//   targets  [inputs, kBatch]: the noisy values, or twice their distance from the centre
template <int kBatch, bool kCentred>
struct GapTerms {
  static constexpr int kSums = kBatch;

  template <bool kPlus>
  void add(std::size_t input, Vec (&value)[kTileVectors], Vec (&sums)[kSums][kTileVectors]) const {
    if constexpr (kCentred) {
      const Vec origin = broadcast(centre[input]);
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) value[i] = sub(value[i], origin);
    }
    const float* target_of = targets + input * kBatch;
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) {
      const Vec target = broadcast(target_of[b]);
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) {
        const Vec gap = sub(value[i], target);
        const Vec factor = kCentred ? value[i] : gap;
        sums[b][i] =
            kPlus ? multiply_add(factor, gap, sums[b][i]) : multiply_sub(factor, gap, sums[b][i]);
      }
    }
  }

  const float* targets;
  const float* centre;
};

// A noisy image as GapTerms takes it, its values `stride` apart.
template <bool kCentred, typename Stored>
inline void fill_targets(const TypedPass<Stored>& pass, std::size_t noisy, std::size_t stride,
                         float* targets) {
  const float* image = pass.batch.noisy + noisy * pass.dim;
  for (std::size_t d = 0; d < pass.dim; ++d) {
    targets[d * stride] = kCentred ? 2.0f * (image[d] - pass.batch.centre[d]) : image[d];
  }
}

// Terms of the centred distance to one noisy image and of the products with kTangents tangents.
//
//   of_inputs  [inputs, kOfInput]: twice the noisy value from the centre, the centre, tangents
template <int kTangents>
struct TangentTerms {
  static constexpr int kSums = 1 + kTangents;
  static constexpr std::size_t kOfInput = 2 + kTangents;

  template <bool kPlus>
  void add(std::size_t input, Vec (&value)[kTileVectors], Vec (&sums)[kSums][kTileVectors]) const {
    const auto add_product = [](Vec a, Vec b, Vec sum) {
      return kPlus ? multiply_add(a, b, sum) : multiply_sub(a, b, sum);
    };
    const float* of_input = of_inputs + input * kOfInput;
    const Vec target = broadcast(of_input[0]), centre = broadcast(of_input[1]);
#pragma GCC unroll 8
    for (int i = 0; i < kTileVectors; ++i) {
      value[i] = sub(value[i], centre);
      sums[0][i] = add_product(value[i], sub(value[i], target), sums[0][i]);
    }
#pragma GCC unroll 16
    for (int k = 1; k < kSums; ++k) {
      const Vec tangent = broadcast(of_input[1 + k]);
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) {
        sums[k][i] = add_product(tangent, value[i], sums[k][i]);
      }
    }
  }

  const float* of_inputs;
};

// What walk() forms: the sums of a tile's terms over masks.
//
//   tile    [inputs, kTileImages]
//   slots   room for kSlot numbers of each slot of the tree
//   answer  answer(output, sums) for every output, in the order of the tree
template <typename Stored, typename Terms, typename Answer>
class TileSums {
 public:
  static constexpr int kSums = Terms::kSums;
  static constexpr std::size_t kSlot = kSums * kTileImages;
  using Sums = Vec[kSums][kTileVectors];

  TileSums(const Stored* tile, const Terms& terms, float* slots, const Answer& answer)
      : tile_(tile), terms_(terms), slots_(slots), answer_(answer) {}

  void clear() {
    for (int k = 0; k < kSums; ++k) {
      for (int i = 0; i < kTileVectors; ++i) sums_[k][i] = zero();
    }
  }

  void recall(std::size_t slot) {
    const float* from = slots_ + slot * kSlot;
    for (int k = 0; k < kSums; ++k, from += kTileImages) load_vectors(from, sums_[k]);
  }

  void keep(std::size_t slot) const {
    float* to = slots_ + slot * kSlot;
    for (int k = 0; k < kSums; ++k, to += kTileImages) store_vectors(to, sums_[k]);
  }

  template <bool kPlus>
  void accumulate(const std::uint32_t* inputs, std::size_t count) {
    if (count == 0) return;
    // A copy element by element: the compiler keeps it in registers.
    Sums local;
#pragma GCC unroll 16
    for (int k = 0; k < kSums; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) local[k][i] = sums_[k][i];
    }
    for (const std::uint32_t* input = inputs; input != inputs + count; ++input) {
      const Stored* values = tile_ + std::size_t{*input} * kTileImages;
      Vec value[kTileVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) value[i] = load(values + i * kLanes);
      terms_.template add<kPlus>(*input, value, local);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kSums; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileVectors; ++i) sums_[k][i] = local[k][i];
    }
  }

  void answer(std::size_t output) const { answer_(output, sums_); }

 private:
  const Stored* tile_;
  const Terms terms_;
  float* slots_;
  const Answer& answer_;
  Sums sums_;
};

// The sums of a tile's terms over all masks of a tree, one after another: answer(output, sums).
template <typename Stored, typename Terms, typename Answer>
inline void sum_over_masks(const DifferenceTree& tree, const Stored* tile, const Terms& terms,
                           float* slots, const Answer& answer) {
  TileSums<Stored, Terms, Answer> sums(tile, terms, slots, answer);
  walk(tree, sums);
}
