// Problems for the scans, and their answers by plain loops in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_features.h"
#include "posterior.h"

namespace {

using namespace pyflocality;

std::size_t comparisons = 0;

void expect(bool holds, const std::string& what) {
  ++comparisons;
  if (holds) return;
  std::fprintf(stderr, "WRONG: %s\n", what.c_str());
  std::exit(1);
}

// The same numbers everywhere: the distributions of the standard library are not.
class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  std::uint32_t below(std::uint32_t bound) { return engine_() % bound; }
  double uniform() { return engine_() / 4294967296.0; }

 private:
  std::mt19937 engine_;
};

struct Shape {
  std::size_t channels, height, width;
  std::size_t pixels() const { return height * width; }
  std::size_t values() const { return channels * pixels(); }
};

std::string text(const Shape& shape) {
  return std::to_string(shape.channels) + "x" + std::to_string(shape.height) + "x" +
         std::to_string(shape.width);
}

// Images, noisy images near some of them, and a factor of the distances for each of those.
template <typename Stored>
struct Problem {
  static constexpr bool kBytes = std::is_same<Stored, std::uint8_t>::value;
  static constexpr double kRange = kBytes ? 255.0 : 2.0;
  static constexpr float kLargestScale = 0x1p120f, kSmallestScale = 0x1p-126f;

  Problem(const Shape& size, std::size_t count_, std::size_t batch_, std::uint32_t seed)
      : shape(size),
        count(count_),
        batch(batch_),
        dim(size.values()),
        images(count_ * dim),
        noisy(batch_ * dim),
        scale(batch_) {
    Random random(seed);
    for (Stored& value : images) {
      if constexpr (kBytes) {
        value = static_cast<Stored>(random.below(256));
      } else {
        value = static_cast<Stored>(2.0 * random.uniform() - 1.0);
      }
    }
    for (std::size_t b = 0; b < batch; ++b) {
      const Stored* near = &images[random.below(static_cast<std::uint32_t>(count)) * dim];
      for (std::size_t d = 0; d < dim; ++d) {
        noisy[b * dim + d] = static_cast<float>(near[d] + kRange * (random.uniform() - 0.5));
      }
      // Logits of some tens over the whole image; at both ends, what the callers clamp to.
      const double power = 40.0 * random.uniform() / (dim * kRange * kRange);
      scale[b] = b % 5 == 3   ? kLargestScale
                 : b % 5 == 4 ? kSmallestScale
                              : static_cast<float>(power + 1e-9);
    }
  }

  Pass pass(
      std::size_t threads, InstructionSet isa, std::function<void()> checkpoint = [] {}) const {
    Pass pass{{nullptr, nullptr, count, dim},
              {noisy.data(), scale.data(), batch, counted_from},
              threads,
              isa,
              std::move(checkpoint)};
    if constexpr (kBytes) {
      pass.images.bytes = images.data();
    } else {
      pass.images.floats = images.data();
    }
    if (!values.empty()) pass.values = {values.data(), 1, false};
    return pass;
  }

  // Has copies of the images answered in their place, as value images.
  void answer_values() { values.assign(images.begin(), images.end()); }

  // Asks for derivatives in some random directions.
  void point(std::size_t directions) {
    tangent_count = directions;
    Random random(static_cast<std::uint32_t>(directions));
    centre.resize(batch * dim);
    tangents.resize(batch * directions * dim);
    const double lowest = kBytes ? 0.0 : -1.0;
    for (float& value : centre) value = static_cast<float>(lowest + kRange * random.uniform());
    for (float& value : tangents) value = static_cast<float>(2.0 * random.uniform() - 1.0);
  }
  Tangents directions() const { return {centre.data(), tangents.data(), tangent_count}; }

  std::string name() const {
    return text(shape) + ", " + (kBytes ? "bytes" : "floats") + ", N = " + std::to_string(count) +
           ", K = " + std::to_string(tangent_count) + (values.empty() ? "" : ", values");
  }

  Shape shape;
  std::size_t count, batch, dim, tangent_count = 0;
  std::vector<Stored> images;
  std::vector<float> noisy, scale, centre, tangents, values;
  // The centre of the batch, of masked kernels.
  const float* counted_from = nullptr;
  // Whether inner products with tangents are of values from the centre.
  bool inner_centred = true;
};

struct Answer {
  Answer(std::size_t queries, std::size_t values)
      : minimum(queries), total(queries), weighted(queries * values) {}
  ScanResult result() { return {minimum.data(), total.data(), weighted.data()}; }
  bool operator==(const Answer& other) const {
    return minimum == other.minimum && total == other.total && weighted == other.weighted;
  }
  std::vector<double> minimum, total, weighted;
};

// What a query is compared with in every image: values of the noisy image with values of the
// training image, and the values of the training image that it answers.
struct Patch {
  std::vector<std::pair<std::size_t, std::size_t>> measured;
  std::vector<std::size_t> answered;
};
using Query = std::vector<Patch>;

// The same sums as a scan's, image by image and patch by patch: those of posterior.h with tangents
// where there are any.
template <typename Stored>
Answer plain_answer(const Problem<Stored>& problem, const std::vector<Query>& queries) {
  const std::size_t values = queries[0][0].answered.size(), directions = problem.tangent_count;
  const std::size_t sums = values + directions * (1 + values);
  Answer answer(problem.batch * queries.size(), sums);
  std::vector<double> distance;
  for (std::size_t b = 0; b < problem.batch; ++b) {
    for (std::size_t q = 0; q < queries.size(); ++q) {
      distance.clear();
      for (std::size_t i = 0; i < problem.count; ++i) {
        for (const Patch& patch : queries[q]) {
          distance.push_back(0.0);
          for (const auto& [noisy, image] : patch.measured) {
            const double gap = static_cast<double>(problem.noisy[b * problem.dim + noisy]) -
                               problem.images[i * problem.dim + image];
            distance.back() += gap * gap;
          }
        }
      }
      const std::size_t to = b * queries.size() + q;
      answer.minimum[to] = *std::min_element(distance.begin(), distance.end());
      auto next = distance.begin();
      for (std::size_t i = 0; i < problem.count; ++i) {
        for (const Patch& patch : queries[q]) {
          const double above = *next++ - answer.minimum[to];
          const double weight = std::exp2(-static_cast<double>(problem.scale[b]) * above);
          answer.total[to] += weight;
          const auto value = [&](std::size_t d) {
            const double base = directions > 0 ? problem.centre[b * problem.dim + d] : 0.0;
            return problem.images[i * problem.dim + d] - base;
          };
          // Value images are counted from nothing.
          const auto answered = [&](std::size_t d) {
            return problem.values.empty()
                       ? value(d)
                       : static_cast<double>(problem.values[i * problem.dim + d]);
          };
          double* out = &answer.weighted[to * sums];
          for (const std::size_t d : patch.answered) *out++ += weight * answered(d);
          std::vector<double> inner(directions, 0.0);
          for (std::size_t k = 0; k < directions; ++k) {
            const float* tangent = &problem.tangents[(b * directions + k) * problem.dim];
            for (const auto& [noisy, image] : patch.measured) {
              inner[k] += tangent[image] *
                          (problem.inner_centred
                               ? value(image)
                               : static_cast<double>(problem.images[i * problem.dim + image]));
            }
            *out++ += weight * inner[k];
          }
          for (std::size_t k = 0; k < directions; ++k) {
            for (const std::size_t d : patch.answered) *out++ += weight * inner[k] * answered(d);
          }
        }
      }
      // Products are about the means, as posterior.h says.
      double* sums_of_query = &answer.weighted[to * sums];
      for (std::size_t k = 0; k < directions; ++k) {
        const double mean = sums_of_query[values + k] / answer.total[to];
        double* products = sums_of_query + values + directions + k * values;
        for (std::size_t d = 0; d < values; ++d) products[d] -= mean * sums_of_query[d];
      }
    }
  }
  return answer;
}

template <typename Stored>
void compare(const Problem<Stored>& problem, const Answer& result, const Answer& plain,
             const std::string& name) {
  const std::size_t queries = plain.total.size() / problem.batch;
  const std::size_t values = plain.weighted.size() / plain.total.size();
  // What float32 sums of squares of that size are good for.
  const double distance = 1e-5 * problem.dim * problem.kRange * problem.kRange;
  for (std::size_t q = 0; q < plain.total.size(); ++q) {
    const std::string where = name + ", query " + std::to_string(q);
    expect(std::abs(result.minimum[q] - plain.minimum[q]) <= distance, where + ": minimum");
    const bool nearest_only = problem.scale[q / queries] == problem.kLargestScale;
    if (nearest_only) {
      // Which of two patches at nearly the same distance is nearer is a matter of rounding.
      const double most = static_cast<double>(problem.count * problem.shape.pixels());
      expect(result.total[q] >= 0.99 && result.total[q] <= 1.01 * most, where + ": total");
    } else {
      expect(std::abs(result.total[q] - plain.total[q]) <= 1e-3 * plain.total[q],
             where + ": total");
    }
    for (std::size_t k = 0; k < values; ++k) {
      const double mean = result.weighted[q * values + k] / result.total[q];
      const double exact = plain.weighted[q * values + k] / plain.total[q];
      // Values, inner products with a tangent, and products of both, each within its range.
      const std::size_t directions = problem.tangent_count;
      const std::size_t plain_values = (values - directions) / (1 + directions);
      const double inner = problem.dim * problem.kRange;
      const double range = k < plain_values                ? problem.kRange
                           : k < plain_values + directions ? inner
                                                           : inner * problem.kRange;
      const double allowed = nearest_only ? 2.0 * range : 1e-3 * range;
      expect(std::abs(mean - exact) <= allowed, where + ": mean");
    }
  }
}

// Runs a kernel on every instruction set and number of threads: run(pass) is the same to the bit
// for all numbers of threads, and what check(name, answer) expects. An interrupt ends it.
template <typename Stored, typename Run, typename Check>
void check_everywhere(const std::string& op, const Problem<Stored>& problem,
                      const std::vector<std::size_t>& threads, const Run& run, const Check& check) {
  struct Interrupt : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  for (const NamedInstructionSet& isa : known_instruction_sets()) {
    if (!isa.available) continue;
    const std::string name = op + ", " + isa.name + ", " + problem.name();
    const auto first = run(problem.pass(threads.front(), isa.value));
    check(name, first);
    for (std::size_t k = 1; k < threads.size(); ++k) {
      expect(run(problem.pass(threads[k], isa.value)) == first,
             name + ": the bits depend on the threads");
    }
    bool interrupted = false;
    try {
      run(problem.pass(1, isa.value, [] { throw Interrupt("stop"); }));
    } catch (const Interrupt&) {
      interrupted = true;
    }
    expect(interrupted, name + ": an interrupt is lost");
  }
}

}  // namespace
