// Masks for the scans, and the check of their tree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "difference_tree.h"
#include "plain_scan.h"
#include "plain_sums.h"

namespace {

// Masks of neighbours that are nearly alike, with an empty, a full and a dense one.
std::vector<std::vector<bool>> make_masks(const Shape& shape) {
  const std::size_t count = shape.values();
  Random random(7);
  std::vector<std::vector<bool>> masks(count, std::vector<bool>(count));
  for (std::size_t q = 0; q < count; ++q) {
    for (std::size_t d = 0; d < count; ++d) {
      const auto distance = [&](std::size_t a, std::size_t b) { return a > b ? a - b : b - a; };
      const std::size_t p = d % shape.pixels(), o = q % shape.pixels();
      const bool near =
          distance(p / shape.width, o / shape.width) + distance(p % shape.width, o % shape.width) <=
          2;
      masks[q][d] = near != (random.below(20) == 0);
    }
  }
  masks.front().assign(count, false);
  if (count > 2) masks[count / 2].assign(count, true);
  for (std::size_t d = 0; d < count && count > 1; ++d) masks.back()[d] = random.below(10) != 0;
  return masks;
}

// The tree of masks over the values of an image, whose outputs lie on a grid.
DifferenceTree make_tree(const std::vector<std::vector<bool>>& masks, const OutputGrid& grid) {
  const std::size_t inputs = masks[0].size(), row_bytes = (inputs + 7) / 8;
  std::vector<std::uint8_t> bits(masks.size() * row_bytes);
  for (std::size_t q = 0; q < masks.size(); ++q) {
    for (std::size_t d = 0; d < inputs; ++d) {
      if (masks[q][d]) bits[q * row_bytes + d / 8] |= static_cast<std::uint8_t>(0x80 >> d % 8);
    }
  }
  return build_difference_tree(bits.data(), inputs, masks.size(), grid);
}

// Walks the schedule with sets in place of sums: every output's set is its mask.
void check_tree(const DifferenceTree& tree, const std::vector<std::vector<bool>>& masks,
                const std::string& name) {
  const std::size_t count = masks[0].size();
  std::vector<std::vector<int>> slots(tree.slots);
  std::vector<int> held(count, 0);
  std::vector<int> visits(masks.size(), 0);
  for (const DifferenceTree::Node& node : tree.nodes) {
    if (node.from == DifferenceTree::kFromEmpty) {
      held.assign(count, 0);
    } else if (node.from != DifferenceTree::kFromLast) {
      held = slots.at(static_cast<std::size_t>(node.from));
      expect(!held.empty(), name + ": a slot is read before it is written");
    }
    for (std::size_t k = 0; k < node.plus + node.minus; ++k) {
      held.at(tree.inputs.at(node.begin + k)) += k < node.plus ? 1 : -1;
    }
    if (node.keep != DifferenceTree::kNowhere) slots.at(static_cast<std::size_t>(node.keep)) = held;
    if (node.output == DifferenceTree::kSilent) continue;
    const auto output = static_cast<std::size_t>(node.output);
    ++visits.at(output);
    for (std::size_t d = 0; d < count; ++d) {
      expect(held[d] == (masks[output][d] ? 1 : 0), name + ": a set is not its mask");
    }
  }
  for (const int number : visits) expect(number == 1, name + ": an output is not visited once");
}

std::vector<Applied> applied_masks(const std::vector<std::vector<bool>>& masks,
                                   const std::vector<std::vector<bool>>& answers) {
  std::vector<Applied> queries;
  for (std::size_t q = 0; q < masks.size(); ++q) {
    Applied query{{}, {}, {q}};
    for (std::size_t d = 0; d < masks[q].size(); ++d) {
      if (masks[q][d]) query.measured.push_back(d);
      if (answers[q][d]) query.answered.push_back(d);
    }
    queries.push_back(query);
  }
  return queries;
}

}  // namespace
