// The extension module pyflocality._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu_features.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native CPU kernels of pyflocality.";
  module.def("instruction_sets", &pyflocality::available_instruction_sets,
             "Instruction sets this machine can run kernels for, best first.");
  pyflocality::bind_covariance(module);
  pyflocality::bind_posterior(module);
  pyflocality::bind_posterior_jvp(module);
  pyflocality::bind_masked_adjoint(module);
  pyflocality::bind_window_adjoint(module);
  pyflocality::bind_mapped_guard(module);
}
