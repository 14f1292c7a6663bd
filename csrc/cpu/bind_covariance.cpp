#include <cstdint>
#include <string>

#include "bindings.h"
#include "covariance.h"
#include "cpu_features.h"

namespace py = pybind11;

namespace pyflocality {
namespace {

void accumulate(const Array<std::uint8_t>& images, Array<std::int64_t>& gram,
                Array<std::int64_t>& total, py::ssize_t threads, const std::string& isa) {
  if (images.ndim() != 2) {
    throw py::value_error("`images` must have shape [n, D], got " + shape_text(images));
  }
  const py::ssize_t count = images.shape(0), dim = images.shape(1);
  if (gram.ndim() != 2 || gram.shape(0) != dim || gram.shape(1) != dim) {
    throw py::value_error("`gram` must have shape [D, D] with D = " + std::to_string(dim) +
                          ", got " + shape_text(gram));
  }
  if (total.ndim() != 1 || total.shape(0) != dim) {
    throw py::value_error("`total` must have shape [D] with D = " + std::to_string(dim) + ", got " +
                          shape_text(total));
  }
  const std::size_t workers = checked_threads(threads);
  const InstructionSet instructions = choose_instruction_set(isa);
  if (count == 0 || dim == 0) return;

  const std::uint8_t* images_data = images.data();
  std::int64_t* gram_data = gram.mutable_data();
  std::int64_t* total_data = total.mutable_data();
  const py::gil_scoped_release release;
  accumulate_covariance(images_data, static_cast<std::size_t>(count), static_cast<std::size_t>(dim),
                        gram_data, total_data, workers, instructions, check_signals);
}

}  // namespace

void bind_covariance(py::module_& module) {
  module.def("accumulate_covariance", &accumulate, py::arg("images").noconvert(),
             py::arg("gram").noconvert(), py::arg("total").noconvert(), py::kw_only(),
             py::arg("threads"), py::arg("isa") = "",
             "Add the sums of uint8 images [n, D], centred by 128, to int64 totals.\n\n"
             "gram [D, D] gains sum_i c_i c_i^T in its upper triangle, total [D] gains sum_i c_i.");
}

}  // namespace pyflocality
