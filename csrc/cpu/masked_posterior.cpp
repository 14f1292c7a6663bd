// Posterior means over masks, with sums of squared differences taken along a difference tree.
//
// A tile of images is turned so that images lie side by side, one register lane each. Walking the
// tree, the sums of a group of noisy images stay in registers: every input that is added or removed
// costs a load and one multiply-add for each of them. At every output the sums are distances, and
// are taken into the output's online softmax at once; no distance is ever stored. With tangents
// the group is one noisy image and the inner products with some tangents, which are sums over the
// same inputs.
//
// A second pass makes weights of the distances. Then the tree of the answers is walked backwards:
// a node gathers the factors of its own output and of all that begin with its sum, and hands them
// to the inputs that it adds, with the other sign to those that it subtracts. What has arrived at
// an input are the factors of all masks that hold it.

#include "masked_posterior.h"

#include "kernel.h"

#define PYFLOCALITY_KERNEL "masked_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

void masked_posterior(const Pass& pass, const DifferenceTree& tree, const ScanResult& result) {
  dispatch(pass, [&](auto kernels, const auto& typed) { kernels.scan(typed, tree, result); });
}

void masked_posterior_jvp(const Pass& pass, const DifferenceTree& tree, const Tangents& tangents,
                          const ScanResult& result) {
  dispatch(pass,
           [&](auto kernels, const auto& typed) { kernels.jvp(typed, tree, tangents, result); });
}

void masked_posterior_vjp(const Pass& pass, const DifferenceTree& tree,
                          const DifferenceTree& answers, const PosteriorWeights& weights,
                          double* sums) {
  dispatch(pass, [&](auto kernels, const auto& typed) {
    kernels.vjp(typed, tree, answers, weights, sums);
  });
}

}  // namespace pyflocality
