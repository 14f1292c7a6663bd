// Candidates for the nearest images.
//
// A query t is written as integers of 16 bits times a step, and what is left of it so again:
//
//   t = step[0] q[0] + step[1] q[1] + rest[1],   step[0] q[0] + rest[0] = t
//
// Products of images and integers are exact, so the values of images that come of q[0] alone are
// off by 2 |rest[0]| |u| at most, and by what double precision rounds. Of the few images that may
// be among the nearest by that bound, and of these alone, the products with q[1] are formed.

#include "nearest.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "byte_products.h"
#include "kernel.h"
#include "memory.h"
#include "threads.h"

namespace pyflocality {
namespace {

// Images of a piece of work; few enough for all threads to end together.
constexpr std::size_t kPieceImages = 256;
// Candidates of a piece of work.
constexpr std::size_t kPieceCandidates = 96;
// Unit roundoff of double precision.
constexpr double kRoundoff = std::numeric_limits<double>::epsilon() / 2;

// How far a value may be off, by the length |u| of the image.
struct Bound {
  double per_length, per_square;
  double slack(double length) const { return length * (per_length + length * per_square); }
};

// An image with its value and its length.
struct Entry {
  std::size_t image;
  double value, length;
};

// The images that may be among the k nearest of those that it was given.
class Shortlist {
 public:
  Shortlist(std::size_t k, double limit) : k_(k), limit_(limit), room_(room(0)) {}

  void take(const Bound& bound, const Entry& entry) {
    if (entry.value - bound.slack(entry.length) > limit_) return;
    entries_.push_back(entry);
    if (entries_.size() >= room_) shorten(bound);
  }

  void take_all(const Shortlist& other) {
    entries_.insert(entries_.end(), other.entries_.begin(), other.entries_.end());
  }

  // Leaves out the images that are farther than k others for sure.
  void shorten(const Bound& bound) {
    if (entries_.size() > k_) {
      std::vector<double> most(entries_.size());
      std::transform(entries_.begin(), entries_.end(), most.begin(),
                     [&](const Entry& entry) { return entry.value + bound.slack(entry.length); });
      const auto last = most.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
      std::nth_element(most.begin(), last, most.end());
      limit_ = std::min(limit_, *last);
    }
    const auto farther = [&](const Entry& entry) {
      return entry.value - bound.slack(entry.length) > limit_;
    };
    entries_.erase(std::remove_if(entries_.begin(), entries_.end(), farther), entries_.end());
    room_ = room(entries_.size());
  }

  std::vector<Entry>& entries() { return entries_; }

 private:
  // Entries between two looks at all of them.
  std::size_t room(std::size_t size) const { return 2 * std::max(size, k_) + 64; }

  std::size_t k_;
  double limit_;
  std::size_t room_;
  std::vector<Entry> entries_;
};

// Queries as integers: rows [count, stride] for either level.
template <typename Isa>
class Queries {
 public:
  Queries(const NearestQueries& given, std::size_t dim, std::size_t threads)
      : given_(given), dim_(dim), stride_(Isa::Tile::steps_of(dim) * Isa::kStep) {
    for (Level& level : levels_) {
      level.packed = AlignedArray<std::int16_t>(given.count * stride_);
      level.step.resize(given.count);
      level.bound.resize(given.count);
    }
    parallel_for(given.count, threads, [&](std::size_t b) { write(b); });
  }

  struct Level {
    AlignedArray<std::int16_t> packed;
    std::vector<double> step;
    std::vector<Bound> bound;
  };
  const Level& level(std::size_t number) const { return levels_[number]; }
  const std::int16_t* row(std::size_t number, std::size_t b) const {
    return levels_[number].packed.data() + b * stride_;
  }
  std::size_t stride() const { return stride_; }

 private:
  void write(std::size_t b) {
    const double* query = given_.noisy + b * dim_;
    std::vector<double> rest(query, query + dim_);
    std::vector<std::int16_t> integers(dim_);
    // Of the query itself, of its rests, and of products with them.
    const double rounding =
        16.0 * kRoundoff * (length_of(rest) + 256.0 * std::sqrt(static_cast<double>(dim_)));
    for (Level& level : levels_) {
      double largest = 0.0;
      for (const double value : rest) largest = std::max(largest, std::abs(value));
      // Beside bytes nothing less matters.
      const double step = std::max(largest / kLargestFactor, 1e-200);
      for (std::size_t d = 0; d < dim_; ++d) {
        const double integer = std::nearbyint(rest[d] / step);
        integers[d] = static_cast<std::int16_t>(integer);
        rest[d] -= step * integer;
      }
      pack_row<Isa>(integers.data(), dim_, level.packed.data() + b * stride_);
      level.step[b] = step;
      level.bound[b] = {2.0 * (1.000001 * length_of(rest) + rounding), 16.0 * kRoundoff};
    }
  }

  static double length_of(const std::vector<double>& values) {
    double sum = 0.0;
    for (const double value : values) sum += value * value;
    return std::sqrt(sum);
  }

  const NearestQueries given_;
  const std::size_t dim_, stride_;
  Level levels_[2];
};

template <typename Isa>
class Search {
 public:
  Search(const std::uint8_t* images, std::size_t count, std::size_t dim,
         const NearestQueries& queries, std::size_t k, std::size_t threads)
      : images_(images),
        dim_(dim),
        k_(k),
        threads_(threads),
        limit_(queries.limit),
        batch_(queries.count),
        segments_(count, Isa::kImages, kPieceImages),
        queries_(queries, dim, threads) {}

  std::vector<std::vector<NearestCandidate>> run(const Checkpoint& checkpoint) {
    std::vector<std::vector<Shortlist>> parts(segments_.number);
    parallel_for(segments_.number, threads_, [&](std::size_t segment) {
      checkpoint();
      parts[segment] = scan(segments_.first(segment), segments_.last(segment));
    });
    std::vector<Shortlist> lists = fresh_lists();
    parallel_for(batch_, threads_, [&](std::size_t b) {
      for (std::vector<Shortlist>& part : parts) lists[b].take_all(part[b]);
      lists[b].shorten(queries_.level(0).bound[b]);
    });
    refine(lists, checkpoint);
    std::vector<std::vector<NearestCandidate>> result(batch_);
    parallel_for(batch_, threads_, [&](std::size_t b) {
      const Bound& bound = queries_.level(1).bound[b];
      lists[b].shorten(bound);
      for (const Entry& entry : lists[b].entries()) {
        result[b].push_back({entry.image, entry.value, bound.slack(entry.length)});
      }
    });
    return result;
  }

 private:
  std::vector<Shortlist> fresh_lists() const {
    std::vector<Shortlist> lists;
    for (std::size_t b = 0; b < batch_; ++b) lists.emplace_back(k_, limit_[b]);
    return lists;
  }

  // The lists of all queries over the images [first, last), by the first level alone.
  std::vector<Shortlist> scan(std::size_t first, std::size_t last) const {
    std::vector<Shortlist> lists = fresh_lists();
    for (; first < last; first += Isa::kImages) {
      const std::size_t count = std::min(Isa::kImages, last - first);
      const std::uint8_t* pointers[Isa::kImages];
      for (std::size_t i = 0; i < count; ++i) pointers[i] = images_ + (first + i) * dim_;
      const typename Isa::Tile tile(pointers, count, dim_);
      std::int64_t squares[Isa::kImages];
      Isa::square(tile, squares);
      double square[Isa::kImages], length[Isa::kImages];
      for (std::size_t i = 0; i < count; ++i) {
        square[i] = static_cast<double>(squares[i]);
        length[i] = std::sqrt(square[i]);
      }
      const auto take = [&](std::size_t b, const std::int64_t* products) {
        const double factor = 2.0 * queries_.level(0).step[b];
        for (std::size_t i = 0; i < count; ++i) {
          const double value = square[i] - factor * static_cast<double>(products[i]);
          lists[b].take(queries_.level(0).bound[b], {first + i, value, length[i]});
        }
      };
      std::int64_t products[Isa::kRows * Isa::kImages];
      std::size_t b = 0;
      for (; b + Isa::kRows <= batch_; b += Isa::kRows) {
        Isa::template multiply<Isa::kRows>(tile, queries_.row(0, b), queries_.stride(), products);
        for (std::size_t row = 0; row < Isa::kRows; ++row) {
          take(b + row, products + row * Isa::kImages);
        }
      }
      for (; b < batch_; ++b) {
        Isa::template multiply<1>(tile, queries_.row(0, b), queries_.stride(), products);
        take(b, products);
      }
    }
    return lists;
  }

  // Takes the second level into the values of all entries.
  void refine(std::vector<Shortlist>& lists, const Checkpoint& checkpoint) const {
    struct Piece {
      std::size_t b, first, last;
    };
    std::vector<Piece> pieces;
    for (std::size_t b = 0; b < batch_; ++b) {
      const std::size_t size = lists[b].entries().size();
      for (std::size_t first = 0; first < size; first += kPieceCandidates) {
        pieces.push_back({b, first, std::min(first + kPieceCandidates, size)});
      }
    }
    parallel_for(pieces.size(), threads_, [&](std::size_t number) {
      checkpoint();
      const Piece& piece = pieces[number];
      Entry* entries = lists[piece.b].entries().data();
      const double factor = 2.0 * queries_.level(1).step[piece.b];
      for (std::size_t first = piece.first; first < piece.last; first += Isa::kImages) {
        const std::size_t count = std::min(Isa::kImages, piece.last - first);
        const std::uint8_t* pointers[Isa::kImages];
        for (std::size_t i = 0; i < count; ++i) {
          pointers[i] = images_ + entries[first + i].image * dim_;
        }
        const typename Isa::Tile tile(pointers, count, dim_);
        std::int64_t products[Isa::kImages];
        Isa::template multiply<1>(tile, queries_.row(1, piece.b), queries_.stride(), products);
        for (std::size_t i = 0; i < count; ++i) {
          entries[first + i].value -= factor * static_cast<double>(products[i]);
        }
      }
    });
  }

  const std::uint8_t* images_;
  const std::size_t dim_, k_, threads_;
  const double* limit_;
  const std::size_t batch_;
  const Segments segments_;
  const Queries<Isa> queries_;
};

}  // namespace

std::vector<std::vector<NearestCandidate>> nearest_candidates(
    const std::uint8_t* images, std::size_t count, std::size_t dim, const NearestQueries& queries,
    std::size_t k, std::size_t threads, InstructionSet isa,
    const std::function<void()>& checkpoint) {
  const auto search = [&](auto products) {
    Search<decltype(products)> search(images, count, dim, queries, k, threads);
    return search.run(Checkpoint(checkpoint));
  };
  switch (isa) {
#if PYFLOCALITY_X86
    case InstructionSet::kAvx512Vnni:
      return search(Avx512Products<true>());
    case InstructionSet::kAvx512:
      return search(Avx512Products<false>());
    case InstructionSet::kAvx2:
      return search(Avx2Products());
#endif
    default:
      return search(PortableProducts());
  }
}

void pair_distances(const NearestPairs& pairs, std::size_t threads, double* distances) {
  constexpr std::size_t kTogether = 16, kSums = 4;
  double values[256];
  for (int u = 0; u < 256; ++u) values[u] = u / 127.5 - 1.0;
  const std::size_t dim = pairs.dim;
  parallel_for((pairs.count + kTogether - 1) / kTogether, threads, [&](std::size_t piece) {
    const std::size_t last = std::min(pairs.count, (piece + 1) * kTogether);
    for (std::size_t i = piece * kTogether; i < last; ++i) {
      const std::uint8_t* image = pairs.images + i * dim;
      const double* noisy = pairs.noisy + static_cast<std::size_t>(pairs.owner[i]) * dim;
      const double alpha = pairs.alpha[pairs.owner[i]];
      double sums[kSums] = {};
      const auto add = [&](std::size_t d, std::size_t sum) {
        const double gap = noisy[d] - alpha * values[image[d]];
        sums[sum] += gap * gap;
      };
      std::size_t d = 0;
      for (; d + kSums <= dim; d += kSums) {
        for (std::size_t sum = 0; sum < kSums; ++sum) add(d + sum, sum);
      }
      for (; d < dim; ++d) add(d, 0);
      distances[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  });
}

}  // namespace pyflocality
