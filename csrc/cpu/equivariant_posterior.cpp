// Posterior means over the patches of all images at all positions.
//
// No patch is ever formed: for one displacement between query and patch, the squared differences
// of the whole images give the distances of all pairs by two passes of window sums, whatever the
// window. A displacement costs about as much as the window posterior does.

#include "equivariant_posterior.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "equivariant_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void equivariant_posterior(const WindowShape& shape, bool circular, const StoredImages& images,
                           const NoisyBatch& batch, const ScanResult& result, std::size_t threads,
                           InstructionSet isa, const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, equivariant_posterior, shape, circular, images.bytes, images.count,
                         batch, result, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, equivariant_posterior, shape, circular, images.floats, images.count,
                         batch, result, threads, check);
  }
}

}  // namespace pyflocality
