// What the posterior kernels take and give.
//
// In all of them a noisy image's results do not depend on the others of its batch, nor on the
// number of threads, and a tangent's not on the other tangents.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu_features.h"

namespace pyflocality {

// Training images [count, dim] as bytes or floats, whichever pointer is set.
struct StoredImages {
  const std::uint8_t* bytes;
  const float* floats;
  std::size_t count, dim;
};

// What is answered of the training images: value images [count, number, dim] of them, the images
// themselves, or both; then the images come first. Values are in units of their own.
struct ValueImages {
  const float* values = nullptr;
  std::size_t number = 0;
  bool with_image = true;

  // How many images are answered for a noisy one.
  std::size_t answered() const { return number + (with_image ? 1 : 0); }
};

// Noisy images and their noise levels, in the units the images are stored in.
//
//   noisy    [count, dim]: x / alpha for floats, 127.5 (x / alpha + 1) for bytes
//   scale    [count]: factor of the squared distances in the power of two, positive and finite
struct NoisyBatch {
  const float* noisy;
  const float* scale;
  std::size_t count;
  // [dim], or null: what the masked kernels count both sides from. See masked_posterior.h.
  const float* centre = nullptr;
};

// A pass over all training images for a batch of noisy images.
struct Pass {
  StoredImages images;
  NoisyBatch batch;
  std::size_t threads;
  InstructionSet isa;
  // Called on the calling thread now and then, and may throw.
  std::function<void()> checkpoint;
  // Of kernels that say so alone; others answer the images.
  ValueImages values = {};
};

// Results of a scan in stored units: [batch, queries] and, for weighted, [batch, queries, values].
// Where value images are answered, a query's values are those of one image after the other.
struct ScanResult {
  double* minimum;
  double* total;
  double* weighted;
};

// Directions in which posterior means are differentiated.
//
//   centre     [batch, dim]: what values are counted from, in stored units. It cancels from every
//              covariance; near the images that matter it keeps their digits.
//   tangents   [batch, count, dim]
//
// A scan with tangents gives the minimum and total of the scan without. With v a query's answered
// values counted from the centre, w its weights of the inputs and
//
//   c[k, i] = sum_d w[d] tangents[k, d] (image[i, d] - centre[d]),
//
// its weighted sums are, over the images, those of p v [values], p c [count] and, about the means
// of v and c, p (v - E v) (c - E c) [count, values], where p = 2^(-scale (e - minimum)).
//
// Kernels count v and c from the nearest image so far, and move their sums where another comes:
// what it adds to the products is nothing, to the last bit, and all others add no more than their
// weight.
struct Tangents {
  const float* centre;
  const float* tangents;
  std::size_t count;

  // Weighted sums of a query that answers `values` values.
  std::size_t sums(std::size_t values) const { return values + count * (1 + values); }
};

// What a second pass applies: the weights of a scan, or their derivative along cotangents.
//
//   minimum, total   [batch, queries], of the scan over all images
//   cotangents       g [batch, count, answered, dim], or null for the weights alone, and then
//   mean             posterior means [batch, answered, dim]
//   centre           what the images are counted from, [batch, dim]. It changes rounding alone:
//                    what a cotangent makes of the weights of a query sums to 0.
//
// Of the weights alone there are sums for each answered image, [batch, answered, dim]; along
// cotangents they are in the space of the images, [batch, count, dim].
struct PosteriorWeights {
  const double* minimum;
  const double* total;
  const float* cotangents = nullptr;
  std::size_t count = 1;
  const float* mean = nullptr;
  const float* centre = nullptr;
};

}  // namespace pyflocality
