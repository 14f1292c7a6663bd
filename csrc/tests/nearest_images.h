// The search of nearest images beside plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "nearest.h"
#include "plain_scan.h"

namespace {

using namespace pyflocality;

// Every image that may be among the k nearest is a candidate, and its value is right.
void check_candidates(const std::vector<NearestCandidate>& found,
                      const std::vector<long double>& values, std::size_t k,
                      const std::string& name) {
  std::vector<long double> ordered = values;
  std::sort(ordered.begin(), ordered.end());
  std::vector<bool> listed(values.size());
  for (const NearestCandidate& candidate : found) {
    listed[candidate.image] = true;
    expect(std::abs(candidate.value - values[candidate.image]) <= candidate.slack,
           name + ": values");
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    expect(listed[i] || values[i] > ordered[k - 1], name + ": an image is missing");
  }
}

void check_nearest(std::size_t count, std::size_t dim, const std::vector<std::size_t>& threads) {
  constexpr std::size_t kBatch = 7;
  Random random(static_cast<std::uint32_t>(count * 1000 + dim));
  std::vector<std::uint8_t> images(count * dim);
  for (std::uint8_t& value : images) value = static_cast<std::uint8_t>(random.below(256));
  std::vector<double> noisy(kBatch * dim), limit(kBatch, std::numeric_limits<double>::infinity());
  std::vector<std::vector<long double>> values(kBatch, std::vector<long double>(count));
  for (std::size_t b = 0; b < kBatch; ++b) {
    for (std::size_t d = 0; d < dim; ++d) {
      noisy[b * dim + d] = random.below(256) * std::pow(10.0, b) + random.below(1000) / 1000.0;
    }
    for (std::size_t i = 0; i < count; ++i) {
      for (std::size_t d = 0; d < dim; ++d) {
        const long double byte = images[i * dim + d];
        values[b][i] += byte * (byte - 2 * static_cast<long double>(noisy[b * dim + d]));
      }
    }
  }
  const NearestQueries queries{noisy.data(), limit.data(), kBatch};
  for (const NamedInstructionSet& isa : known_instruction_sets()) {
    if (!isa.available) continue;
    for (const std::size_t workers : threads) {
      for (const std::size_t k : {std::size_t{1}, (count + 1) / 2}) {
        const auto found =
            nearest_candidates(images.data(), count, dim, queries, k, workers, isa.value, [] {});
        const std::string name = std::string("nearest, ") + isa.name + ", " +
                                 std::to_string(count) + " x " + std::to_string(dim);
        for (std::size_t b = 0; b < kBatch; ++b) check_candidates(found[b], values[b], k, name);
      }
    }
  }
}

// Distances of as many images, in turns to one of the noisy images.
void check_pairs(std::size_t count, std::size_t dim, const std::vector<std::size_t>& threads) {
  Random random(static_cast<std::uint32_t>(count + dim));
  std::vector<std::uint8_t> images(count * dim);
  for (std::uint8_t& value : images) value = static_cast<std::uint8_t>(random.below(256));
  std::vector<double> noisy(3 * dim), plain(count);
  for (double& value : noisy) value = random.below(1000) / 500.0 - 1.0;
  const std::vector<double> alpha{1.0, 0.5, 1e-3};
  std::vector<std::int64_t> owner;
  for (std::size_t i = 0; i < count; ++i) {
    owner.push_back(static_cast<std::int64_t>(i % 3));
    for (std::size_t d = 0; d < dim; ++d) {
      const double value = images[i * dim + d] / 127.5 - 1.0;
      plain[i] += std::pow(noisy[i % 3 * dim + d] - alpha[i % 3] * value, 2);
    }
  }
  for (const std::size_t workers : threads) {
    std::vector<double> found(count);
    pair_distances({images.data(), count, dim, noisy.data(), alpha.data(), owner.data()}, workers,
                   found.data());
    for (std::size_t i = 0; i < count; ++i) {
      // Sums of `dim` terms in another order.
      expect(std::abs(found[i] - plain[i]) <= 1e-15 * static_cast<double>(dim) * plain[i],
             "distances of pairs");
    }
  }
}

}  // namespace
