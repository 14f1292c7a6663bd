#pragma once

#include <cstddef>
#include <functional>

#include "cpu_features.h"
#include "posterior.h"

namespace pyflocality {

// Images of `channels` planes of height x width pixels, and the side of a square window. The window
// of a pixel begins window / 2 pixels before it.
struct WindowShape {
  std::size_t channels, height, width, window;
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
// channel, weighted = sum_i 2^(-scale (e - minimum)) image[i, c, q] [batch, pixels, channels].
//
// A noisy image's results do not depend on the others of its batch, nor on the number of threads.
// checkpoint is called on the calling thread now and then and may throw.
void window_posterior(const WindowShape& shape, const StoredImages& images, const NoisyBatch& batch,
                      const ScanResult& result, std::size_t threads, InstructionSet isa,
                      const std::function<void()>& checkpoint);

// The same for the windows that fit inside the image alone, without values: minimum and total,
// which are infinite and 0 for the other pixels. The window may be even.
void patch_weights(const WindowShape& shape, const StoredImages& images, const NoisyBatch& batch,
                   const ScanResult& result, std::size_t threads, InstructionSet isa,
                   const std::function<void()>& checkpoint);

}  // namespace pyflocality
