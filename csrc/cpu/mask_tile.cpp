// Marks the entries of a matrix product that reach a cutoff, from its values in single precision.
//
// An entry is certain where its value lies farther from the cutoff than its error may be. Bounds
// are taken a little wider than they are, by far more than what forming them in single precision
// rounds. The few entries between them are sums of their terms in double precision.

#include "mask_tile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "memory.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

namespace pyflocality {
namespace {

// Entries this close to the cutoff, as a share of it, are counted.
constexpr double kNear = 1e-6;
// By how much cutoffs are moved apart: beyond kNear, and what single precision rounds.
constexpr double kApart = 2e-6;
// Columns that are looked at together, a multiple of all lanes.
constexpr std::size_t kColumns = 16;

// What columns are compared with, whole vectors; behind the last column nothing is reached.
struct Columns {
  explicit Columns(const MaskTile& tile)
      : size((tile.columns + kColumns - 1) / kColumns * kColumns),
        low(size),
        high(size),
        slack(size) {
    for (std::size_t j = 0; j < size; ++j) {
      const bool inside = j < tile.columns;
      const double none = std::numeric_limits<double>::infinity();
      low.data()[j] = static_cast<float>(inside ? tile.cutoffs[j] * (1.0 - kApart) : none);
      high.data()[j] = static_cast<float>(inside ? tile.cutoffs[j] * (1.0 + kApart) : none);
      slack.data()[j] = inside ? tile.column_slack[j] * 1.00001F : 0.0F;
    }
  }

  std::size_t size;
  AlignedArray<float> low, high, slack;
};

// An instruction set gives look: of 16 columns from j on, which surely reach their cutoffs, and
// which may. The first column is the highest of the 16 bits.
struct Looked {
  std::uint32_t sure, maybe;
};

struct Portable {
  static Looked look(const float* values, float row_slack, const Columns& columns, std::size_t j) {
    Looked result{0, 0};
    for (std::size_t k = 0; k < kColumns; ++k) {
      const float value = std::abs(values[k]), slack = row_slack * columns.slack.data()[j + k];
      const std::uint32_t bit = 0x8000U >> k;
      if (value >= columns.high.data()[j + k] + slack) result.sure |= bit;
      if (value >= columns.low.data()[j + k] - slack) result.maybe |= bit;
    }
    return result;
  }
};

#if PYFLOCALITY_X86

// The bits of 16 lanes the other way round.
inline std::uint32_t reversed(std::uint32_t bits) {
  bits = (bits & 0x5555U) << 1 | (bits >> 1 & 0x5555U);
  bits = (bits & 0x3333U) << 2 | (bits >> 2 & 0x3333U);
  bits = (bits & 0x0F0FU) << 4 | (bits >> 4 & 0x0F0FU);
  return (bits & 0x00FFU) << 8 | (bits >> 8 & 0x00FFU);
}

struct Avx2 {
  PYFLOCALITY_TARGET("avx2")
  static std::uint32_t bits(__m256 reached) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(reached));
  }

  PYFLOCALITY_TARGET("avx2")
  static Looked look(const float* values, float row_slack, const Columns& columns, std::size_t j) {
    const __m256 sign = _mm256_set1_ps(-0.0F), factor = _mm256_set1_ps(row_slack);
    std::uint32_t sure = 0, maybe = 0;
    for (int half = 0; half < 2; ++half, j += 8, values += 8) {
      const __m256 value = _mm256_andnot_ps(sign, _mm256_loadu_ps(values));
      const __m256 slack = _mm256_mul_ps(factor, _mm256_load_ps(columns.slack.data() + j));
      const __m256 high = _mm256_add_ps(_mm256_load_ps(columns.high.data() + j), slack);
      const __m256 low = _mm256_sub_ps(_mm256_load_ps(columns.low.data() + j), slack);
      sure |= bits(_mm256_cmp_ps(value, high, _CMP_GE_OQ)) << 8 * half;
      maybe |= bits(_mm256_cmp_ps(value, low, _CMP_GE_OQ)) << 8 * half;
    }
    return {reversed(sure), reversed(maybe)};
  }
};

struct Avx512 {
  PYFLOCALITY_TARGET("avx512f")
  static Looked look(const float* values, float row_slack, const Columns& columns, std::size_t j) {
    const __m512 value = _mm512_abs_ps(_mm512_loadu_ps(values));
    const __m512 slack =
        _mm512_mul_ps(_mm512_set1_ps(row_slack), _mm512_load_ps(columns.slack.data() + j));
    const __m512 high = _mm512_add_ps(_mm512_load_ps(columns.high.data() + j), slack);
    const __m512 low = _mm512_sub_ps(_mm512_load_ps(columns.low.data() + j), slack);
    return {reversed(_mm512_cmp_ps_mask(value, high, _CMP_GE_OQ)),
            reversed(_mm512_cmp_ps_mask(value, low, _CMP_GE_OQ))};
  }
};

#endif

// An entry in double precision.
double entry(const MaskTile& tile, std::size_t i, std::size_t j) {
  const double* left = tile.factor + static_cast<std::size_t>(tile.places[i]) * tile.stride;
  const double* right = tile.factor + (tile.first_column + j) * tile.stride;
  // Sums that do not wait for one another.
  constexpr std::size_t kSums = 8;
  double sums[kSums] = {};
  std::size_t k = 0;
  for (; k + kSums <= tile.terms; k += kSums) {
    for (std::size_t s = 0; s < kSums; ++s) {
      sums[s] += left[k + s] * tile.coefficients[k + s] * right[k + s];
    }
  }
  for (; k < tile.terms; ++k) sums[0] += left[k] * tile.coefficients[k] * right[k];
  double sum = 0.0;
  for (const double part : sums) sum += part;
  return sum;
}

template <typename Isa>
MarkedTile mark(const MaskTile& tile, std::size_t most_left_open, std::uint8_t* bits) {
  const Columns columns(tile);
  const std::size_t stride = (tile.columns + 7) / 8;
  struct Place {
    std::size_t i, j;
  };
  std::vector<Place> open;
  const auto note = [&](const Looked& looked, std::size_t i, std::size_t j) {
    for (std::uint32_t k = 0; k < kColumns; ++k) {
      if ((looked.maybe & ~looked.sure) & 0x8000U >> k) open.push_back({i, j + k});
    }
  };
  for (std::size_t i = 0; i < tile.rows; ++i) {
    const float* values = tile.values + i * tile.columns;
    const float slack = tile.row_slack[i] * 1.00001F;
    std::uint8_t* row = bits + i * stride;
    for (std::size_t j = 0; j < tile.columns; j += kColumns) {
      Looked looked;
      if (j + kColumns <= tile.columns) {
        looked = Isa::look(values + j, slack, columns, j);
      } else {
        float last[kColumns] = {};
        std::copy(values + j, values + tile.columns, last);
        looked = Isa::look(last, slack, columns, j);
      }
      row[j / 8] = static_cast<std::uint8_t>(looked.sure >> 8);
      if (j + 8 < tile.columns) row[j / 8 + 1] = static_cast<std::uint8_t>(looked.sure & 0xFFU);
      if (looked.sure != looked.maybe) note(looked, i, j);
    }
    if (open.size() > most_left_open) return {false, 0};
  }
  std::size_t near = 0;
  for (const auto& [i, j] : open) {
    const double value = std::abs(entry(tile, i, j)), cutoff = tile.cutoffs[j];
    if (std::abs(value - cutoff) <= kNear * cutoff) ++near;
    if (value >= cutoff) bits[i * stride + j / 8] |= static_cast<std::uint8_t>(0x80U >> j % 8);
  }
  return {true, near};
}

}  // namespace

MarkedTile mark_tile(const MaskTile& tile, std::size_t most_left_open, InstructionSet isa,
                     std::uint8_t* bits) {
  switch (isa) {
#if PYFLOCALITY_X86
    case InstructionSet::kAvx512Vnni:
    case InstructionSet::kAvx512:
      return mark<Avx512>(tile, most_left_open, bits);
    case InstructionSet::kAvx2:
      return mark<Avx2>(tile, most_left_open, bits);
#endif
    default:
      return mark<Portable>(tile, most_left_open, bits);
  }
}

}  // namespace pyflocality
