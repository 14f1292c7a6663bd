// Posterior means over whole images and their Jacobian-vector products.
//
// Distances come first, as in global_posterior.cpp. Only the images that can matter beside the
// nearest one have their inner products with the tangents taken, several at a time, and are added
// up, several sums at a time.

#include "global_jvp.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "global_jvp_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void global_posterior_jvp(const StoredImages& images, const NoisyBatch& batch,
                          const Tangents& tangents, const ScanResult& result, std::size_t threads,
                          InstructionSet isa, const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, global_posterior_jvp, images.bytes, images.count, images.dim, batch,
                         tangents, result, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, global_posterior_jvp, images.floats, images.count, images.dim, batch,
                         tangents, result, threads, check);
  }
}

}  // namespace pyflocality
