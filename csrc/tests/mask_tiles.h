// Entries of a product that reach their cutoffs, beside plain loops.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "mask_tile.h"
#include "plain_scan.h"

namespace {

using namespace pyflocality;

// Rows in descending order, and columns from the second row of the factor on.
void check_mask_tile(std::size_t rows, std::size_t columns, std::size_t terms) {
  Random random(static_cast<std::uint32_t>(rows * 1000 + columns + terms));
  const auto number = [&] { return random.below(2001) / 1000.0 - 1.0; };
  const std::size_t all = std::max(rows, columns + 1);
  std::vector<double> factor(all * terms), coefficients(terms), cutoffs(columns);
  for (double& value : factor) value = number();
  for (double& value : coefficients) value = number() + 1.0;
  for (double& value : cutoffs) value = 0.01 + random.below(100) * 0.01;
  std::vector<std::int64_t> places;
  for (std::size_t i = 0; i < rows; ++i) places.push_back(static_cast<std::int64_t>(all - 1 - i));
  std::vector<double> plain(rows * columns);
  std::vector<float> values, row_slack(rows, 0.5F), column_slack(columns, 0.25F);
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t j = 0; j < columns; ++j) {
      double& sum = plain[i * columns + j];
      for (std::size_t k = 0; k < terms; ++k) {
        sum += factor[(all - 1 - i) * terms + k] * coefficients[k] * factor[(1 + j) * terms + k];
      }
      // As far off as the slack allows.
      values.push_back(static_cast<float>(sum + 0.124 * number()));
    }
  }
  // Entries on the cutoff, where one sum has but one order of its terms.
  if (terms == 1) cutoffs[0] = std::max(1e-9, std::abs(plain[0]));
  const MaskTile tile{values.data(),
                      rows,
                      columns,
                      row_slack.data(),
                      column_slack.data(),
                      cutoffs.data(),
                      factor.data(),
                      coefficients.data(),
                      terms,
                      terms,
                      places.data(),
                      1};
  const std::size_t stride = (columns + 7) / 8;
  for (const NamedInstructionSet& isa : known_instruction_sets()) {
    if (!isa.available) continue;
    const std::string name = std::string("mask tile, ") + isa.name + ", " + std::to_string(rows) +
                             " x " + std::to_string(columns) + " x " + std::to_string(terms);
    std::vector<std::uint8_t> bits(rows * stride, 0xFF);
    const MarkedTile marked = mark_tile(tile, rows * columns, isa.value, bits.data());
    expect(marked.done, name + ": not done");
    for (std::size_t i = 0; i < rows; ++i) {
      for (std::size_t j = 0; j < 8 * stride; ++j) {
        const bool found = (bits[i * stride + j / 8] & 0x80U >> j % 8) != 0;
        const double apart = j < columns ? std::abs(plain[i * columns + j]) - cutoffs[j] : -1.0;
        // Another order of the terms moves a sum by less than that.
        expect(found == (apart >= 0.0) || (terms > 1 && std::abs(apart) < 1e-12), name + ": bits");
      }
    }
    const MarkedTile refused = mark_tile(tile, 0, isa.value, bits.data());
    expect(!refused.done || refused.near == 0, name + ": nothing may be left open");
  }
}

}  // namespace
