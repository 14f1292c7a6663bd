// Posterior means over whole images.
//
// Distances of a few images to a few noisy images at a time, so that what is read once serves
// several sums; then only the images that can matter beside the nearest one are added up.

#include "global_posterior.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "global_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void global_posterior(const StoredImages& images, const NoisyBatch& batch, const ScanResult& result,
                      std::size_t threads, InstructionSet isa,
                      const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, global_posterior, images.bytes, images.count, images.dim, batch,
                         result, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, global_posterior, images.floats, images.count, images.dim, batch,
                         result, threads, check);
  }
}

}  // namespace pyflocality
