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

  // Terms added or subtracted in all, per query and image.
  std::size_t terms() const { return inputs.size(); }
};

// Sums of values [inputs_count] over every mask, [outputs].
std::vector<double> sums_over_masks(const DifferenceTree& tree, const std::vector<double>& values);

// Squared distances of two images [inputs_count] over every mask, [outputs].
std::vector<double> squares_over_masks(const DifferenceTree& tree, const float* image,
                                       const float* other);

// Builds the schedule.
//
//   bits      masks, a row of `row_bytes` bytes for each output; input d is bit 7 - d % 8 of
//             byte d / 8; bits past the last input are zero
//   inputs    D = channels * height * width; outputs lie on the same grid, Q = D
DifferenceTree build_difference_tree(const std::uint8_t* bits, std::size_t row_bytes,
                                     std::size_t channels, std::size_t height, std::size_t width);

}  // namespace pyflocality
