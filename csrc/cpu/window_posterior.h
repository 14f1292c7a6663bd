#pragma once

#include <cstddef>
#include <functional>

#include "cpu_features.h"
#include "posterior.h"

namespace pyflocality {

// Images of `channels` planes of height x width pixels, and the side of a square window, odd.
struct WindowShape {
  std::size_t channels, height, width, window;
};

// Posterior over the images for every pixel q and noisy image b, from the squared distances over
// all channels of the window around q, cut at the border:
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

}  // namespace pyflocality
