#pragma once

#include <cstddef>

#include "posterior.h"

namespace pyflocality {

// Images of `channels` planes of height x width pixels, and the side of a square window. The window
// of a pixel begins window / 2 pixels before it.
struct WindowShape {
  std::size_t channels, height, width, window;
  std::size_t pixels() const { return height * width; }
};

// Pixels whose windows take part: rows [top, bottom), columns [left, right).
struct WindowPlaces {
  std::size_t top, bottom, left, right;
};

// All pixels, whose windows are cut at the border.
inline WindowPlaces all_places(const WindowShape& shape) {
  return {0, shape.height, 0, shape.width};
}

// The pixels whose windows fit inside the image.
inline WindowPlaces places_inside(const WindowShape& shape) {
  const std::size_t before = shape.window / 2, after = shape.window - 1 - before;
  return {before, shape.height - after, before, shape.width - after};
}

// Posterior over the images for every pixel q and noisy image b, from the squared distances over
// all channels of the window around q, of odd side, cut at the border:
//
//   e[b, q, i] = sum_{c, p in window(q)} (noisy[b, c, p] - image[i, c, p])^2
//
// gives minimum = min_i e [batch, pixels], total = sum_i 2^(-scale (e - minimum)) and, for every
// channel, weighted = sum_i 2^(-scale (e - minimum)) image[i, c, q] [batch, pixels, channels]; of
// the value images of the pass likewise.
void window_posterior(const Pass& pass, const WindowShape& shape, const ScanResult& result);

// The same with tangents.
void window_posterior_jvp(const Pass& pass, const WindowShape& shape, const Tangents& tangents,
                          const ScanResult& result);

// The same for the windows that fit inside the image alone, without values: minimum and total,
// which are infinite and 0 for the other pixels. The window may be even.
void patch_set_scan(const Pass& pass, const WindowShape& shape, const ScanResult& result);

// Applies posterior weights over whole windows. With p[b, q, i] the weight of image i for pixel q,
// from the same distances as those of the scan and its minimum and total,
//
//   sums[b, k, c, d] = sum_i (sum over the q whose window holds d of a[b, k, q, i]) image[i, c, d]
//
// where a = p without cotangents, over the windows that fit inside the image: a patch set. With
// them, over all windows, cut at the border, and image[i, c, d] counted from their centre,
//
//   a[b, k, q, i] = p[b, q, i] sum_c g[b, k, c, q] (image[i, c, q] - mean[b, c, q])
//
// The value images of the pass take the place of the image where values are applied without
// cotangents, and where cotangents meet them in a: there the sum goes over all answered images.
//
// Images in which no window has any weight cost their distances only.
void window_posterior_vjp(const Pass& pass, const WindowShape& shape,
                          const PosteriorWeights& weights, double* sums);

}  // namespace pyflocality
