#pragma once

#include "posterior.h"
#include "window_posterior.h"

namespace pyflocality {

// Posterior over the patches of all images for every pixel q and noisy image b. With k the window
// and h = k / 2, a pixel is interior where it lies at least h from every border. From the squared
// distances over all channels of the windows around q in the noisy image and around p in the
// training image,
//
//   e[b, q, (i, p)] = sum_{c, |delta| <= h} (noisy[b, c, q + delta] - image[i, c, p + delta])^2
//
// it gives minimum, total and, for every channel, weighted = sum 2^(-scale (e - minimum))
// image[i, c, p], laid out as those of window_posterior.
//
// circular: q is any pixel, the noisy image goes on periodically, p is any interior pixel; the
// window must fit inside the image. Otherwise: windows are cut at the borders, and p may differ
// from q in a coordinate only where both are interior in that coordinate.
void equivariant_posterior(const Pass& pass, const WindowShape& shape, bool circular,
                           const ScanResult& result);

}  // namespace pyflocality
