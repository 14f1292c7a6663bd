#pragma once

#include "difference_tree.h"
#include "posterior.h"

namespace pyflocality {

// Posterior over the images for every output value m and noisy image b, from the squared
// distances over the inputs of m's mask:
//
//   e[b, m, i] = sum_{d in M_m} (noisy[b, d] - image[i, d])^2
//
// gives minimum = min_i e, total = sum_i 2^(-scale (e - minimum)) and
// weighted = sum_i 2^(-scale (e - minimum)) image[i, m], with m the input whose value the output
// answers: its own, where the outputs are some of the inputs. Where outputs answer none there are
// minimum and total alone. Of the value images of the pass it gives the like of weighted, too.
//
// With a centre c the scan sums (image - c) (image - c - 2 (noisy - c)), which differs from the
// squared difference by (noisy - c)^2 alone: nothing that depends on the image. Where noise is
// much larger than the images these terms are much smaller than the squares, and so are their
// rounding errors; where it is much smaller the squares of the nearest images are. The minimum is
// that of e in both cases.
void masked_posterior(const Pass& pass, const DifferenceTree& tree, const ScanResult& result);

// The same with tangents, whose centre the distances are counted from too: from the noisy image
// itself they are sums of squares. Of the results only v is: c counts from zero, so that results
// over parts of the images can be joined whatever their centres.
void masked_posterior_jvp(const Pass& pass, const DifferenceTree& tree, const Tangents& tangents,
                          const ScanResult& result);

// Applies posterior weights over masks. With p[b, m, i] the weight of image i for output m, from
// the same distances over the masks of `tree` as those of the scan, and R_m the masks of `answers`,
//
//   sums[b, k, d] = sum_i (sum over the m with d in R_m of a[b, k, m, i]) image[i, d]
//
// where a = p without cotangents: a filtered posterior. With them, where outputs answer values of
// inputs m, and image[i, d] counted from their centre,
//
//   a[b, k, m, i] = p[b, m, i] g[b, k, m] (image[i, m] - mean[b, m])
//
// Value images of the pass are applied as in window_posterior_vjp().
//
// Images in which no output has any weight cost their distances only. The centre of the batch must
// be that of the scan.
void masked_posterior_vjp(const Pass& pass, const DifferenceTree& tree,
                          const DifferenceTree& answers, const PosteriorWeights& weights,
                          double* sums);

}  // namespace pyflocality
