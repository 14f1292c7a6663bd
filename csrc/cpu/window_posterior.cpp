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
namespace {

void scan_windows(const WindowShape& shape, const WindowPlaces& places, std::size_t values,
                  const StoredImages& images, const NoisyBatch& batch, const ScanResult& result,
                  std::size_t threads, InstructionSet isa,
                  const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, window_posterior, shape, places, values, images.bytes, images.count,
                         batch, result, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, window_posterior, shape, places, values, images.floats, images.count,
                         batch, result, threads, check);
  }
}

}  // namespace

void window_posterior(const WindowShape& shape, const StoredImages& images, const NoisyBatch& batch,
                      const ScanResult& result, std::size_t threads, InstructionSet isa,
                      const std::function<void()>& checkpoint) {
  scan_windows(shape, all_places(shape), shape.channels, images, batch, result, threads, isa,
               checkpoint);
}

void patch_weights(const WindowShape& shape, const StoredImages& images, const NoisyBatch& batch,
                   const ScanResult& result, std::size_t threads, InstructionSet isa,
                   const std::function<void()>& checkpoint) {
  scan_windows(shape, places_inside(shape), 0, images, batch, result, threads, isa, checkpoint);
}

}  // namespace pyflocality
