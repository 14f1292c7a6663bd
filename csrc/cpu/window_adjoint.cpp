// Posterior weights spread over square windows.
//
// For a tile of images, one register lane each, and one noisy image: distances over windows as
// in window_posterior.cpp become weights in place, and window sums of the weights, along columns
// and then along rows, are the factors of the images' values. The sums reach as far as the
// windows that have any weight.

#include "window_adjoint.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "segments.h"
#include "simd/constants.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

#define PYFLOCALITY_KERNEL "window_adjoint_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void window_adjoint(const WindowShape& shape, const StoredImages& images, const NoisyBatch& batch,
                    const WindowWeights& weights, double* sums, std::size_t threads,
                    InstructionSet isa, const std::function<void()>& checkpoint) {
  const Checkpoint check(checkpoint);
  if (images.bytes != nullptr) {
    PYFLOCALITY_DISPATCH(isa, window_adjoint, shape, images.bytes, images.count, batch, weights,
                         sums, threads, check);
  } else {
    PYFLOCALITY_DISPATCH(isa, window_adjoint, shape, images.floats, images.count, batch, weights,
                         sums, threads, check);
  }
}

}  // namespace pyflocality
