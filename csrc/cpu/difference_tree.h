#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyflocality {

// A schedule that forms the sums over many sets of inputs from one another.
//
// Output q needs the sum of f(d) over its mask M_q, for functions f that differ per query and
// image. Masks of neighbouring outputs are nearly alike, so most sums are had cheaply from
// another one: add f over M_q \ M_p, subtract it over M_p \ M_q. The schedule is a spanning tree
// of the outputs with the empty set as its root and the symmetric differences as its costs; the
// set of all inputs takes part as a further, silent node where masks are dense.
//
// Rounding errors add up along a path, so no path may be longer than a few times what summing
// the mask afresh takes: beyond that an output starts from the empty set again.
struct DifferenceTree {
  static constexpr std::int32_t kFromLast = -1;   // begin with the sum of the node before
  static constexpr std::int32_t kFromEmpty = -2;  // begin with zero
  static constexpr std::int32_t kNowhere = -1;    // do not keep the sum
  static constexpr std::int32_t kSilent = -1;     // no output

  struct Node {
    std::int32_t output;  // output it belongs to, or kSilent
    std::int32_t from;    // slot of the sum it begins with, kFromLast or kFromEmpty
    std::int32_t keep;    // slot to keep its sum in, or kNowhere
    std::uint32_t plus;   // inputs added: inputs[begin, begin + plus)
    std::uint32_t minus;  // inputs subtracted, right behind
    std::size_t begin;
  };

  std::size_t inputs_count = 0;  // D
  std::size_t outputs = 0;       // Q
  std::size_t slots = 0;
  std::vector<Node> nodes;  // in the order of the scan
  std::vector<std::uint32_t> inputs;
  // The input whose value each output answers; empty where outputs answer none.
  std::vector<std::uint32_t> answers;

  // Values that an output answers.
  std::size_t answered() const { return answers.empty() ? 0 : 1; }

  // Terms added or subtracted in all, per query and image.
  std::size_t terms() const { return inputs.size(); }
};

// Sums of values [inputs_count] over every mask, [outputs].
std::vector<double> sums_over_masks(const DifferenceTree& tree, const std::vector<double>& values);

// Squared distances of two images [inputs_count] over every mask, [outputs].
std::vector<double> squares_over_masks(const DifferenceTree& tree, const float* image,
                                       const float* other);

// How outputs lie: those of the first channels * height * width on a grid, any others apart.
struct OutputGrid {
  std::size_t channels, height, width;
  std::size_t size() const { return channels * height * width; }
};

// Builds the schedule.
//
//   bits      masks, a row of ceil(inputs / 8) bytes for each output; input d is bit 7 - d % 8 of
//             byte d / 8; bits past the last input are zero
//   grid      outputs near one another on it are tried as neighbours
//   answers   the input whose value each output answers, or nothing: where there is an output for
//             every input, each answers its own then, else none
DifferenceTree build_difference_tree(const std::uint8_t* bits, std::size_t inputs,
                                     std::size_t outputs, const OutputGrid& grid,
                                     std::vector<std::uint32_t> answers = {});

}  // namespace pyflocality
