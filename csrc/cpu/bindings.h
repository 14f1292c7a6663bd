// What the files of Python bindings share. Arrays come as NumPy arrays and are never copied or
// converted.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

namespace pyflocality {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

inline std::string shape_text(const pybind11::array& array) {
  return pybind11::str(array.attr("shape")).cast<std::string>();
}

// Raises KeyboardInterrupt in the middle of a long call.
inline void check_signals() {
  const pybind11::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

inline std::size_t checked_threads(pybind11::ssize_t threads) {
  if (threads < 1) {
    throw pybind11::value_error("`threads` must be at least 1, got " + std::to_string(threads));
  }
  return static_cast<std::size_t>(threads);
}

void bind_covariance(pybind11::module_& module);
void bind_posterior(pybind11::module_& module);
void bind_posterior_jvp(pybind11::module_& module);
void bind_masked_adjoint(pybind11::module_& module);
void bind_window_adjoint(pybind11::module_& module);
void bind_mapped_guard(pybind11::module_& module);

}  // namespace pyflocality
