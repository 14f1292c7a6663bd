// Arrays of NumPy as bindings take them, and checks of what is common to them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <initializer_list>
#include <string>

namespace pyflocality {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Floats = Array<float>;
using Doubles = Array<double>;
using ImageShape = std::array<std::size_t, 3>;

inline std::string shape_text(const py::array& array) {
  return py::str(array.attr("shape")).cast<std::string>();
}

inline std::size_t size(const py::array& array, py::ssize_t axis) {
  return static_cast<std::size_t>(array.shape(axis));
}

// An array of that shape, of which `text` tells.
inline void check_shape(const py::array& array, const std::string& name,
                        std::initializer_list<std::size_t> shape, const std::string& text) {
  bool same = static_cast<std::size_t>(array.ndim()) == shape.size();
  for (std::size_t axis = 0; same && axis < shape.size(); ++axis) {
    same = size(array, static_cast<py::ssize_t>(axis)) == shape.begin()[axis];
  }
  if (!same) {
    throw py::value_error("`" + name + "` must have shape " + text + ", got " + shape_text(array));
  }
}

// Number and size of images [n, D] beside noisy ones [B, D].
inline std::array<std::size_t, 2> checked_rows(const py::array& images, const py::array& noisy) {
  if (noisy.ndim() != 2 || noisy.shape(1) == 0) {
    throw py::value_error("`noisy` must have shape [B, D], got " + shape_text(noisy));
  }
  if (images.ndim() != 2 || images.shape(1) != noisy.shape(1)) {
    throw py::value_error("`images` must have shape [n, D] with D = " +
                          std::to_string(noisy.shape(1)) + ", got " + shape_text(images));
  }
  return {size(images, 0), size(images, 1)};
}

inline std::size_t checked_threads(py::ssize_t threads) {
  if (threads < 1) {
    throw py::value_error("`threads` must be at least 1, got " + std::to_string(threads));
  }
  return static_cast<std::size_t>(threads);
}

// Raises KeyboardInterrupt in the middle of a long call.
inline void check_signals() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace pyflocality
