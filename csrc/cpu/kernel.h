// What the kernels of all operations are built on: how a pass over training images is split, how
// the pieces are joined, and which compilation of a kernel runs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory.h"
#include "posterior.h"
#include "simd/constants.h"
#include "threads.h"

#if PYFLOCALITY_X86
#include <immintrin.h>
#endif

namespace pyflocality {

// Lets the calling thread look for an interrupt in the middle of its work; other threads never
// touch the interpreter.
class Checkpoint {
 public:
  explicit Checkpoint(const std::function<void()>& check) : check_(check) {}

  void operator()() const {
    if (std::this_thread::get_id() == caller_) check_();
  }

 private:
  const std::function<void()>& check_;
  std::thread::id caller_ = std::this_thread::get_id();
};

// A pass whose images are of a known type.
template <typename Number>
struct TypedPass {
  using Stored = Number;

  TypedPass(const Pass& pass, const Stored* stored)
      : images(stored),
        count(pass.images.count),
        dim(pass.images.dim),
        batch(pass.batch),
        threads(pass.threads),
        checkpoint(pass.checkpoint),
        values(pass.values) {}

  // Distance above the minimum beyond which images cannot change a noisy image's result.
  float reach(std::size_t b) const { return negligible_power(count) / batch.scale[b]; }

  const Stored* images;
  std::size_t count, dim;
  NoisyBatch batch;
  std::size_t threads;
  Checkpoint checkpoint;
  ValueImages values;
};

// The state of a posterior scan: per query the smallest distance, the sum of the weights
// exp(-scale (distance - minimum)) and `sums` weighted sums: those of V values or, with K tangents,
// V + K + K V as posterior.h says.
struct ScanState {
  ScanState(std::size_t queries, std::size_t sums, std::size_t tangents = 0)
      : minimum(queries, std::numeric_limits<float>::infinity()),
        total(queries),
        weighted(queries * sums),
        sums(sums),
        tangents(tangents) {}

  std::vector<float> minimum;
  std::vector<double> total, weighted;
  std::size_t sums, tangents;

  // Takes in a state over other images. scale(q) is the factor of the distances in the power of
  // two of query q.
  template <typename Scale>
  void merge(const ScanState& other, const Scale& scale) {
    for (std::size_t q = 0; q < minimum.size(); ++q) {
      const float lower = std::min(minimum[q], other.minimum[q]);
      const double mine = decay(minimum[q], lower, scale(q));
      const double theirs = decay(other.minimum[q], lower, scale(q));
      const double own = mine * total[q], others = theirs * other.total[q];
      double* here = weighted.data() + q * sums;
      const double* there = other.weighted.data() + q * sums;
      // The products are about the means of each: add what the means are apart.
      if (tangents > 0 && own > 0.0 && others > 0.0) {
        add_apart(total[q] * others / (own + others), total[q], other.total[q], here, there);
      }
      minimum[q] = lower;
      total[q] = own + others;
      for (std::size_t k = 0; k < sums; ++k) here[k] = mine * here[k] + theirs * there[k];
    }
  }

  void copy_to(const ScanResult& result) const {
    std::copy(minimum.begin(), minimum.end(), result.minimum);
    std::copy(total.begin(), total.end(), result.total);
    std::copy(weighted.begin(), weighted.end(), result.weighted);
  }

 private:
  // Adds to the products, before they shrink, `share` times those of the means' differences.
  void add_apart(double share, double total_here, double total_there, double* here,
                 const double* there) const {
    const std::size_t values = (sums - tangents) / (1 + tangents);
    const auto apart = [&](std::size_t k) { return here[k] / total_here - there[k] / total_there; };
    double* products = here + values + tangents;
    for (std::size_t k = 0; k < tangents; ++k) {
      const double factor = share * apart(values + k);
      for (std::size_t i = 0; i < values; ++i) *products++ += factor * apart(i);
    }
  }

  static double decay(float minimum, float lower, double scale) {
    // A state without images weighs nothing.
    if (std::isinf(minimum)) return 0.0;
    return std::exp2((static_cast<double>(lower) - minimum) * scale);
  }
};

// The weighted sums of a query with tangents from sums counted from one of its images:
//
//   sums     [values + count (1 + values)]: of v, of c and of their products, in place
//   value    value(i): the image's own v; product(k): its own c
template <typename Value, typename Product>
inline void count_from_means(double total, std::size_t values, std::size_t count, double* sums,
                             const Value& value, const Product& product) {
  double* inner = sums + values;
  double* cross = inner + count;
  for (std::size_t k = 0; k < count; ++k) {
    const double mean = inner[k] / total;
    for (std::size_t i = 0; i < values; ++i) cross[k * values + i] -= mean * sums[i];
  }
  for (std::size_t i = 0; i < values; ++i) sums[i] += total * value(i);
  for (std::size_t k = 0; k < count; ++k) inner[k] += total * product(k);
}

// A split that depends on the number of images alone, so that results do not depend on the
// number of threads: whole tiles, at most kMaxSegments pieces, none of less than min_images but
// for the last, where less would not be worth a piece of its own.
struct Segments {
  static constexpr std::size_t kMaxSegments = 64, kMinImages = 768;

  Segments(std::size_t count, std::size_t tile, std::size_t min_images = kMinImages)
      : count(count) {
    const std::size_t pieces =
        std::clamp<std::size_t>((count + min_images - 1) / min_images, 1, kMaxSegments);
    const std::size_t tiles = (count + tile - 1) / tile;
    length = (tiles + pieces - 1) / pieces * tile;
    number = (count + length - 1) / length;
  }

  std::size_t first(std::size_t segment) const { return segment * length; }
  std::size_t last(std::size_t segment) const { return std::min(count, (segment + 1) * length); }

  std::size_t count, length, number;
};

// Runs a kernel over every segment on some threads, and merges the states in the order of the
// images. A kernel gives
//
//   scratch()         a Scratch, which a thread works in
//   scan(first, last, scratch, state)
//                     takes the images [first, last) into a state without images
//   state()           such a state
//   scale(q)          factor of the distances of a query
template <typename Kernel>
ScanState run_kernel(const Kernel& kernel, const Segments& segments, std::size_t threads) {
  using Scratch = typename Kernel::Scratch;
  std::mutex mutex;
  std::vector<std::unique_ptr<Scratch>> idle;
  std::vector<std::unique_ptr<ScanState>> finished(segments.number);
  ScanState result = kernel.state();
  std::size_t merged = 0;

  parallel_for(segments.number, threads, [&](std::size_t segment) {
    std::unique_ptr<Scratch> scratch;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        scratch = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (!scratch) scratch.reset(new Scratch(kernel.scratch()));
    auto state = std::make_unique<ScanState>(kernel.state());
    kernel.scan(segments.first(segment), segments.last(segment), *scratch, *state);

    // In order, as far as the segments before are there.
    const std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(scratch));
    finished[segment] = std::move(state);
    for (; merged < segments.number && finished[merged]; ++merged) {
      result.merge(*finished[merged], [&](std::size_t q) { return kernel.scale(q); });
      finished[merged].reset();
    }
  });
  return result;
}

}  // namespace pyflocality
