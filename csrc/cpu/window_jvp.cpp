// Posterior means over square windows and their Jacobian-vector products.
//
// For a tile of images and one noisy image, first the weights of all pixels, from the distances as
// in window_posterior.cpp; then tangent by tangent the inner products, which are window sums like
// the distances, so that few planes are in work at a time.

#include "window_jvp.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "window_jvp_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void window_posterior_jvp(const WindowShape& shape, const StoredImages& images,
                          const NoisyBatch& batch, const Tangents& tangents,
                          const ScanResult& result, std::size_t threads, InstructionSet isa,
                          const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, window_posterior_jvp, shape, images.bytes, images.count, batch,
                         tangents, result, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, window_posterior_jvp, shape, images.floats, images.count, batch,
                         tangents, result, threads, check);
  }
}

}  // namespace pyflocality
