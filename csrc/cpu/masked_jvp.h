#pragma once

#include <cstddef>
#include <functional>

#include "cpu_features.h"
#include "difference_tree.h"
#include "posterior.h"
#include "posterior_jvp.h"

namespace pyflocality {

// Posterior over masks, as masked_posterior(), with tangents.
// posterior_jvp.h says what the result holds.
//
// Distances are counted from the tangents' centre too, as masked_posterior.h says: from the noisy
// image itself they are sums of squares. Of the results only v is: c counts from zero, so that
// results over parts of the images can be joined whatever their centres.
//
// A noisy image's results do not depend on the others of its batch, nor on the number of threads,
// and a tangent's not on the other tangents. checkpoint is called on the calling thread now and
// then and may throw.
void masked_posterior_jvp(const DifferenceTree& tree, const StoredImages& images,
                          const NoisyBatch& batch, const Tangents& tangents,
                          const ScanResult& result, std::size_t threads, InstructionSet isa,
                          const std::function<void()>& checkpoint);

}  // namespace pyflocality
