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

// The weighted sums of a query from sums counted from one of its images:
//
//   sums     [sums(values)]: of v, of c and of their products, in place
//   value    value(i): the image's own v; product(k): its own c
template <typename Value, typename Product>
inline void count_from_means(double total, std::size_t values, std::size_t count, double* sums,
                             const Value& value, const Product& product) {
  double* inner = sums + values;
  double* cross = inner + count;
  for (std::size_t k = 0; k < count; ++k) {
    const double mean = inner[k] / total;
    for (std::size_t i = 0; i < values; ++i) cross[k * values + i] -= mean * sums[i];
  }
  for (std::size_t i = 0; i < values; ++i) sums[i] += total * value(i);
  for (std::size_t k = 0; k < count; ++k) inner[k] += total * product(k);
}

}  // namespace pyflocality
