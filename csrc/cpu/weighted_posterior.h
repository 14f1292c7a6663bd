#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "posterior.h"

namespace pyflocality {

// Weights of the inputs of every output, for blocks of consecutive outputs: the inputs that any of
// a block weighs, with the weights of all of it.
struct InputWeights {
  // Outputs of a block, whose sums fill the registers together.
  static constexpr std::size_t kOutputs = 8;

  std::size_t inputs_count = 0;        // D
  std::size_t outputs = 0;             // Q
  std::vector<std::size_t> begin;      // first entry of every block, and the end of the last
  std::vector<std::uint32_t> inputs;   // [entries]
  std::vector<float> weights;          // [entries, kOutputs]
  std::vector<std::uint32_t> answers;  // the input whose value each output answers
};

// Of weights [outputs, inputs]; outputs past the last of a block weigh nothing.
InputWeights input_weights(const float* weights, std::size_t inputs, std::size_t outputs,
                           std::vector<std::uint32_t> answers);

// The scan of masked_posterior() with weights w, not negative, in place of masks:
//
//   e[b, m, i] = sum_d w_m[d] (noisy[b, d] - image[i, d])^2
//
// Squares are formed once for a noisy image and a tile of images, and summed afresh for every
// output: every term is of one sign and nothing cancels.
void weighted_posterior(const Pass& pass, const InputWeights& weights, const ScanResult& result);

}  // namespace pyflocality
