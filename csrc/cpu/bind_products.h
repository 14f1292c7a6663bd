#pragma once

#include <pybind11/pybind11.h>

namespace pyflocality {

// Binds what forms products of images, or of other rows, and is no pass of a posterior.
void bind_products(pybind11::module_& module);

}  // namespace pyflocality
