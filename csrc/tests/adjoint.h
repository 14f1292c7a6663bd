// The spread of posterior weights over windows and masks, and its answer by plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "difference_tree.h"
#include "masked_adjoint.h"
#include "masked_posterior.h"
#include "plain_scan.h"
#include "window_adjoint.h"
#include "window_posterior.h"

namespace {

// Values that a query measures, those that it spreads its weights over, and those whose products
// with a cotangent it takes.
struct Spread {
  std::vector<std::size_t> measured, answered, own;
};

// The windows that take part, with a query for each.
std::vector<Spread> window_spreads(const Shape& shape, std::size_t side, bool inside) {
  const std::size_t before = side / 2, after = side - 1 - before;
  std::vector<Spread> spreads;
  for (std::size_t y = 0; y < shape.height; ++y) {
    for (std::size_t x = 0; x < shape.width; ++x) {
      const bool fits =
          y >= before && x >= before && y + after < shape.height && x + after < shape.width;
      if (inside && !fits) continue;
      Spread spread;
      for (std::size_t d = 0; d < shape.values(); ++d) {
        const std::size_t p = d % shape.pixels(), row = p / shape.width, column = p % shape.width;
        if (row + before >= y && row <= y + after && column + before >= x && column <= x + after) {
          spread.measured.push_back(d);
        }
        if (row == y && column == x) spread.own.push_back(d);
      }
      spread.answered = spread.measured;
      spreads.push_back(spread);
    }
  }
  return spreads;
}

// Sums [batch, sets, dim]: of the weights, or for the directions of a problem as cotangents.
template <typename Stored>
std::vector<double> plain_spread(const Problem<Stored>& problem,
                                 const std::vector<Spread>& spreads) {
  const bool plain = problem.tangent_count == 0;
  const std::size_t sets = plain ? 1 : problem.tangent_count;
  std::vector<double> sums(problem.batch * sets * problem.dim);
  std::vector<double> weight(problem.count), factor(problem.count);
  for (std::size_t b = 0; b < problem.batch; ++b) {
    const auto gap = [&](std::size_t i, std::size_t d, double base) {
      return static_cast<double>(problem.images[i * problem.dim + d]) - base;
    };
    for (const Spread& spread : spreads) {
      for (std::size_t i = 0; i < problem.count; ++i) {
        weight[i] = 0.0;
        for (const std::size_t d : spread.measured) {
          weight[i] += std::pow(gap(i, d, problem.noisy[b * problem.dim + d]), 2);
        }
      }
      const double minimum = *std::min_element(weight.begin(), weight.end());
      double total = 0.0;
      for (double& value : weight) {
        value = std::exp2(-static_cast<double>(problem.scale[b]) * (value - minimum));
        total += value;
      }
      for (double& value : weight) value /= total;
      for (std::size_t k = 0; k < sets; ++k) {
        const std::size_t set = (b * sets + k) * problem.dim;
        factor = weight;
        if (!plain) std::fill(factor.begin(), factor.end(), 0.0);
        for (std::size_t o = 0; o < spread.own.size() && !plain; ++o) {
          const std::size_t d = spread.own[o];
          double mean = 0.0;
          for (std::size_t i = 0; i < problem.count; ++i) mean += weight[i] * gap(i, d, 0.0);
          for (std::size_t i = 0; i < problem.count; ++i) {
            factor[i] += weight[i] * problem.tangents[set + d] * gap(i, d, mean);
          }
        }
        for (const std::size_t d : spread.answered) {
          const double base = plain ? 0.0 : problem.centre[b * problem.dim + d];
          for (std::size_t i = 0; i < problem.count; ++i) {
            sums[set + d] += factor[i] * gap(i, d, base);
          }
        }
      }
    }
  }
  return sums;
}

// Both passes of an operation: run(isa, threads, checkpoint) gives the sums.
using BothPasses = std::function<std::vector<double>(InstructionSet, std::size_t threads,
                                                     const std::function<void()>& checkpoint)>;

// Sums on every instruction set and number of threads.
template <typename Stored>
void check_sums(const std::string& op, const Problem<Stored>& problem,
                const std::vector<Spread>& spreads, const std::vector<std::size_t>& threads,
                const BothPasses& run) {
  const std::vector<double> plain = plain_spread(problem, spreads);
  // Each query adds a weighted mean of values within their range, or such a mean's derivative.
  std::vector<double> queries(problem.dim);
  for (const Spread& spread : spreads) {
    for (const std::size_t d : spread.answered) ++queries[d];
  }
  const double slope = problem.tangent_count == 0
                           ? 1.0
                           : problem.kRange * static_cast<double>(problem.shape.channels);
  for (const NamedInstructionSet& isa : known_instruction_sets()) {
    if (!isa.available) continue;
    const std::string name = op + ", " + isa.name + ", " + problem.name();
    std::vector<double> first;
    for (const std::size_t workers : threads) {
      const std::vector<double> found = run(isa.value, workers, [] {});
      if (first.empty()) first = found;
      expect(found == first, name + ": the bits depend on the threads");
    }
    for (std::size_t k = 0; k < plain.size(); ++k) {
      expect(std::isfinite(first[k]), name + ": not finite");
      // Which of two images at nearly the same distance is nearer is a matter of rounding.
      if (problem.scale[k * problem.batch / plain.size()] == problem.kLargestScale) continue;
      // A tree hands out small sums beside large ones.
      const double allowed = 1e-3 * problem.kRange * slope * (1.0 + queries[k % problem.dim]);
      expect(std::abs(first[k] - plain[k]) <= allowed, name + ": sums");
    }
    struct Interrupt : std::runtime_error {
      using std::runtime_error::runtime_error;
    };
    bool interrupted = false;
    try {
      run(isa.value, 1, [] { throw Interrupt("stop"); });
    } catch (const Interrupt&) {
      interrupted = true;
    }
    expect(interrupted, name + ": an interrupt is lost");
  }
}

// Posterior means [batch, dim] of a scan whose queries answer some values each.
template <typename Stored>
std::vector<float> means(const Problem<Stored>& problem, const Answer& scan) {
  const std::size_t queries = scan.total.size() / problem.batch, values = problem.dim / queries;
  std::vector<float> mean(problem.batch * problem.dim);
  for (std::size_t b = 0; b < problem.batch; ++b) {
    for (std::size_t d = 0; d < problem.dim; ++d) {
      const std::size_t q = b * queries + d % queries;
      const double sum = scan.weighted[q * values + d / queries];
      mean[b * problem.dim + d] = static_cast<float>(sum / scan.total[q]);
    }
  }
  return mean;
}

// A patch set, or transposed derivatives.
template <typename Stored>
void check_window_adjoint(const Problem<Stored>& problem, std::size_t side,
                          const std::vector<std::size_t>& threads) {
  const Shape& shape = problem.shape;
  const bool patches = problem.tangent_count == 0;
  const WindowShape sizes{shape.channels, shape.height, shape.width, side};
  const auto run = [&](InstructionSet isa, std::size_t workers,
                       const std::function<void()>& checkpoint) {
    Answer scan(problem.batch * shape.pixels(), patches ? 0 : shape.channels);
    (patches ? patch_weights : window_posterior)(sizes, problem.stored(), problem.noisy_batch(),
                                                 scan.result(), workers, isa, [] {});
    std::vector<float> mean;
    if (!patches) mean = means(problem, scan);
    const WindowWeights weights{
        scan.minimum.data(),   scan.total.data(), patches ? nullptr : problem.tangents.data(),
        problem.tangent_count, mean.data(),       problem.centre.data()};
    std::vector<double> sums(problem.batch * weights.sums() * problem.dim);
    window_adjoint(sizes, problem.stored(), problem.noisy_batch(), weights, sums.data(), workers,
                   isa, checkpoint);
    return sums;
  };
  const std::string op = patches ? "patch set " : "window adjoint ";
  check_sums(op + std::to_string(side), problem, window_spreads(shape, side, patches), threads,
             run);
}

// A filtered posterior with the answers of `answers`, or transposed derivatives. The trees are
// those of the masks, counted from nowhere or from a centre.
template <typename Stored>
void check_masked_adjoint(const Problem<Stored>& problem, const DifferenceTree& tree,
                          const DifferenceTree& answers, const std::vector<Spread>& spreads,
                          const float* centre, const std::vector<std::size_t>& threads) {
  NoisyBatch batch = problem.noisy_batch();
  batch.centre = centre;
  const bool plain = problem.tangent_count == 0;
  const auto run = [&](InstructionSet isa, std::size_t workers,
                       const std::function<void()>& checkpoint) {
    Answer scan(problem.batch * tree.outputs, tree.answered());
    masked_posterior(tree, problem.stored(), batch, scan.result(), workers, isa, [] {});
    std::vector<float> mean;
    if (!plain) mean = means(problem, scan);
    const MaskedWeights weights{
        scan.minimum.data(),   scan.total.data(), plain ? nullptr : problem.tangents.data(),
        problem.tangent_count, mean.data(),       problem.centre.data()};
    std::vector<double> sums(problem.batch * weights.sums() * problem.dim);
    masked_adjoint(tree, answers, problem.stored(), batch, weights, sums.data(), workers, isa,
                   checkpoint);
    return sums;
  };
  const std::string op = plain ? "filtered" : "masked adjoint";
  check_sums(op + (centre == nullptr ? "" : ", centred"), problem, spreads, threads, run);
}

}  // namespace
