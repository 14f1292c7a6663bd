#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu_features.h"
#include "difference_tree.h"
#include "posterior.h"

namespace pyflocality {

// Posterior over the images for every output value m and noisy image b, from the squared
// distances over the inputs of m's mask:
//
//   e[b, m, i] = sum_{d in M_m} (noisy[b, d] - image[i, d])^2
//
// gives minimum = min_i e, total = sum_i 2^(-scale (e - minimum)) and
// weighted = sum_i 2^(-scale (e - minimum)) image[i, m]. Where there is not one output for every
// input, there are no values: minimum and total alone.
//
// With a centre c the scan sums (image - c) (image - c - 2 (noisy - c)), which differs from the
// squared difference by (noisy - c)^2 alone: nothing that depends on the image. Where noise is
// much larger than the images these terms are much smaller than the squares, and so are their
// rounding errors; where it is much smaller the squares of the nearest images are. The minimum is
// that of e in both cases.
//
// A noisy image's results do not depend on the others of its batch, nor on the number of threads.
// checkpoint is called on the calling thread now and then and may throw.
void masked_posterior(const DifferenceTree& tree, const StoredImages& images,
                      const NoisyBatch& batch, const ScanResult& result, std::size_t threads,
                      InstructionSet isa, const std::function<void()>& checkpoint);

}  // namespace pyflocality
