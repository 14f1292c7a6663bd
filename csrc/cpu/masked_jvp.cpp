// Posterior means over masks and their Jacobian-vector products.
//
// As masked_posterior.cpp walks the difference tree with the distances of a group of noisy images,
// this walks it with the distance of one noisy image and the inner products of a group of
// tangents, which are sums over the same inputs.

#include "masked_jvp.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "masked_jvp_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void masked_posterior_jvp(const DifferenceTree& tree, const StoredImages& images,
                          const NoisyBatch& batch, const Tangents& tangents,
                          const ScanResult& result, std::size_t threads, InstructionSet isa,
                          const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, masked_posterior_jvp, tree, images.bytes, images.count, batch,
                         tangents, result, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, masked_posterior_jvp, tree, images.floats, images.count, batch,
                         tangents, result, threads, check);
  }
}

}  // namespace pyflocality
