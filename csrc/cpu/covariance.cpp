// Sums of products of 8-bit images: the upper triangle of C^T C, a symmetric rank-k update.
//
// A block of images is first packed into panels of a few columns (values of the image), so that
// the inner loop reads consecutive memory. Every output tile is then computed by one thread in
// 32-bit integers that cannot overflow within a block, and added to the 64-bit totals.
//
// Packed word: the bytes of kUnit consecutive images at one value, side by side, as one
// multiply-add instruction wants them. Panel: [words][kPanel columns].

#include "covariance.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"
#include "pyflocality/pixel.h"
#include "threads.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

namespace pyflocality {
namespace {

constexpr std::size_t kTileEdge = 256;      // columns and rows of an output tile, at most
constexpr std::size_t kMinTileEdge = 64;    // smaller tiles would only repeat reads
constexpr std::size_t kWordsPerPass = 128;  // words of a panel that stay in the first-level cache
constexpr std::size_t kPackedBytes = std::size_t{32} << 20;
constexpr std::size_t kMinBlock = 256;
constexpr std::size_t kMaxBlock = 16384;
static_assert(kMaxBlock <= kMaxImagesStoredCentred, "32-bit sums of a block must not overflow");
static_assert(kMaxBlock <= kMaxImagesCentredCentred, "32-bit sums of a block must not overflow");

constexpr std::size_t round_up(std::size_t value, std::size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// An instruction set gives
//   Word, kUnit, kPanel   the packed layout; kRows divides kPanel divides kMinTileEdge
//   kRightStored          whether the right factor is the stored byte u instead of c (the
//                         instruction multiplies signed by unsigned); the sums then exceed those
//                         of c c' by 128 times the left factor's sum
//   left, right           a word from kUnit rows of bytes at column j
//   multiply              out[kRows, kPanel] += left[words, kRows]^T right[words, kPanel], where
//                         consecutive words of both factors lie kPanel apart

struct Portable {
  using Word = std::int16_t;
  static constexpr std::size_t kUnit = 1, kPanel = 8, kRows = 4;
  static constexpr bool kRightStored = false;

  static Word left(const std::uint8_t (*rows)[kPanel], std::size_t j) {
    return static_cast<Word>(centred_byte(rows[0][j]));
  }

  static void multiply(const Word* left, const Word* right, std::size_t words, std::int32_t* out,
                       std::size_t stride) {
    std::int32_t sums[kRows][kPanel] = {};
    for (std::size_t w = 0; w < words; ++w, left += kPanel, right += kPanel) {
      for (std::size_t r = 0; r < kRows; ++r) {
        for (std::size_t j = 0; j < kPanel; ++j) sums[r][j] += std::int32_t{left[r]} * right[j];
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t j = 0; j < kPanel; ++j) out[r * stride + j] += sums[r][j];
    }
  }
};

#if PYFLOCALITY_X86

// Words of two centred 16-bit values, for multiply-add of pairs.
template <std::size_t kColumns>
struct PairWords {
  using Word = std::uint32_t;
  static constexpr std::size_t kUnit = 2, kPanel = kColumns;
  static constexpr bool kRightStored = false;

  static Word left(const std::uint8_t (*rows)[kPanel], std::size_t j) {
    const Word low = static_cast<std::uint16_t>(centred_byte(rows[0][j]));
    const Word high = static_cast<std::uint16_t>(centred_byte(rows[1][j]));
    return low | high << 16;
  }
};

struct Avx2 : PairWords<16> {
  static constexpr std::size_t kRows = 4;

  PYFLOCALITY_TARGET("avx2")
  static void multiply(const Word* left, const Word* right, std::size_t words, std::int32_t* out,
                       std::size_t stride) {
    __m256i sums[kRows][2];
    for (std::size_t r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (std::size_t w = 0; w < words; ++w, left += kPanel, right += kPanel) {
      const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(right));
      const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(right + 8));
      for (std::size_t r = 0; r < kRows; ++r) {
        const __m256i factor = _mm256_set1_epi32(static_cast<int>(left[r]));
        sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(factor, low));
        sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(factor, high));
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t half = 0; half < 2; ++half) {
        auto* target = reinterpret_cast<__m256i*>(out + r * stride + 8 * half);
        _mm256_store_si256(target, _mm256_add_epi32(_mm256_load_si256(target), sums[r][half]));
      }
    }
  }
};

struct Avx512 : PairWords<32> {
  static constexpr std::size_t kRows = 8;

  PYFLOCALITY_TARGET("avx512f,avx512bw")
  static void multiply(const Word* left, const Word* right, std::size_t words, std::int32_t* out,
                       std::size_t stride) {
    __m512i sums[kRows][2];
    for (std::size_t r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (std::size_t w = 0; w < words; ++w, left += kPanel, right += kPanel) {
      const __m512i low = _mm512_load_si512(right);
      const __m512i high = _mm512_load_si512(right + 16);
      for (std::size_t r = 0; r < kRows; ++r) {
        const __m512i factor = _mm512_set1_epi32(static_cast<int>(left[r]));
        sums[r][0] = _mm512_add_epi32(sums[r][0], _mm512_madd_epi16(factor, low));
        sums[r][1] = _mm512_add_epi32(sums[r][1], _mm512_madd_epi16(factor, high));
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t half = 0; half < 2; ++half) {
        std::int32_t* target = out + r * stride + 16 * half;
        _mm512_store_si512(target, _mm512_add_epi32(_mm512_load_si512(target), sums[r][half]));
      }
    }
  }
};

// Words of four bytes: the instruction multiplies unsigned by signed bytes.
struct Avx512Vnni {
  using Word = std::uint32_t;
  static constexpr std::size_t kUnit = 4, kPanel = 32, kRows = 8;
  static constexpr bool kRightStored = true;

  static Word right(const std::uint8_t (*rows)[kPanel], std::size_t j) {
    return Word{rows[0][j]} | Word{rows[1][j]} << 8 | Word{rows[2][j]} << 16 |
           Word{rows[3][j]} << 24;
  }

  // Flipping the top bit of u gives u - 128 in two's complement.
  static Word left(const std::uint8_t (*rows)[kPanel], std::size_t j) {
    return right(rows, j) ^ 0x80808080u;
  }

  PYFLOCALITY_TARGET("avx512f,avx512bw,avx512vnni")
  static void multiply(const Word* left, const Word* right, std::size_t words, std::int32_t* out,
                       std::size_t stride) {
    __m512i sums[kRows][2];
    for (std::size_t r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (std::size_t w = 0; w < words; ++w, left += kPanel, right += kPanel) {
      const __m512i low = _mm512_load_si512(right);
      const __m512i high = _mm512_load_si512(right + 16);
      for (std::size_t r = 0; r < kRows; ++r) {
        const __m512i factor = _mm512_set1_epi32(static_cast<int>(left[r]));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low, factor);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high, factor);
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t half = 0; half < 2; ++half) {
        std::int32_t* target = out + r * stride + 16 * half;
        _mm512_store_si512(target, _mm512_add_epi32(_mm512_load_si512(target), sums[r][half]));
      }
    }
  }
};

#endif  // PYFLOCALITY_X86

// One call: buffers for the packed panels, and the two phases of a block of images.
template <typename Isa>
class Accumulator {
 public:
  Accumulator(std::size_t count, std::size_t dim, std::size_t threads)
      : dim_(dim),
        threads_(threads),
        panels_(round_up(dim, Isa::kPanel) / Isa::kPanel),
        block_(block_images(count)),
        panel_words_(block_ / Isa::kUnit * Isa::kPanel),
        left_(panels_ * panel_words_),
        right_(Isa::kRightStored ? panels_ * panel_words_ : 0),
        block_totals_(panels_ * Isa::kPanel) {}

  std::size_t block() const { return block_; }

  void add(const std::uint8_t* images, std::size_t count, std::int64_t* gram, std::int64_t* total) {
    // Wide pieces read whole cache lines of the images.
    const std::size_t piece = std::max(128 / Isa::kPanel, panels_ / (4 * threads_));
    parallel_for((panels_ + piece - 1) / piece, threads_, [&](std::size_t i) {
      pack(images, count, i * piece, std::min(panels_, (i + 1) * piece));
    });
    for (std::size_t a = 0; a < dim_; ++a) total[a] += block_totals_[a];

    const std::size_t words = round_up(count, Isa::kUnit) / Isa::kUnit;
    const std::vector<Tile> tiles = upper_tiles();
    parallel_for(tiles.size(), threads_, [&](std::size_t i) { add_tile(tiles[i], words, gram); });
  }

 private:
  struct Tile {
    std::size_t row, column, edge;
  };

  // Images packed at once: bounded memory, whole words, 32-bit sums that cannot overflow.
  std::size_t block_images(std::size_t count) const {
    const std::size_t factors = Isa::kRightStored ? 2 : 1;
    const std::size_t bytes =
        factors * panels_ * Isa::kPanel * sizeof(typename Isa::Word) / Isa::kUnit;
    const std::size_t fitting = std::clamp(kPackedBytes / bytes, kMinBlock, kMaxBlock);
    return round_up(std::min(fitting / Isa::kUnit * Isa::kUnit, count), Isa::kUnit);
  }

  void pack(const std::uint8_t* images, std::size_t count, std::size_t first, std::size_t last) {
    // Missing images hold the byte that centring takes to zero: they add nothing.
    alignas(64) std::uint8_t rows[Isa::kUnit][Isa::kPanel];
    std::memset(rows, kByteCentre, sizeof(rows));
    std::fill(&block_totals_[first * Isa::kPanel], &block_totals_[last * Isa::kPanel - 1] + 1, 0);
    for (std::size_t image = 0; image < count; image += Isa::kUnit) {
      const std::size_t present = std::min(Isa::kUnit, count - image);
      if (present < Isa::kUnit) std::memset(rows, kByteCentre, sizeof(rows));
      for (std::size_t panel = first; panel < last; ++panel) {
        const std::size_t column = panel * Isa::kPanel;
        load_rows(images + image * dim_ + column, present, std::min(Isa::kPanel, dim_ - column),
                  rows);
        const std::size_t offset = panel * panel_words_ + image / Isa::kUnit * Isa::kPanel;
        pack_rows(rows, offset, &block_totals_[column]);
      }
    }
  }

  void load_rows(const std::uint8_t* source, std::size_t present, std::size_t columns,
                 std::uint8_t (*rows)[Isa::kPanel]) const {
    if (columns == Isa::kPanel) {
      for (std::size_t i = 0; i < present; ++i) {
        std::memcpy(rows[i], source + i * dim_, Isa::kPanel);
      }
      return;
    }
    // The columns past the last keep any bytes: nobody reads their sums.
    for (std::size_t i = 0; i < present; ++i) std::memcpy(rows[i], source + i * dim_, columns);
  }

  void pack_rows(const std::uint8_t (*rows)[Isa::kPanel], std::size_t offset,
                 std::int32_t* totals) {
    typename Isa::Word* left = left_.data() + offset;
    for (std::size_t j = 0; j < Isa::kPanel; ++j) left[j] = Isa::left(rows, j);
    if constexpr (Isa::kRightStored) {
      typename Isa::Word* right = right_.data() + offset;
      for (std::size_t j = 0; j < Isa::kPanel; ++j) right[j] = Isa::right(rows, j);
    }
    for (std::size_t i = 0; i < Isa::kUnit; ++i) {
      for (std::size_t j = 0; j < Isa::kPanel; ++j) totals[j] += centred_byte(rows[i][j]);
    }
  }

  // Tiles that meet the upper triangle, small enough to occupy every thread.
  std::vector<Tile> upper_tiles() const {
    std::size_t edge = kTileEdge;
    const auto per_side = [&] { return (dim_ + edge - 1) / edge; };
    while (edge > kMinTileEdge && per_side() * (per_side() + 1) / 2 < 4 * threads_) edge /= 2;
    std::vector<Tile> tiles;
    for (std::size_t row = 0; row < dim_; row += edge) {
      for (std::size_t column = row; column < dim_; column += edge) {
        tiles.push_back({row, column, edge});
      }
    }
    return tiles;
  }

  void add_tile(const Tile& tile, std::size_t words, std::int64_t* gram) const {
    const std::size_t width = panels_ * Isa::kPanel;
    const std::size_t row_end = std::min(tile.row + tile.edge, width);
    const std::size_t column_end = std::min(tile.column + tile.edge, width);
    const AlignedArray<std::int32_t> sums(tile.edge * tile.edge);
    std::memset(sums.data(), 0, tile.edge * tile.edge * sizeof(std::int32_t));

    const typename Isa::Word* right_words = Isa::kRightStored ? right_.data() : left_.data();
    for (std::size_t word = 0; word < words; word += kWordsPerPass) {
      const std::size_t pass = std::min(kWordsPerPass, words - word);
      for (std::size_t column = tile.column; column < column_end; column += Isa::kPanel) {
        const auto* right = right_words + column / Isa::kPanel * panel_words_ + word * Isa::kPanel;
        // Rows past the panel's last column lie below the diagonal.
        const std::size_t last_row = std::min(row_end, column + Isa::kPanel);
        for (std::size_t row = tile.row; row < last_row; row += Isa::kRows) {
          const auto* left = left_.data() + row / Isa::kPanel * panel_words_ + word * Isa::kPanel +
                             row % Isa::kPanel;
          Isa::multiply(left, right, pass,
                        sums.data() + (row - tile.row) * tile.edge + (column - tile.column),
                        tile.edge);
        }
      }
    }
    flush(tile, sums.data(), gram);
  }

  void flush(const Tile& tile, const std::int32_t* sums, std::int64_t* gram) const {
    const std::size_t row_end = std::min(tile.row + tile.edge, dim_);
    const std::size_t column_end = std::min(tile.column + tile.edge, dim_);
    for (std::size_t row = tile.row; row < row_end; ++row) {
      const std::int32_t* source = sums + (row - tile.row) * tile.edge;
      const std::int64_t excess =
          Isa::kRightStored ? std::int64_t{kByteCentre} * block_totals_[row] : 0;
      for (std::size_t column = std::max(row, tile.column); column < column_end; ++column) {
        gram[row * dim_ + column] += source[column - tile.column] - excess;
      }
    }
  }

  std::size_t dim_, threads_, panels_, block_, panel_words_;
  AlignedArray<typename Isa::Word> left_, right_;
  std::vector<std::int32_t> block_totals_;
};

template <typename Isa>
void accumulate(const std::uint8_t* images, std::size_t count, std::size_t dim, std::int64_t* gram,
                std::int64_t* total, std::size_t threads, const std::function<void()>& checkpoint) {
  static_assert(Isa::kPanel % Isa::kRows == 0 && kMinTileEdge % Isa::kPanel == 0, "tiles nest");
  Accumulator<Isa> accumulator(count, dim, threads);
  for (std::size_t start = 0; start < count; start += accumulator.block()) {
    if (start > 0) checkpoint();
    accumulator.add(images + start * dim, std::min(accumulator.block(), count - start), gram,
                    total);
  }
}

}  // namespace

void accumulate_covariance(const std::uint8_t* images, std::size_t count, std::size_t dim,
                           std::int64_t* gram, std::int64_t* total, std::size_t threads,
                           InstructionSet isa, const std::function<void()>& checkpoint) {
  switch (isa) {
#if PYFLOCALITY_X86
    case InstructionSet::kAvx512Vnni:
      return accumulate<Avx512Vnni>(images, count, dim, gram, total, threads, checkpoint);
    case InstructionSet::kAvx512:
      return accumulate<Avx512>(images, count, dim, gram, total, threads, checkpoint);
    case InstructionSet::kAvx2:
      return accumulate<Avx2>(images, count, dim, gram, total, threads, checkpoint);
#endif
    default:
      return accumulate<Portable>(images, count, dim, gram, total, threads, checkpoint);
  }
}

}  // namespace pyflocality
