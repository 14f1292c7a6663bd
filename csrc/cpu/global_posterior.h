#pragma once

#include "posterior.h"

namespace pyflocality {

// Posterior over the images for every noisy image b, from the squared distances over all values:
//
//   e[b, i] = sum_d (noisy[b, d] - image[i, d])^2
//
// gives minimum = min_i e [batch], total = sum_i 2^(-scale (e - minimum)) and
// weighted = sum_i 2^(-scale (e - minimum)) image[i] [batch, dim], or [batch, answered, dim] with
// the value images of the pass.
void global_posterior(const Pass& pass, const ScanResult& result);

// The same with tangents.
void global_posterior_jvp(const Pass& pass, const Tangents& tangents, const ScanResult& result);

}  // namespace pyflocality
