// Sums of second passes, which apply posterior weights over windows and masks, by plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "difference_tree.h"
#include "masked_posterior.h"
#include "plain_scan.h"
#include "window_posterior.h"

namespace {

// Values that a query measures, those that its weights are applied to, and those whose products
// with a cotangent it takes.
struct Applied {
  std::vector<std::size_t> measured, answered, own;
};

// The windows that take part, with a query for each.
std::vector<Applied> applied_windows(const Shape& shape, std::size_t side, bool inside) {
  const std::size_t before = side / 2, after = side - 1 - before;
  std::vector<Applied> queries;
  for (std::size_t y = 0; y < shape.height; ++y) {
    for (std::size_t x = 0; x < shape.width; ++x) {
      const bool fits =
          y >= before && x >= before && y + after < shape.height && x + after < shape.width;
      if (inside && !fits) continue;
      Applied query;
      for (std::size_t d = 0; d < shape.values(); ++d) {
        const std::size_t p = d % shape.pixels(), row = p / shape.width, column = p % shape.width;
        if (row + before >= y && row <= y + after && column + before >= x && column <= x + after) {
          query.measured.push_back(d);
        }
        if (row == y && column == x) query.own.push_back(d);
      }
      query.answered = query.measured;
      queries.push_back(query);
    }
  }
  return queries;
}

// Sums [batch, sets, dim]: of the weights, or for the directions of a problem as cotangents.
template <typename Stored>
std::vector<double> plain_sums(const Problem<Stored>& problem,
                               const std::vector<Applied>& queries) {
  const bool plain = problem.tangent_count == 0;
  const std::size_t sets = plain ? 1 : problem.tangent_count;
  std::vector<double> sums(problem.batch * sets * problem.dim);
  std::vector<double> weight(problem.count), factor(problem.count);
  for (std::size_t b = 0; b < problem.batch; ++b) {
    const auto gap = [&](std::size_t i, std::size_t d, double base) {
      return static_cast<double>(problem.images[i * problem.dim + d]) - base;
    };
    for (const Applied& query : queries) {
      for (std::size_t i = 0; i < problem.count; ++i) {
        weight[i] = 0.0;
        for (const std::size_t d : query.measured) {
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
        for (std::size_t o = 0; o < query.own.size() && !plain; ++o) {
          const std::size_t d = query.own[o];
          double mean = 0.0;
          for (std::size_t i = 0; i < problem.count; ++i) mean += weight[i] * gap(i, d, 0.0);
          for (std::size_t i = 0; i < problem.count; ++i) {
            factor[i] += weight[i] * problem.tangents[set + d] * gap(i, d, mean);
          }
        }
        for (const std::size_t d : query.answered) {
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

// Both passes of an operation: run(pass) gives the sums.
template <typename Stored, typename Run>
void check_sums(const std::string& op, const Problem<Stored>& problem,
                const std::vector<Applied>& queries, const std::vector<std::size_t>& threads,
                const Run& run) {
  const std::vector<double> plain = plain_sums(problem, queries);
  // Each query adds a weighted mean of values within their range, or such a mean's derivative.
  std::vector<double> means(problem.dim);
  for (const Applied& query : queries) {
    for (const std::size_t d : query.answered) ++means[d];
  }
  const double slope = problem.tangent_count == 0
                           ? 1.0
                           : problem.kRange * static_cast<double>(problem.shape.channels);
  check_everywhere(
      op, problem, threads, run, [&](const std::string& name, const std::vector<double>& sums) {
        for (std::size_t k = 0; k < plain.size(); ++k) {
          expect(std::isfinite(sums[k]), name + ": not finite");
          // Which of two images at nearly the same distance is nearer is a matter of rounding.
          if (problem.scale[k * problem.batch / plain.size()] == problem.kLargestScale) continue;
          // A tree hands out small sums beside large ones.
          const double allowed = 1e-3 * problem.kRange * slope * (1.0 + means[k % problem.dim]);
          expect(std::abs(sums[k] - plain[k]) <= allowed, name + ": sums");
        }
      });
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

// Sums of a second pass after a scan, apply(weights, sums): with the directions of a problem
// as cotangents, if it has any.
template <typename Stored, typename Apply>
std::vector<double> sums_after(const Problem<Stored>& problem, const Answer& scan,
                               const Apply& apply) {
  PosteriorWeights weights{scan.minimum.data(), scan.total.data()};
  std::vector<float> mean;
  if (problem.tangent_count > 0) {
    mean = means(problem, scan);
    weights.cotangents = problem.tangents.data();
    weights.count = problem.tangent_count;
    weights.mean = mean.data();
    weights.centre = problem.centre.data();
  }
  std::vector<double> sums(problem.batch * weights.count * problem.dim);
  apply(weights, sums.data());
  return sums;
}

// The pass of a scan before a second pass, which interrupts are not meant for.
inline Pass undisturbed(Pass pass) {
  pass.checkpoint = [] {};
  return pass;
}

// A patch set, or vector-Jacobian products.
template <typename Stored>
void check_window_sums(const Problem<Stored>& problem, std::size_t side,
                       const std::vector<std::size_t>& threads) {
  const Shape& shape = problem.shape;
  const bool patches = problem.tangent_count == 0;
  const WindowShape sizes{shape.channels, shape.height, shape.width, side};
  const auto run = [&](const Pass& pass) {
    Answer scan(problem.batch * shape.pixels(), patches ? 0 : shape.channels);
    (patches ? patch_set_scan : window_posterior)(undisturbed(pass), sizes, scan.result());
    return sums_after(problem, scan, [&](const PosteriorWeights& weights, double* sums) {
      window_posterior_vjp(pass, sizes, weights, sums);
    });
  };
  const std::string op = patches ? "patch set " : "window vjp ";
  check_sums(op + std::to_string(side), problem, applied_windows(shape, side, patches), threads,
             run);
}

// A filtered posterior with the answers of `answers`, or vector-Jacobian products. The trees are
// those of the masks.
template <typename Stored>
void check_masked_sums(const Problem<Stored>& problem, const DifferenceTree& tree,
                       const DifferenceTree& answers, const std::vector<Applied>& queries,
                       const std::vector<std::size_t>& threads) {
  const auto run = [&](const Pass& pass) {
    Answer scan(problem.batch * tree.outputs, tree.answered());
    masked_posterior(undisturbed(pass), tree, scan.result());
    return sums_after(problem, scan, [&](const PosteriorWeights& weights, double* sums) {
      masked_posterior_vjp(pass, tree, answers, weights, sums);
    });
  };
  const std::string op = problem.tangent_count == 0 ? "filtered" : "masked vjp";
  check_sums(op + (problem.counted_from == nullptr ? "" : ", centred"), problem, queries, threads,
             run);
}

}  // namespace
