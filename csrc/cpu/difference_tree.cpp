#include "difference_tree.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <queue>
#include <tuple>
#include <utility>

namespace pyflocality {
namespace {

// Neighbours a sum may be taken from: outputs at most this far away, in every channel.
constexpr std::ptrdiff_t kNeighbourhood = 2;
// Longest path from a fresh start, in units of the mask's own size.
constexpr std::size_t kLongestPath = 3;
constexpr std::size_t kFreePath = 32;
// A sum from a neighbour's must save a third of a fresh one's terms: subtracting leaves the
// rounding errors of terms that are no longer in the sum.
constexpr std::uint32_t in_fresh_terms(std::uint32_t difference) {
  return difference + difference / 2;
}

std::uint32_t count_bits(std::uint64_t word) {
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<std::uint32_t>((word * 0x0101010101010101u) >> 56);
}

class Builder {
 public:
  Builder(const std::uint8_t* bits, std::size_t inputs, std::size_t outputs, const OutputGrid& grid)
      : grid_(grid),
        inputs_(inputs),
        count_(outputs),
        words_((inputs + 63) / 64),
        masks_((count_ + 1) * words_) {
    const std::size_t row_bytes = (inputs + 7) / 8;
    for (std::size_t q = 0; q < count_; ++q) {
      std::memcpy(&masks_[q * words_], bits + q * row_bytes, row_bytes);
    }
    auto* full = reinterpret_cast<std::uint8_t*>(&masks_[count_ * words_]);
    for (std::size_t d = 0; d < inputs; ++d) full[d / 8] |= 0x80 >> d % 8;
    sizes_.resize(count_ + 1);
    for (std::size_t q = 0; q <= count_; ++q) {
      for (std::size_t w = 0; w < words_; ++w) sizes_[q] += count_bits(row(q)[w]);
    }
  }

  DifferenceTree build() {
    span();
    bound_paths();
    schedule();
    return std::move(tree_);
  }

 private:
  static constexpr std::size_t kEmpty = static_cast<std::size_t>(-1);

  const std::uint64_t* row(std::size_t q) const { return &masks_[q * words_]; }

  std::uint32_t difference(std::size_t p, std::size_t q) const {
    std::uint32_t size = 0;
    for (std::size_t w = 0; w < words_; ++w) size += count_bits(row(p)[w] ^ row(q)[w]);
    return size;
  }

  template <typename Visit>
  void for_each_neighbour(std::size_t q, const Visit& visit) const {
    if (q >= grid_.size()) return;
    const auto y = static_cast<std::ptrdiff_t>(q / grid_.width % grid_.height);
    const auto x = static_cast<std::ptrdiff_t>(q % grid_.width);
    for (std::ptrdiff_t dy = -kNeighbourhood; dy <= kNeighbourhood; ++dy) {
      for (std::ptrdiff_t dx = -kNeighbourhood; dx <= kNeighbourhood; ++dx) {
        const std::ptrdiff_t row = y + dy, column = x + dx;
        if (row < 0 || row >= static_cast<std::ptrdiff_t>(grid_.height)) continue;
        if (column < 0 || column >= static_cast<std::ptrdiff_t>(grid_.width)) continue;
        for (std::size_t c = 0; c < grid_.channels; ++c) {
          const std::size_t other =
              (c * grid_.height + static_cast<std::size_t>(row)) * grid_.width +
              static_cast<std::size_t>(column);
          if (other != q) visit(other);
        }
      }
    }
  }

  // Least spanning tree by Prim's rule, from the empty and the full set at once. Ties go to the
  // smaller output, so that the tree is the same everywhere.
  void span() {
    using Entry = std::tuple<std::uint32_t, std::size_t, std::size_t>;  // cost, output, parent
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> open;
    parent_.assign(count_ + 1, kEmpty);
    std::vector<std::uint32_t> best(count_);
    std::vector<bool> done(count_, false);
    for (std::size_t q = 0; q < count_; ++q) {
      const std::uint32_t missing = sizes_[count_] - sizes_[q];
      const bool dense = missing < sizes_[q];
      best[q] = dense ? missing : sizes_[q];
      open.emplace(best[q], q, dense ? count_ : kEmpty);
    }
    while (!open.empty()) {
      const auto [cost, q, parent] = open.top();
      open.pop();
      if (done[q]) continue;
      done[q] = true;
      parent_[q] = parent;
      for_each_neighbour(q, [&](std::size_t other) {
        if (done[other]) return;
        const std::uint32_t between = in_fresh_terms(difference(q, other));
        if (between < best[other]) {
          best[other] = between;
          open.emplace(between, other, q);
        }
      });
    }
  }

  void bound_paths() {
    children_.assign(count_ + 1, {});
    for (std::size_t q = 0; q < count_; ++q) {
      if (parent_[q] != kEmpty) children_[parent_[q]].push_back(q);
    }
    std::vector<std::pair<std::size_t, std::size_t>> open;  // output, length of its path
    if (!children_[count_].empty()) open.emplace_back(count_, sizes_[count_]);
    for (std::size_t q = 0; q < count_; ++q) {
      if (parent_[q] == kEmpty) open.emplace_back(q, sizes_[q]);
    }
    while (!open.empty()) {
      const auto [q, length] = open.back();
      open.pop_back();
      std::vector<std::size_t> staying;
      for (const std::size_t child : children_[q]) {
        std::size_t path = length + difference(q, child);
        if (path > kLongestPath * sizes_[child] + kFreePath) {
          parent_[child] = kEmpty;
          path = sizes_[child];
        } else {
          staying.push_back(child);
        }
        open.emplace_back(child, path);
      }
      children_[q] = std::move(staying);
    }
  }

  // Depth first. The child with the largest subtree comes last: a node's sum is kept only while
  // smaller subtrees are visited, so few sums are kept at a time.
  void schedule() {
    std::vector<std::size_t> weight(count_ + 1, 1), order;
    std::vector<std::size_t> roots;
    if (!children_[count_].empty()) roots.push_back(count_);
    for (std::size_t q = 0; q < count_; ++q) {
      if (parent_[q] == kEmpty) roots.push_back(q);
    }
    std::vector<std::size_t> open = roots;
    while (!open.empty()) {
      const std::size_t q = open.back();
      open.pop_back();
      order.push_back(q);
      for (const std::size_t child : children_[q]) open.push_back(child);
    }
    for (auto q = order.rbegin(); q != order.rend(); ++q) {
      for (const std::size_t child : children_[*q]) weight[*q] += weight[child];
    }
    tree_.inputs_count = inputs_;
    tree_.outputs = count_;
    for (const std::size_t root : roots) visit_subtree(root, weight);
  }

  struct Visit {
    std::size_t q, parent;
    std::int32_t from;
    bool last;  // the slot it begins from is free afterwards
  };

  void visit_subtree(std::size_t root, const std::vector<std::size_t>& weight) {
    std::vector<std::int32_t> free_slots;
    std::int32_t slots = 0;
    std::vector<Visit> open{{root, kEmpty, DifferenceTree::kFromEmpty, false}};
    while (!open.empty()) {
      const Visit visit = open.back();
      open.pop_back();
      if (visit.last && visit.from >= 0) free_slots.push_back(visit.from);
      std::vector<std::size_t> children = children_[visit.q];
      std::sort(children.begin(), children.end(), [&](std::size_t a, std::size_t b) {
        return weight[a] != weight[b] ? weight[a] < weight[b] : a < b;
      });
      std::int32_t keep = DifferenceTree::kNowhere;
      if (children.size() > 1) {
        if (free_slots.empty()) free_slots.push_back(slots++);
        keep = free_slots.back();
        free_slots.pop_back();
      }
      append(visit, keep);
      // Pushed in reverse: the first child begins with the sum at hand, the others load it.
      for (std::size_t i = children.size(); i-- > 0;) {
        const bool last = i + 1 == children.size();
        open.push_back({children[i], visit.q, i == 0 ? DifferenceTree::kFromLast : keep, last});
      }
    }
    tree_.slots = std::max(tree_.slots, static_cast<std::size_t>(slots));
  }

  void append(const Visit& visit, std::int32_t keep) {
    DifferenceTree::Node node{};
    node.output = visit.q == count_ ? DifferenceTree::kSilent : static_cast<std::int32_t>(visit.q);
    node.from = visit.from;
    node.keep = keep;
    node.begin = tree_.inputs.size();
    const std::vector<std::uint64_t> empty(words_, 0);
    const std::uint64_t* before = visit.parent == kEmpty ? empty.data() : row(visit.parent);
    node.plus = list_inputs(row(visit.q), before);
    node.minus = list_inputs(before, row(visit.q));
    tree_.nodes.push_back(node);
  }

  // Lists the inputs in one mask and not in the other.
  std::uint32_t list_inputs(const std::uint64_t* in, const std::uint64_t* not_in) {
    const auto* in_bytes = reinterpret_cast<const std::uint8_t*>(in);
    const auto* out_bytes = reinterpret_cast<const std::uint8_t*>(not_in);
    std::uint32_t size = 0;
    for (std::size_t byte = 0; byte < (inputs_ + 7) / 8; ++byte) {
      const unsigned listed = in_bytes[byte] & ~out_bytes[byte] & 0xffu;
      for (unsigned bit = 0; listed != 0 && bit < 8; ++bit) {
        if ((listed & (0x80u >> bit)) == 0) continue;
        tree_.inputs.push_back(static_cast<std::uint32_t>(byte * 8 + bit));
        ++size;
      }
    }
    return size;
  }

  const OutputGrid grid_;
  const std::size_t inputs_, count_, words_;
  std::vector<std::uint64_t> masks_;  // the full set in the last row
  std::vector<std::uint32_t> sizes_;
  std::vector<std::size_t> parent_;
  std::vector<std::vector<std::size_t>> children_;
  DifferenceTree tree_;
};

#include "simd/tree_walk.h"

// Sums of numbers, as walk() forms them.
struct PlainSums {
  void clear() { sum = 0.0; }
  void recall(std::size_t slot) { sum = slots[slot]; }
  void keep(std::size_t slot) { slots[slot] = sum; }
  void answer(std::size_t output) { result[output] = sum; }

  template <bool kPlus>
  void accumulate(const std::uint32_t* inputs, std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) sum += kPlus ? values[inputs[k]] : -values[inputs[k]];
  }

  const std::vector<double>& values;
  std::vector<double> slots, result;
  double sum = 0.0;
};

}  // namespace

std::vector<double> sums_over_masks(const DifferenceTree& tree, const std::vector<double>& values) {
  PlainSums sums{values, std::vector<double>(tree.slots), std::vector<double>(tree.outputs)};
  walk(tree, sums);
  return sums.result;
}

std::vector<double> squares_over_masks(const DifferenceTree& tree, const float* image,
                                       const float* other) {
  std::vector<double> squares(tree.inputs_count);
  for (std::size_t d = 0; d < tree.inputs_count; ++d) {
    const double gap = static_cast<double>(image[d]) - other[d];
    squares[d] = gap * gap;
  }
  return sums_over_masks(tree, squares);
}

DifferenceTree build_difference_tree(const std::uint8_t* bits, std::size_t inputs,
                                     std::size_t outputs, const OutputGrid& grid,
                                     std::vector<std::uint32_t> answers) {
  DifferenceTree tree = Builder(bits, inputs, outputs, grid).build();
  if (answers.empty() && outputs == inputs) {
    answers.resize(outputs);
    std::iota(answers.begin(), answers.end(), 0u);
  }
  tree.answers = std::move(answers);
  return tree;
}

}  // namespace pyflocality
