// Runs every native kernel at awkward sizes and compares it with plain loops in double precision.
//
// tests/kernels/cpu/test_sanitizers.py builds it with AddressSanitizer and
// UndefinedBehaviorSanitizer, and with ThreadSanitizer. Inputs lie in memory of exactly their size,
// so that reading one element too many is seen.
//
//   sanitize all      every size, instruction set, storage type and thread count
//   sanitize threads  few sizes, several pieces of work per thread

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "covariance.h"
#include "cpu_features.h"
#include "difference_tree.h"
#include "equivariant_posterior.h"
#include "global_posterior.h"
#include "guard.h"
#include "mapped_guard.h"
#include "mask_tile.h"
#include "mask_tiles.h"
#include "masked_posterior.h"
#include "masks.h"
#include "nearest.h"
#include "nearest_images.h"
#include "plain_scan.h"
#include "plain_sums.h"
#include "weighted_posterior.h"
#include "window_posterior.h"

namespace {

using namespace pyflocality;

// A scan: kernel(pass, result).
template <typename Stored, typename Kernel>
void check_scan(const std::string& op, const Problem<Stored>& problem,
                const std::vector<Query>& queries, const std::vector<std::size_t>& threads,
                const Kernel& kernel) {
  const Answer plain = plain_answer(problem, queries);
  const auto run = [&](const Pass& pass) {
    Answer answer(plain.total.size(), plain.weighted.size() / plain.total.size());
    kernel(pass, answer.result());
    return answer;
  };
  check_everywhere(op, problem, threads, run, [&](const std::string& name, const Answer& answer) {
    compare(problem, answer, plain, name);
  });
}

template <typename Stored>
void check_global(const Problem<Stored>& problem, const std::vector<std::size_t>& threads) {
  Patch whole;
  for (std::size_t d = 0; d < problem.dim; ++d) {
    whole.measured.emplace_back(d, d);
    whole.answered.push_back(d);
  }
  check_scan("global", problem, {{whole}}, threads,
             [&](const Pass& pass, const ScanResult& result) {
               if (problem.tangent_count > 0) {
                 global_posterior_jvp(pass, problem.directions(), result);
               } else {
                 global_posterior(pass, result);
               }
             });
}

// Places around one along an axis, offset by offset; places outside the axis are not there, or
// those on its other side.
std::vector<std::pair<std::ptrdiff_t, std::size_t>> around(std::size_t place, std::size_t length,
                                                           std::size_t window, bool circular) {
  const auto half = static_cast<std::ptrdiff_t>(window / 2);
  const auto size = static_cast<std::ptrdiff_t>(length);
  std::vector<std::pair<std::ptrdiff_t, std::size_t>> places;
  for (std::ptrdiff_t offset = -half; offset <= half; ++offset) {
    const std::ptrdiff_t there = static_cast<std::ptrdiff_t>(place) + offset;
    if (circular || (there >= 0 && there < size)) {
      places.emplace_back(offset, static_cast<std::size_t>((there + size) % size));
    }
  }
  return places;
}

// The window around pixel q of the noisy image beside that around pixel p of a training image,
// as far as both are there.
Patch window_patch(const Shape& shape, std::size_t window, std::size_t q, std::size_t p,
                   bool circular) {
  Patch patch;
  for (std::size_t c = 0; c < shape.channels; ++c) {
    const std::size_t plane = c * shape.pixels();
    patch.answered.push_back(plane + p);
    for (const auto& [dy, query_y] : around(q / shape.width, shape.height, window, circular)) {
      for (const auto& [dx, query_x] : around(q % shape.width, shape.width, window, circular)) {
        for (const auto& [ey, y] : around(p / shape.width, shape.height, window, false)) {
          for (const auto& [ex, x] : around(p % shape.width, shape.width, window, false)) {
            if (dy != ey || dx != ex) continue;
            patch.measured.emplace_back(plane + query_y * shape.width + query_x,
                                        plane + y * shape.width + x);
          }
        }
      }
    }
  }
  return patch;
}

template <typename Stored>
void check_window(const Problem<Stored>& problem, std::size_t window,
                  const std::vector<std::size_t>& threads) {
  const Shape& shape = problem.shape;
  std::vector<Query> queries;
  for (std::size_t q = 0; q < shape.pixels(); ++q) {
    queries.push_back({window_patch(shape, window, q, q, false)});
  }
  const WindowShape sizes{shape.channels, shape.height, shape.width, window};
  check_scan("window " + std::to_string(window), problem, queries, threads,
             [&](const Pass& pass, const ScanResult& result) {
               if (problem.tangent_count > 0) {
                 window_posterior_jvp(pass, sizes, problem.directions(), result);
               } else {
                 window_posterior(pass, sizes, result);
               }
             });
}

template <typename Stored>
void check_equivariant(const Problem<Stored>& problem, std::size_t window, bool circular,
                       const std::vector<std::size_t>& threads) {
  const Shape& shape = problem.shape;
  const std::size_t half = window / 2;
  const auto inner = [&](std::size_t place, std::size_t length) {
    return place >= half && place + half < length;
  };
  // Whether patches at place p serve queries at place q, along one axis.
  const auto serves = [&](std::size_t p, std::size_t q, std::size_t length) {
    return circular ? inner(p, length) : p == q || (inner(p, length) && inner(q, length));
  };
  std::vector<Query> queries;
  for (std::size_t q = 0; q < shape.pixels(); ++q) {
    Query query;
    for (std::size_t p = 0; p < shape.pixels(); ++p) {
      if (serves(p / shape.width, q / shape.width, shape.height) &&
          serves(p % shape.width, q % shape.width, shape.width)) {
        query.push_back(window_patch(shape, window, q, p, circular));
      }
    }
    queries.push_back(query);
  }
  const WindowShape sizes{shape.channels, shape.height, shape.width, window};
  const std::string op = circular ? "equivariant, circular " : "equivariant, broken ";
  check_scan(op + std::to_string(window), problem, queries, threads,
             [&](const Pass& pass, const ScanResult& result) {
               equivariant_posterior(pass, sizes, circular, result);
             });
}

// Queries for every pixel and one more, which answer other masks than they measure; and for every
// value, counted from a centre.
template <typename Stored>
void check_filtered(Problem<Stored> problem, std::vector<std::vector<bool>> masks,
                    const std::vector<float>& centre, const std::vector<std::size_t>& threads) {
  const Shape& shape = problem.shape;
  std::vector<std::vector<bool>> answers(masks.rbegin(), masks.rend());
  const OutputGrid values{shape.channels, shape.height, shape.width};
  problem.counted_from = centre.data();
  check_masked_sums(problem, make_tree(masks, values), make_tree(answers, values),
                    applied_masks(masks, answers), threads);
  masks.resize(shape.pixels());
  masks.emplace_back(shape.values(), false);
  answers.resize(shape.pixels());
  answers.emplace_back(shape.values(), true);
  const OutputGrid pixels{1, shape.height, shape.width};
  const DifferenceTree tree = make_tree(masks, pixels);
  check_tree(tree, masks, "tree of pixels, " + text(shape));
  problem.counted_from = nullptr;
  check_masked_sums(problem, tree, make_tree(answers, pixels), applied_masks(masks, answers),
                    threads);
}

template <typename Stored>
void check_masked(const Problem<Stored>& problem, const std::vector<std::size_t>& threads) {
  const std::vector<std::vector<bool>> masks = make_masks(problem.shape);
  const Shape& shape = problem.shape;
  const DifferenceTree tree = make_tree(masks, {shape.channels, shape.height, shape.width});
  check_tree(tree, masks, "tree, " + text(problem.shape));
  std::vector<Query> queries;
  for (std::size_t q = 0; q < masks.size(); ++q) {
    Patch patch{{}, {q}};
    for (std::size_t d = 0; d < masks.size(); ++d) {
      if (masks[q][d]) patch.measured.emplace_back(d, d);
    }
    queries.push_back({patch});
  }
  Problem<Stored> given = problem;
  if (problem.tangent_count > 0) {
    given.inner_centred = false;
    check_scan("masked", given, queries, threads, [&](const Pass& pass, const ScanResult& result) {
      masked_posterior_jvp(pass, tree, given.directions(), result);
    });
    check_masked_sums(problem, tree, tree, applied_masks(masks, masks), threads);
    return;
  }
  const std::vector<float> centre(masks.size(), 0.5f);
  check_filtered(problem, masks, centre, threads);
  for (const float* counted_from : {static_cast<const float*>(nullptr), centre.data()}) {
    given.counted_from = counted_from;
    check_scan(
        counted_from ? "masked, centred" : "masked", given, queries, threads,
        [&](const Pass& pass, const ScanResult& result) { masked_posterior(pass, tree, result); });
  }
}

// Weights of 0, 1 and 2, of which a query with 2 is one that compares the input twice.
template <typename Stored>
void check_weighted(const Problem<Stored>& problem, const std::vector<std::size_t>& threads) {
  const std::vector<std::vector<bool>> masks = make_masks(problem.shape);
  const std::size_t count = masks.size();
  std::vector<float> weights(count * count);
  std::vector<std::uint32_t> answers;
  std::vector<Query> queries;
  Random random(13);
  for (std::size_t q = 0; q < count; ++q) {
    Patch patch{{}, {q}};
    for (std::size_t d = 0; d < count; ++d) {
      if (!masks[q][d]) continue;
      const std::uint32_t weight = 1 + random.below(2);
      weights[q * count + d] = static_cast<float>(weight);
      for (std::uint32_t k = 0; k < weight; ++k) patch.measured.emplace_back(d, d);
    }
    queries.push_back({patch});
    answers.push_back(static_cast<std::uint32_t>(q));
  }
  const InputWeights given = input_weights(weights.data(), count, count, answers);
  check_scan(
      "weighted", problem, queries, threads,
      [&](const Pass& pass, const ScanResult& result) { weighted_posterior(pass, given, result); });
}

enum class Bytes { kRandom, kSmallest, kLargest };

void check_covariance(std::size_t count, std::size_t dim, Bytes kind,
                      const std::vector<std::size_t>& threads) {
  Random random(static_cast<std::uint32_t>(count * 1000 + dim));
  std::vector<std::uint8_t> images(count * dim, kind == Bytes::kLargest ? 255 : 0);
  if (kind == Bytes::kRandom) {
    for (std::uint8_t& value : images) value = static_cast<std::uint8_t>(random.below(256));
  }
  // What is there already stays in the sums; below the diagonal it is left alone.
  std::vector<std::int64_t> gram(dim * dim, 1000), total(dim, -7);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint8_t* image = &images[i * dim];
    for (std::size_t a = 0; a < dim; ++a) {
      const std::int64_t left = image[a] - 128;
      total[a] += left;
      for (std::size_t b = a; b < dim; ++b) gram[a * dim + b] += left * (image[b] - 128);
    }
  }
  for (const NamedInstructionSet& isa : known_instruction_sets()) {
    if (!isa.available) continue;
    for (const std::size_t workers : threads) {
      std::vector<std::int64_t> result_gram(dim * dim, 1000), result_total(dim, -7);
      accumulate_covariance(images.data(), count, dim, result_gram.data(), result_total.data(),
                            workers, isa.value, [] {});
      const std::string name = std::string("covariance, ") + isa.name + ", " +
                               std::to_string(count) + " x " + std::to_string(dim);
      expect(result_gram == gram, name + ": products");
      expect(result_total == total, name + ": sums");
    }
  }
}

// With tangents: one and a few more than a register tile holds.
template <typename Stored>
void check_tangents(Problem<Stored> problem, const std::vector<std::size_t>& threads) {
  if (problem.count > 100 && problem.batch > 3) return;
  for (const std::size_t count : {1u, 5u}) {
    problem.point(count);
    check_global(problem, threads);
    check_masked(problem, threads);
    const std::size_t window =
        std::min<std::size_t>(3, 2 * std::max(problem.shape.height, problem.shape.width) - 1);
    check_window(problem, window, threads);
    check_window_sums(problem, window, threads);
  }
}

// With value images in the place of the images.
template <typename Stored>
void check_values(Problem<Stored> problem, const std::vector<std::size_t>& threads) {
  if (problem.count > 100 && problem.batch > 3) return;
  problem.answer_values();
  const std::size_t inside = std::min(problem.shape.height, problem.shape.width);
  check_global(problem, threads);
  for (const std::size_t directions : {0u, 5u}) {
    if (directions > 0) problem.point(directions);
    if (directions == 0) check_masked(problem, threads);
    if (directions == 0) check_weighted(problem, threads);
    check_window(problem, 1, threads);
    check_window_sums(problem, directions > 0 ? 1 : (inside + 1) / 2, threads);
  }
}

template <typename Stored>
void check_scans(const Shape& shape, std::size_t count, std::size_t batch,
                 const std::vector<std::size_t>& threads) {
  const Problem<Stored> problem(shape, count, batch, static_cast<std::uint32_t>(count + batch));
  check_values(problem, threads);
  check_global(problem, threads);
  check_masked(problem, threads);
  check_weighted(problem, threads);
  check_tangents(problem, threads);
  const std::size_t inside = std::min(shape.height, shape.width);
  for (const std::size_t side : std::set<std::size_t>{1, (inside + 1) / 2, inside}) {
    check_window_sums(problem, side, threads);
  }
  const std::size_t largest = 2 * std::max(shape.height, shape.width) - 1;
  for (const std::size_t window :
       std::set<std::size_t>{1, std::min<std::size_t>(3, largest), largest}) {
    check_window(problem, window, threads);
    // Patches at all places are many: fewer images show as much.
    if (count > 100 && batch > 3) continue;
    check_equivariant(problem, window, false, threads);
    if (window <= std::min(shape.height, shape.width)) {
      check_equivariant(problem, window, true, threads);
    }
  }
}

void check_everything() {
  // 15 noisy images are one of each group the masked kernel forms: 8 + 4 + 2 + 1.
  constexpr std::size_t kBatch = 15;
  const std::vector<std::size_t> threads{1, 3};
  check_mapped_guard(1);
  for (const std::size_t count : {1u, 2u, 47u, 49u, 1000u}) {
    for (const Shape& shape : {Shape{1, 1, 1}, Shape{1, 5, 7}, Shape{3, 4, 4}, Shape{2, 1, 9}}) {
      check_scans<std::uint8_t>(shape, count, kBatch, threads);
      check_scans<float>(shape, count, kBatch, threads);
    }
    for (const std::size_t dim : {1u, 5u, 33u, 105u, 300u}) {
      check_covariance(count, dim, Bytes::kRandom, threads);
      check_nearest(count, dim, threads);
      check_pairs(count, dim, threads);
    }
  }
  // More than one block of images, and the largest sums a block can hold.
  check_covariance(16500, 5, Bytes::kRandom, threads);
  check_covariance(16500, 5, Bytes::kSmallest, threads);
  check_covariance(16500, 5, Bytes::kLargest, threads);
  // Integers of more than one piece.
  check_nearest(9, 4500, threads);
  for (const std::size_t rows : {1u, 3u, 40u}) {
    for (const std::size_t columns : {1u, 8u, 15u, 16u, 17u, 41u}) {
      for (const std::size_t terms : {1u, 7u, 8u, 25u}) check_mask_tile(rows, columns, terms);
    }
  }
}

void check_threads() {
  const std::vector<std::size_t> threads{3, 2};
  const Shape shape{2, 4, 3};
  for (std::size_t round = 0; round < 20; ++round) check_mapped_guard(8);
  check_scans<std::uint8_t>(shape, 3100, 3, threads);
  check_scans<float>(shape, 3100, 3, threads);
  check_covariance(16500, 150, Bytes::kRandom, threads);
  check_nearest(3100, 70, threads);
  check_pairs(3100, 70, threads);
}

}  // namespace

int main(int argument_count, char** arguments) {
  const std::string what = argument_count > 1 ? arguments[1] : "";
  if (what == "all") {
    check_everything();
  } else if (what == "threads") {
    check_threads();
  } else {
    std::fprintf(stderr, "usage: %s all|threads\n", arguments[0]);
    return 2;
  }
  std::printf("%zu comparisons hold\n", comparisons);
  return 0;
}
