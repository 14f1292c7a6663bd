// What the posterior scans for Jacobian-vector products take beside posterior.h.
#pragma once

#include <cstddef>

namespace pyflocality {

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
// its weighted sums are, over the images, those of p v [values], p c [count] and p c v
// [count, values], where p = 2^(-scale (e - minimum)).
struct Tangents {
  const float* centre;
  const float* tangents;
  std::size_t count;

  // Weighted sums of a query that answers `values` values.
  std::size_t sums(std::size_t values) const { return values + count * (1 + values); }
};

}  // namespace pyflocality
