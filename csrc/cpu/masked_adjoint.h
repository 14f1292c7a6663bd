#pragma once

#include <cstddef>
#include <functional>

#include "cpu_features.h"
#include "difference_tree.h"
#include "posterior.h"

namespace pyflocality {

// What a scan found, and what its weights are multiplied by.
//
//   minimum, total   [batch, outputs], of masked_posterior over all images
//   cotangents       g [batch, count, outputs], or null for the weights alone, and then
//   mean             posterior means [batch, outputs]
//   base             what values are counted from, [batch, inputs]
struct MaskedWeights {
  const double* minimum;
  const double* total;
  const float* cotangents;
  std::size_t count;
  const float* mean;
  const float* base;

  // Sums of a noisy image.
  std::size_t sums() const { return cotangents == nullptr ? 1 : count; }
};

// Spreads posterior weights over masks. With p[b, m, i] the weight of image i for output m, from
// the same distances over the masks of `tree` as those of the scan, and R_m the masks of `answers`,
//
//   sums[b, k, d] = sum_i (sum over the m with d in R_m of a[b, k, m, i]) image[i, d]
//
// where a = p without cotangents and, with them, where there is an output for every input,
//
//   a[b, k, m, i] = p[b, m, i] g[b, k, m] (image[i, m] - mean[b, m])
//
// with image[i, d] counted from the base, which changes rounding alone: the a[b, k, m, i] of an
// output sum to 0. Images in which no output has any weight cost their distances only.
//
// batch.centre must be that of the scan. sums: [batch, count, inputs], or [batch, inputs] without
// cotangents. A noisy image's results do not depend on the others of its batch, nor on the number
// of threads. checkpoint is called on the calling thread now and then and may throw.
void masked_adjoint(const DifferenceTree& tree, const DifferenceTree& answers,
                    const StoredImages& images, const NoisyBatch& batch,
                    const MaskedWeights& weights, double* sums, std::size_t threads,
                    InstructionSet isa, const std::function<void()>& checkpoint);

}  // namespace pyflocality
