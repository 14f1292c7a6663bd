// How a scan over training images is split, and how the pieces are joined.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "posterior.h"
#include "threads.h"

namespace pyflocality {

// Memory on a cache line boundary, uninitialised.
template <typename T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(std::size_t size)
      : data_(static_cast<T*>(
            ::operator new[](std::max<std::size_t>(size, 1) * sizeof(T), std::align_val_t{64}))) {}
  T* data() const { return data_.get(); }

 private:
  struct Release {
    void operator()(T* data) const { ::operator delete[](data, std::align_val_t{64}); }
  };
  std::unique_ptr<T[], Release> data_;
};

// The state of a posterior scan: per query the smallest distance, the sum of the weights
// exp(-scale (distance - minimum)) and `sums` weighted sums: those of V values or, with K tangents,
// V + K + K V as posterior_jvp.h says.
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

  // Takes in a state over other images. `scale` is the factor of the distances in the power of
  // two, one for every query.
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

inline void copy_state(const ScanState& state, const ScanResult& result) {
  std::copy(state.minimum.begin(), state.minimum.end(), result.minimum);
  std::copy(state.total.begin(), state.total.end(), result.total);
  std::copy(state.weighted.begin(), state.weighted.end(), result.weighted);
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

// Lets the calling thread look for an interrupt in the middle of its work; other threads never
// touch the interpreter.
class Checkpoint {
 public:
  explicit Checkpoint(std::function<void()> check) : check_(std::move(check)) {}

  void operator()() const {
    if (std::this_thread::get_id() == caller_) check_();
  }

 private:
  std::function<void()> check_;
  std::thread::id caller_ = std::this_thread::get_id();
};

// Runs scan(segment, scratch, state) for every segment on some threads, each thread with its own
// scratch, and merges the states in the order of the images.
template <typename Scratch, typename MakeScratch, typename Scan, typename Scale>
ScanState scan_segments(const Segments& segments, std::size_t threads, std::size_t queries,
                        std::size_t sums, const MakeScratch& make_scratch, const Scan& scan,
                        const Scale& scale, std::size_t tangents = 0) {
  std::mutex mutex;
  std::vector<std::unique_ptr<Scratch>> idle;
  std::vector<std::unique_ptr<ScanState>> finished(segments.number);
  ScanState result(queries, sums, tangents);
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
    if (!scratch) scratch = make_scratch();
    auto state = std::make_unique<ScanState>(queries, sums, tangents);
    scan(segment, *scratch, *state);

    // In order, as far as the segments before are there.
    const std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(scratch));
    finished[segment] = std::move(state);
    for (; merged < segments.number && finished[merged]; ++merged) {
      result.merge(*finished[merged], scale);
      finished[merged].reset();
    }
  });
  return result;
}

}  // namespace pyflocality
