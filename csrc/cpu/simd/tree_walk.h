// The two ways along a difference tree. Included by kernel files, and by difference_tree.cpp.

// Forms the sums of all nodes from one another, in the order of the schedule. `sums` holds the sum
// at hand and does what the schedule says:
//
//   clear()                          begin with nothing
//   recall(slot), keep(slot)         begin with a sum that was kept; keep the sum at hand
//   accumulate<plus>(inputs, count)  add or subtract the terms of some inputs
//   answer(output)                   the sum at hand is that of an output
template <typename Sums>
inline void walk(const DifferenceTree& tree, Sums& sums) {
  for (const DifferenceTree::Node& node : tree.nodes) {
    if (node.from == DifferenceTree::kFromEmpty) {
      sums.clear();
    } else if (node.from != DifferenceTree::kFromLast) {
      sums.recall(static_cast<std::size_t>(node.from));
    }
    const std::uint32_t* inputs = tree.inputs.data() + node.begin;
    sums.template accumulate<true>(inputs, node.plus);
    sums.template accumulate<false>(inputs + node.plus, node.minus);
    if (node.keep != DifferenceTree::kNowhere) sums.keep(static_cast<std::size_t>(node.keep));
    if (node.output != DifferenceTree::kSilent) sums.answer(static_cast<std::size_t>(node.output));
  }
}

// The transpose of walk(), from the last node to the first: a node gathers what its own output
// gives and what the nodes gathered that begin with its sum, and gives all of it to its inputs,
// with the other sign to those that it subtracts, and to the node that it begins with.
//
//   clear()                            there is nothing at hand
//   gather(output), recall(slot)       add what an output gives, or what was passed to a slot
//   hand_out<plus>(inputs, count)      give what is at hand to some inputs
//   pass(slot)                         add what is at hand to a slot
template <typename Sums>
inline void walk_back(const DifferenceTree& tree, Sums& sums) {
  // Whether the node behind continues this one's sum.
  bool continues = false;
  for (auto node = tree.nodes.rbegin(); node != tree.nodes.rend(); ++node) {
    if (!continues) sums.clear();
    if (node->keep != DifferenceTree::kNowhere) sums.recall(static_cast<std::size_t>(node->keep));
    if (node->output != DifferenceTree::kSilent) {
      sums.gather(static_cast<std::size_t>(node->output));
    }
    const std::uint32_t* inputs = tree.inputs.data() + node->begin;
    sums.template hand_out<true>(inputs, node->plus);
    sums.template hand_out<false>(inputs + node->plus, node->minus);
    continues = node->from == DifferenceTree::kFromLast;
    if (node->from >= 0) sums.pass(static_cast<std::size_t>(node->from));
  }
}
