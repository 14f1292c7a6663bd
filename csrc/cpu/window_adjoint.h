#pragma once

#include <cstddef>
#include <functional>

#include "cpu_features.h"
#include "posterior.h"
#include "window_posterior.h"

namespace pyflocality {

// What a scan found, and what its weights are multiplied by.
//
//   minimum, total   [batch, pixels], of window_posterior or patch_weights over all images
//   cotangents       g [batch, count, dim], or null for a patch set, and then
//   mean             posterior means [batch, dim]
//   centre           what values are counted from, [batch, dim]
struct WindowWeights {
  const double* minimum;
  const double* total;
  const float* cotangents;
  std::size_t count;
  const float* mean;
  const float* centre;

  // Sums of a noisy image.
  std::size_t sums() const { return cotangents == nullptr ? 1 : count; }
};

// Spreads posterior weights over whole windows. With p[b, q, i] the weight of image i for pixel q,
// from the same distances as those of the scan and its minimum and total,
//
//   sums[b, k, c, d] = sum_i (sum over the q whose window holds d of a[b, k, q, i]) image[i, c, d]
//
// where a = p for a patch set, over the windows that fit inside the image, and for cotangents,
// over all windows, cut at the border,
//
//   a[b, k, q, i] = p[b, q, i] sum_c g[b, k, c, q] (image[i, c, q] - mean[b, c, q])
//
// with image[i, c, d] counted from the centre, which changes rounding alone: the a[b, k, q, i] of
// a query sum to 0. Images in which no window has any weight cost their distances only.
//
// sums: [batch, count, dim], or [batch, dim] of a patch set. A noisy image's results do not depend
// on the others of its batch, nor on the number of threads. checkpoint is called on the calling
// thread now and then and may throw.
void window_adjoint(const WindowShape& shape, const StoredImages& images, const NoisyBatch& batch,
                    const WindowWeights& weights, double* sums, std::size_t threads,
                    InstructionSet isa, const std::function<void()>& checkpoint);

}  // namespace pyflocality
