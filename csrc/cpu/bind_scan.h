// The arguments that bindings of posterior scans share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings.h"
#include "cpu_features.h"
#include "difference_tree.h"
#include "posterior.h"
#include "posterior_jvp.h"
#include "window_posterior.h"

namespace pyflocality {

inline std::size_t size(pybind11::ssize_t value) { return static_cast<std::size_t>(value); }

// The arguments all scans share, checked; and the arrays they fill.
struct Scan {
  Scan(const pybind11::array& images_array, const Array<float>& noisy, const Array<float>& scale,
       std::size_t queries, std::size_t values, pybind11::ssize_t thread_count,
       const std::string& isa)
      : threads(checked_threads(thread_count)), instructions(choose_instruction_set(isa)) {
    if (noisy.ndim() != 2) {
      throw pybind11::value_error("`noisy` must have shape [B, D], got " + shape_text(noisy));
    }
    if (images_array.ndim() != 2 || images_array.shape(0) == 0 ||
        images_array.shape(1) != noisy.shape(1)) {
      throw pybind11::value_error(
          "`images` must have shape [N, D] with D = " + std::to_string(noisy.shape(1)) + ", got " +
          shape_text(images_array));
    }
    if (scale.ndim() != 1 || scale.shape(0) != noisy.shape(0)) {
      throw pybind11::value_error("`scale` must have shape [B], got " + shape_text(scale));
    }
    images = {nullptr, nullptr, size(images_array.shape(0)), size(images_array.shape(1))};
    if (pybind11::isinstance<Array<std::uint8_t>>(images_array)) {
      images.bytes = static_cast<const std::uint8_t*>(images_array.data());
    } else if (pybind11::isinstance<Array<float>>(images_array)) {
      images.floats = static_cast<const float*>(images_array.data());
    } else {
      throw pybind11::type_error("`images` must be a contiguous array of uint8 or float32");
    }
    batch = {noisy.data(), scale.data(), size(noisy.shape(0))};
    minimum = Array<double>({batch.batch, queries});
    total = Array<double>({batch.batch, queries});
    weighted = Array<double>({batch.batch, queries, values});
    result = {minimum.mutable_data(), total.mutable_data(), weighted.mutable_data()};
  }

  // Runs the kernel without the interpreter's lock.
  template <typename Kernel>
  pybind11::tuple run(const Kernel& kernel) {
    if (batch.batch > 0) {
      const pybind11::gil_scoped_release release;
      kernel();
    }
    return pybind11::make_tuple(minimum, total, weighted);
  }

  std::size_t threads;
  InstructionSet instructions;
  StoredImages images;
  NoisyBatch batch;
  Array<double> minimum, total, weighted;
  ScanResult result;
};

// A window around a pixel, cut at the border.
inline WindowShape checked_shape(const Array<float>& noisy, std::size_t channels,
                                 std::size_t height, std::size_t width, std::size_t window) {
  if (window % 2 == 0) {
    throw pybind11::value_error("`window` must be odd, got " + std::to_string(window));
  }
  if (noisy.ndim() != 2 || size(noisy.shape(1)) != channels * height * width) {
    throw pybind11::value_error("`noisy` must have channels * height * width values a row, got " +
                                shape_text(noisy));
  }
  return {channels, height, width, window};
}

// A window that fits inside the image.
inline WindowShape checked_shape_inside(const Array<float>& noisy, std::size_t channels,
                                        std::size_t height, std::size_t width, std::size_t window) {
  if (window == 0 || window > std::min(height, width)) {
    throw pybind11::value_error("`window` must fit inside the image, got " +
                                std::to_string(window));
  }
  // An odd window in its place: the other checks are the same.
  WindowShape shape = checked_shape(noisy, channels, height, width, 1);
  shape.window = window;
  return shape;
}

// The directions, checked against the noisy images.
inline Tangents checked_tangents(const Array<float>& noisy, const Array<float>& centre,
                                 const Array<float>& tangents) {
  if (noisy.ndim() != 2 || centre.ndim() != 2 || centre.shape(0) != noisy.shape(0) ||
      centre.shape(1) != noisy.shape(1)) {
    throw pybind11::value_error("`centre` must have the shape [B, D] of `noisy`, got " +
                                shape_text(centre));
  }
  if (tangents.ndim() != 3 || tangents.shape(0) != noisy.shape(0) ||
      tangents.shape(2) != noisy.shape(1)) {
    throw pybind11::value_error("`tangents` must have shape [B, K, D], got " +
                                shape_text(tangents));
  }
  return {centre.data(), tangents.data(), size(tangents.shape(1))};
}

// An array of a row for each noisy image.
template <typename T>
inline void check_rows(const Array<T>& array, const Array<float>& noisy, std::size_t values,
                       const std::string& name) {
  if (array.ndim() != 2 || array.shape(0) != noisy.shape(0) || size(array.shape(1)) != values) {
    throw pybind11::value_error("`" + name + "` must have shape [B, " + std::to_string(values) +
                                "], got " + shape_text(array));
  }
}

inline void check_tree(const DifferenceTree& tree, const Scan& scan) {
  if (scan.images.dim != tree.inputs_count) {
    throw pybind11::value_error("`images` must have as many values as the tree has inputs");
  }
}

// Where a masked scan counts from, if anywhere.
inline void check_centre(const std::optional<Array<float>>& centre, const DifferenceTree& tree,
                         Scan& scan) {
  if (!centre) return;
  if (centre->ndim() != 1 || size(centre->shape(0)) != tree.inputs_count) {
    throw pybind11::value_error("`centre` must have shape [D], got " + shape_text(*centre));
  }
  scan.batch.centre = centre->data();
}

}  // namespace pyflocality
