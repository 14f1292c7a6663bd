// Posterior means over weighted inputs: products of weights with a tile of squares.
//
// The squares of a tile of images lie in the second-level cache, the sums of a block of outputs in
// registers. An input that a block weighs costs a load of its squares, and a weight and one
// multiply-add for each output; inputs that no output of the block weighs cost nothing. The sums
// are distances, and are taken into the outputs' online softmax at once.

#include "weighted_posterior.h"

#include <algorithm>
#include <utility>

#include "kernel.h"

#define PYFLOCALITY_KERNEL "weighted_posterior_kernel.h"
#include "simd/for_each_isa.h"

namespace pyflocality {

InputWeights input_weights(const float* weights, std::size_t inputs, std::size_t outputs,
                           std::vector<std::uint32_t> answers) {
  constexpr std::size_t kOutputs = InputWeights::kOutputs;
  InputWeights result;
  result.inputs_count = inputs;
  result.outputs = outputs;
  result.answers = std::move(answers);
  result.begin.push_back(0);
  for (std::size_t first = 0; first < outputs; first += kOutputs) {
    const std::size_t count = std::min(kOutputs, outputs - first);
    for (std::size_t d = 0; d < inputs; ++d) {
      float row[kOutputs] = {};
      for (std::size_t k = 0; k < count; ++k) row[k] = weights[(first + k) * inputs + d];
      if (std::all_of(row, row + kOutputs, [](float weight) { return weight == 0.0f; })) continue;
      result.inputs.push_back(static_cast<std::uint32_t>(d));
      result.weights.insert(result.weights.end(), row, row + kOutputs);
    }
    result.begin.push_back(result.inputs.size());
  }
  return result;
}

void weighted_posterior(const Pass& pass, const InputWeights& weights, const ScanResult& result) {
  dispatch(pass, [&](auto kernels, const auto& typed) { kernels.scan(typed, weights, result); });
}

}  // namespace pyflocality
