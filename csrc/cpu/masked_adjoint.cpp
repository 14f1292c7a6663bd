// Posterior weights spread over masks.
//
// For a tile of images, one register lane each, and one noisy image: distances along the
// difference tree as in masked_posterior.cpp become weights. Then the tree of the answers is
// walked backwards: a node gathers the factors of its own output and of all that begin with its
// sum, and hands them to the inputs that it adds, with the other sign to those that it subtracts.
// What has arrived at an input are the factors of all masks that hold it.

#include "masked_adjoint.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "masked_adjoint_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void masked_adjoint(const DifferenceTree& tree, const DifferenceTree& answers,
                    const StoredImages& images, const NoisyBatch& batch,
                    const MaskedWeights& weights, double* sums, std::size_t threads,
                    InstructionSet isa, const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, masked_adjoint, tree, answers, images.bytes, images.count, batch,
                         weights, sums, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, masked_adjoint, tree, answers, images.floats, images.count, batch,
                         weights, sums, threads, check);
  }
}

}  // namespace pyflocality
