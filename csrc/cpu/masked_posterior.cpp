// Posterior means over masks, with sums of squared differences taken along a difference tree.
//
// A tile of images is turned so that images lie side by side, one register lane each. Walking the
// tree, the sums of a group of queries stay in registers: every input that is added or removed
// costs a load and one multiply-add for each query. At every output the sums are distances, and
// are taken into the output's online softmax at once; no distance is ever stored.

#include "masked_posterior.h"

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

#define PYFLOCALITY_KERNEL "masked_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void masked_posterior(const DifferenceTree& tree, const StoredImages& images,
                      const NoisyBatch& batch, const ScanResult& result, std::size_t threads,
                      InstructionSet isa, const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, masked_posterior, tree, images.bytes, images.count, batch, result,
                         threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, masked_posterior, tree, images.floats, images.count, batch, result,
                         threads, check);
  }
}

}  // namespace pyflocality
