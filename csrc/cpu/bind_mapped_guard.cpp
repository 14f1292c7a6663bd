#include <cstdint>

#include "bindings.h"
#include "mapped_guard.h"

namespace py = pybind11;

namespace pyflocality {

void bind_mapped_guard(py::module_& module) {
  // All of it runs under the interpreter's lock.
  py::class_<MappedGuard>(module, "MappedGuard",
                          "Replaces pages of a mapped file that cannot be read by zeros.\n\n"
                          "Without it the system ends the process (SIGBUS). `lost` tells that "
                          "there were any; `release` ends the guard.")
      .def(py::init<std::uintptr_t, std::size_t>(), py::arg("address"), py::arg("size"))
      .def_property_readonly("lost", &MappedGuard::lost)
      .def("release", &MappedGuard::release);
}

}  // namespace pyflocality
