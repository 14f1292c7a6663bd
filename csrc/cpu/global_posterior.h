#pragma once

#include <cstddef>
#include <functional>

#include "cpu_features.h"
#include "posterior.h"

namespace pyflocality {

// Posterior over the images for every noisy image b, from the squared distances over all values:
//
//   e[b, i] = sum_d (noisy[b, d] - image[i, d])^2
//
// gives minimum = min_i e [batch], total = sum_i 2^(-scale (e - minimum)) and
// weighted = sum_i 2^(-scale (e - minimum)) image[i] [batch, dim].
//
// A noisy image's results do not depend on the others of its batch, nor on the number of threads.
// checkpoint is called on the calling thread now and then and may throw.
void global_posterior(const StoredImages& images, const NoisyBatch& batch, const ScanResult& result,
                      std::size_t threads, InstructionSet isa,
                      const std::function<void()>& checkpoint);

}  // namespace pyflocality
