// Posterior means over square windows.
//
// For a tile of images, one register lane each, and one noisy image: squared differences summed
// over the channels, window sums along the rows, then along the columns; every column's sums are
// distances and are taken into their pixel's online softmax at once. With tangents they become the
// weights of all pixels first; then tangent by tangent the inner products, which are window sums
// like the distances, so that few planes are in work at a time.
//
// A second pass makes weights of the distances in place. Window sums of the weights, along columns
// and then along rows, are the factors of the images' values; they reach as far as the windows
// that have any weight.

#include "window_posterior.h"

#include "kernel.h"

#define PYFLOCALITY_KERNEL "window_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void window_posterior(const Pass& pass, const WindowShape& shape, const ScanResult& result) {
  dispatch(pass, [&](auto kernels, const auto& typed) {
    kernels.scan(typed, shape, all_places(shape), true, result);
  });
}

void patch_set_scan(const Pass& pass, const WindowShape& shape, const ScanResult& result) {
  dispatch(pass, [&](auto kernels, const auto& typed) {
    kernels.scan(typed, shape, places_inside(shape), false, result);
  });
}

void window_posterior_jvp(const Pass& pass, const WindowShape& shape, const Tangents& tangents,
                          const ScanResult& result) {
  dispatch(pass,
           [&](auto kernels, const auto& typed) { kernels.jvp(typed, shape, tangents, result); });
}

void window_posterior_vjp(const Pass& pass, const WindowShape& shape,
                          const PosteriorWeights& weights, double* sums) {
  dispatch(pass,
           [&](auto kernels, const auto& typed) { kernels.vjp(typed, shape, weights, sums); });
}

}  // namespace pyflocality
