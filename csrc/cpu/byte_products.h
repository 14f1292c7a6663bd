// Inner products of 8-bit images with 16-bit integers, exactly, for each instruction set.
//
// An instruction set gives
//   kStep                values that are multiplied together
//   kImages, kRows       images and rows of integers whose products are formed together
//   kPiece               steps whose sums 32 bits hold
//   multiply<rows>(tile, packed, stride, sums)
//                        sums[row * kImages + image] of the images of a tile and rows that lie
//                        `stride` integers apart
//   square(tile, sums)   sums[image] of the squares of the bytes
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu_features.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

namespace pyflocality {

// The largest factor: kPiece steps of its products with bytes, two to a lane, stay below 2^31.
constexpr int kLargestFactor = 32767;

// Images side by side: pointers to the bytes of each.
//
// Values come in steps. Where they do not fill the last one it begins early: the integers of its
// first values, which the step before has already, are zero.
template <std::size_t kCount, std::size_t kStep>
struct ByteTile {
  static constexpr std::size_t kImages = kCount;

  // Images of few values are copied beside zeros; missing images are the first one again.
  ByteTile(const std::uint8_t* const* from, std::size_t count, std::size_t dim)
      : dim(std::max(dim, kStep)), steps(steps_of(dim)) {
    for (std::size_t i = 0; i < kImages; ++i) {
      images[i] = from[i < count ? i : 0];
      if (dim >= kStep) continue;
      std::memset(padded[i], 0, kStep);
      std::memcpy(padded[i], images[i], dim);
      images[i] = padded[i];
    }
  }
  ByteTile(const ByteTile&) = delete;
  ByteTile& operator=(const ByteTile&) = delete;

  static constexpr std::size_t steps_of(std::size_t dim) { return (dim + kStep - 1) / kStep; }
  // Where a step begins.
  std::size_t first(std::size_t step) const {
    return step + 1 < steps ? step * kStep : dim - kStep;
  }

  std::size_t dim, steps;
  const std::uint8_t* images[kImages];
  std::uint8_t padded[kImages][kStep];
};

// A row of integers [dim] in steps: packed [steps_of(dim) * kStep].
template <typename Isa>
void pack_row(const std::int16_t* row, std::size_t dim, std::int16_t* packed) {
  constexpr std::size_t kStep = Isa::kStep;
  const std::size_t steps = Isa::Tile::steps_of(dim), before = (steps - 1) * kStep;
  std::fill(std::copy_n(row, before, packed), packed + steps * kStep, 0);
  // Few values stay at the beginning of their only step.
  std::copy(row + before, row + dim, packed + (dim < kStep ? 0 : steps * kStep - (dim - before)));
}

// Adds the squares of the bytes from `first` on.
template <typename Tile>
inline void add_squares(const Tile& tile, std::size_t first, std::int64_t* sums) {
  for (std::size_t i = 0; i < Tile::kImages; ++i) {
    for (std::size_t d = first; d < tile.dim; ++d) {
      sums[i] += std::int64_t{tile.images[i][d]} * tile.images[i][d];
    }
  }
}

struct PortableProducts {
  static constexpr std::size_t kStep = 16, kImages = 4, kRows = 2, kPiece = 16;
  using Tile = ByteTile<kImages, kStep>;

  template <std::size_t rows>
  static void multiply(const Tile& tile, const std::int16_t* packed, std::size_t stride,
                       std::int64_t* sums) {
    std::fill_n(sums, rows * kImages, 0);
    for (std::size_t start = 0; start < tile.steps; start += kPiece) {
      const std::size_t end = std::min(start + kPiece, tile.steps);
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t i = 0; i < kImages; ++i) {
          std::int32_t sum = 0;
          for (std::size_t step = start; step < end; ++step) {
            const std::uint8_t* values = tile.images[i] + tile.first(step);
            const std::int16_t* factors = packed + row * stride + step * kStep;
            for (std::size_t d = 0; d < kStep; ++d) sum += std::int32_t{values[d]} * factors[d];
          }
          sums[row * kImages + i] += sum;
        }
      }
    }
  }

  static void square(const Tile& tile, std::int64_t* sums) {
    std::fill_n(sums, kImages, 0);
    add_squares(tile, 0, sums);
  }
};

#if PYFLOCALITY_X86

// Bytes as 16-bit integers, whose products with others are added up in pairs.
struct Avx2Products {
  static constexpr std::size_t kStep = 16, kImages = 4, kRows = 2, kPiece = 128;
  // Steps whose sums of squares 32 bits hold.
  static constexpr std::size_t kSquaresPiece = 8192;
  using Tile = ByteTile<kImages, kStep>;

  PYFLOCALITY_TARGET("avx2")
  static __m256i load(const std::uint8_t* values) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }

  PYFLOCALITY_TARGET("avx2")
  static std::int64_t sum_of_lanes(__m256i a) {
    const __m256i halves = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(a)),
                                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(a, 1)));
    alignas(32) std::int64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), halves);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }

  template <std::size_t rows>
  PYFLOCALITY_TARGET("avx2")
  static void multiply(const Tile& tile, const std::int16_t* packed, std::size_t stride,
                       std::int64_t* sums) {
    std::fill_n(sums, rows * kImages, 0);
    for (std::size_t start = 0; start < tile.steps; start += kPiece) {
      const std::size_t end = std::min(start + kPiece, tile.steps);
      __m256i local[rows][kImages];
      for (auto& row : local) std::fill_n(row, kImages, _mm256_setzero_si256());
      for (std::size_t step = start; step < end; ++step) {
        const std::size_t first = tile.first(step);
        __m256i values[kImages];
        for (std::size_t i = 0; i < kImages; ++i) values[i] = load(tile.images[i] + first);
        for (std::size_t row = 0; row < rows; ++row) {
          const __m256i factors = _mm256_load_si256(
              reinterpret_cast<const __m256i*>(packed + row * stride + step * kStep));
          for (std::size_t i = 0; i < kImages; ++i) {
            local[row][i] = _mm256_add_epi32(local[row][i], _mm256_madd_epi16(values[i], factors));
          }
        }
      }
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t i = 0; i < kImages; ++i) {
          sums[row * kImages + i] += sum_of_lanes(local[row][i]);
        }
      }
    }
  }

  PYFLOCALITY_TARGET("avx2")
  static void square(const Tile& tile, std::int64_t* sums) {
    const std::size_t whole = tile.dim / kStep;
    std::fill_n(sums, kImages, 0);
    for (std::size_t start = 0; start < whole; start += kSquaresPiece) {
      const std::size_t end = std::min(start + kSquaresPiece, whole);
      for (std::size_t i = 0; i < kImages; ++i) {
        __m256i sum = _mm256_setzero_si256();
        for (std::size_t step = start; step < end; ++step) {
          const __m256i values = load(tile.images[i] + step * kStep);
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(values, values));
        }
        sums[i] += sum_of_lanes(sum);
      }
    }
    add_squares(tile, whole * kStep, sums);
  }
};

// The same with twice the lanes, and one instruction for products and sums where there is one.
template <bool kVnni>
struct Avx512Products {
  static constexpr std::size_t kStep = 32, kImages = 6, kRows = 4, kPiece = 128;
  static constexpr std::size_t kSquaresPiece = 8192;
  using Tile = ByteTile<kImages, kStep>;

  PYFLOCALITY_TARGET("avx512f,avx512bw")
  static __m512i load(const std::uint8_t* values) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  }

  PYFLOCALITY_TARGET("avx512f,avx512bw")
  static std::int64_t sum_of_lanes(__m512i a) {
    return _mm512_reduce_add_epi64(
        _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(a)),
                         _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(a, 1))));
  }

  PYFLOCALITY_TARGET("avx512f,avx512bw")
  static void add_products(__m512i& sums, __m512i values, __m512i factors) {
    if constexpr (kVnni) {
      // GCC 12 copies the sums before and after its intrinsic, to more registers than there are.
      asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(factors));
    } else {
      sums = _mm512_add_epi32(sums, _mm512_madd_epi16(values, factors));
    }
  }

  template <std::size_t rows>
  PYFLOCALITY_TARGET("avx512f,avx512bw")
  static void multiply(const Tile& tile, const std::int16_t* packed, std::size_t stride,
                       std::int64_t* sums) {
    std::fill_n(sums, rows * kImages, 0);
    for (std::size_t start = 0; start < tile.steps; start += kPiece) {
      const std::size_t end = std::min(start + kPiece, tile.steps);
      __m512i local[rows][kImages];
      for (auto& row : local) std::fill_n(row, kImages, _mm512_setzero_si512());
      for (std::size_t step = start; step < end; ++step) {
        const std::size_t first = tile.first(step);
        __m512i values[kImages];
        for (std::size_t i = 0; i < kImages; ++i) values[i] = load(tile.images[i] + first);
        for (std::size_t row = 0; row < rows; ++row) {
          const __m512i factors = _mm512_load_si512(packed + row * stride + step * kStep);
          for (std::size_t i = 0; i < kImages; ++i) {
            add_products(local[row][i], values[i], factors);
          }
        }
      }
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t i = 0; i < kImages; ++i) {
          sums[row * kImages + i] += sum_of_lanes(local[row][i]);
        }
      }
    }
  }

  PYFLOCALITY_TARGET("avx512f,avx512bw")
  static void square(const Tile& tile, std::int64_t* sums) {
    const std::size_t whole = tile.dim / kStep;
    std::fill_n(sums, kImages, 0);
    for (std::size_t start = 0; start < whole; start += kSquaresPiece) {
      const std::size_t end = std::min(start + kSquaresPiece, whole);
      for (std::size_t i = 0; i < kImages; ++i) {
        __m512i sum = _mm512_setzero_si512();
        for (std::size_t step = start; step < end; ++step) {
          const __m512i values = load(tile.images[i] + step * kStep);
          add_products(sum, values, values);
        }
        sums[i] += sum_of_lanes(sum);
      }
    }
    add_squares(tile, whole * kStep, sums);
  }
};

#endif  // PYFLOCALITY_X86

}  // namespace pyflocality
