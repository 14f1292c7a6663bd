#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_features.h"

namespace pyflocality {

// Entries of a product F diag(c) F^T in single precision, each with a bound of its error, and what
// they are compared with:
//
//   values             [rows, columns], off by row_slack[i] column_slack[j] at most
//   row_slack          [rows]
//   column_slack       [columns]
//   cutoffs            [columns], positive
//   factor             F, [.., terms], rows `stride` apart; of what the bounds do not decide
//   coefficients       c, [terms]
//   places             [rows]: the row of F that row i belongs to
//   first_column       the row of F that column 0 belongs to
struct MaskTile {
  const float* values;
  std::size_t rows, columns;
  const float* row_slack;
  const float* column_slack;
  const double* cutoffs;
  const double* factor;
  const double* coefficients;
  std::size_t terms, stride;
  const std::int64_t* places;
  std::size_t first_column;
};

// What came of a tile.
struct MarkedTile {
  // Whether no more entries than were allowed were left to double precision; else nothing counts.
  bool done;
  // Entries within 1e-6 of their cutoff, as a share of it.
  std::size_t near;
};

// bits[i, j] = |(F diag(c) F^T)_ij| >= cutoffs[j], [rows, ceil(columns / 8)], the first column in
// the highest bit and zeros behind the last. An entry whose value and slack leave that open is
// formed again in double precision. All is done on the calling thread.
MarkedTile mark_tile(const MaskTile& tile, std::size_t most_left_open, InstructionSet isa,
                     std::uint8_t* bits);

}  // namespace pyflocality
