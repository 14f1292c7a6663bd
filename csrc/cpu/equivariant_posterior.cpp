// Posterior means over the patches of all images at all positions.
//
// No patch is ever formed: for one displacement between query and patch, the squared differences
// of the whole images give the distances of all pairs by two passes of window sums, whatever the
// window. A displacement costs about as much as the window posterior does.

#include "equivariant_posterior.h"

#include "kernel.h"

#define PYFLOCALITY_KERNEL "equivariant_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void equivariant_posterior(const Pass& pass, const WindowShape& shape, bool circular,
                           const ScanResult& result) {
  dispatch(pass,
           [&](auto kernels, const auto& typed) { kernels.scan(typed, shape, circular, result); });
}

}  // namespace pyflocality
