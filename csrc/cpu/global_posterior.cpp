// Posterior means over whole images.
//
// Distances of a few images to a few noisy images at a time, so that what is read once serves
// several sums; then only the images that can matter beside the nearest one are added up. With
// tangents these alone have their inner products taken, several at a time.

#include "global_posterior.h"

#include "kernel.h"

#define PYFLOCALITY_KERNEL "global_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void global_posterior(const Pass& pass, const ScanResult& result) {
  dispatch(pass, [&](auto kernels, const auto& typed) { kernels.scan(typed, result); });
}

void global_posterior_jvp(const Pass& pass, const Tangents& tangents, const ScanResult& result) {
  dispatch(pass, [&](auto kernels, const auto& typed) { kernels.jvp(typed, tangents, result); });
}

}  // namespace pyflocality
