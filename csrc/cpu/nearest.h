#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu_features.h"

namespace pyflocality {

// What the nearest images are looked for of.
//
//   noisy    [count, dim]: 127.5 (x / alpha + 1), as double precision rounds it
//   limit    [count]: images of a larger value are not among the nearest, infinity at first
struct NearestQueries {
  const double* noisy;
  const double* limit;
  std::size_t count;
};

// An image that may be among the nearest. With u the image and t the query its value is
//
//   |u|^2 - 2 <t, u>,
//
// what of the squared distance |t - u|^2 differs from image to image, but for `slack` at most.
struct NearestCandidate {
  std::size_t image;
  double value, slack;
};

// For every query all of the images [count, dim] that may be among the k nearest to it by their
// values and limit, in their order. Candidates and values are the same with each instruction set
// and number of threads. The checkpoint is called on the calling thread now and then, and may
// throw.
std::vector<std::vector<NearestCandidate>> nearest_candidates(
    const std::uint8_t* images, std::size_t count, std::size_t dim, const NearestQueries& queries,
    std::size_t k, std::size_t threads, InstructionSet isa,
    const std::function<void()>& checkpoint);

// Pairs of an image [count, dim] and the noisy image owner[i] of those [.., dim] in the units of
// the formulas, with their signal coefficients.
struct NearestPairs {
  const std::uint8_t* images;
  std::size_t count, dim;
  const double* noisy;
  const double* alpha;
  const std::int64_t* owner;
};

// Squared distances |x - alpha v|^2 of pairs [count], v = u / 127.5 - 1, in double precision.
void pair_distances(const NearestPairs& pairs, std::size_t threads, double* distances);

}  // namespace pyflocality
