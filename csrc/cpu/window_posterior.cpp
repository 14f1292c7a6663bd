// Posterior means over square windows.
//
// For a tile of images, one register lane each, and one noisy image: squared differences summed
// over the channels, window sums along the rows, then along the columns; every column's sums are
// distances and are taken into their pixel's online softmax at once.

#include "window_posterior.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "window_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void window_posterior(const WindowShape& shape, const StoredImages& images, const NoisyBatch& batch,
                      const ScanResult& result, std::size_t threads, InstructionSet isa,
                      const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, window_posterior, shape, images.bytes, images.count, batch, result,
                         threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, window_posterior, shape, images.floats, images.count, batch, result,
                         threads, check);
  }
}

}  // namespace pyflocality
