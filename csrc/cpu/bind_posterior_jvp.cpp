#include <string>

#include "bind_scan.h"
#include "global_jvp.h"
#include "masked_jvp.h"
#include "window_jvp.h"

namespace py = pybind11;

namespace pyflocality {
namespace {

py::tuple scan_global(const py::array& images, const Array<float>& noisy, const Array<float>& scale,
                      const Array<float>& centre, const Array<float>& directions,
                      py::ssize_t threads, const std::string& isa) {
  const Tangents tangents = checked_tangents(noisy, centre, directions);
  Scan scan(images, noisy, scale, 1, tangents.sums(size(noisy.shape(1))), threads, isa);
  return scan.run([&] {
    global_posterior_jvp(scan.images, scan.batch, tangents, scan.result, scan.threads,
                         scan.instructions, check_signals);
  });
}

py::tuple scan_windows(const py::array& images, const Array<float>& noisy,
                       const Array<float>& scale, const Array<float>& centre,
                       const Array<float>& directions, std::size_t channels, std::size_t height,
                       std::size_t width, std::size_t window, py::ssize_t threads,
                       const std::string& isa) {
  const Tangents tangents = checked_tangents(noisy, centre, directions);
  const WindowShape shape = checked_shape(noisy, channels, height, width, window);
  Scan scan(images, noisy, scale, height * width, tangents.sums(channels), threads, isa);
  return scan.run([&] {
    window_posterior_jvp(shape, scan.images, scan.batch, tangents, scan.result, scan.threads,
                         scan.instructions, check_signals);
  });
}

py::tuple scan_masks(const DifferenceTree& tree, const py::array& images, const Array<float>& noisy,
                     const Array<float>& scale, const Array<float>& centre,
                     const Array<float>& directions, py::ssize_t threads, const std::string& isa) {
  const Tangents tangents = checked_tangents(noisy, centre, directions);
  Scan scan(images, noisy, scale, tree.outputs, tangents.sums(1), threads, isa);
  check_tree(tree, scan);
  if (tree.answered() == 0) {
    throw py::value_error("`tree` must have an output for every input");
  }
  return scan.run([&] {
    masked_posterior_jvp(tree, scan.images, scan.batch, tangents, scan.result, scan.threads,
                         scan.instructions, check_signals);
  });
}

}  // namespace

void bind_posterior_jvp(py::module_& module) {
  const char* scan_doc =
      "Scan images [N, D] with noisy images [B, D] and tangents [B, K, D] in stored units.\n\n"
      "Returns minimum [B, Q], total [B, Q] and weighted [B, Q, V + K + K V]: sums of values and\n"
      "of inner products, both counted from centre [B, D], and of their products.";
  module.def("global_posterior_jvp", &scan_global, py::arg("images"), py::arg("noisy").noconvert(),
             py::arg("scale").noconvert(), py::arg("centre").noconvert(),
             py::arg("tangents").noconvert(), py::kw_only(), py::arg("threads"),
             py::arg("isa") = "", scan_doc);
  module.def("window_posterior_jvp", &scan_windows, py::arg("images"), py::arg("noisy").noconvert(),
             py::arg("scale").noconvert(), py::arg("centre").noconvert(),
             py::arg("tangents").noconvert(), py::kw_only(), py::arg("channels"), py::arg("height"),
             py::arg("width"), py::arg("window"), py::arg("threads"), py::arg("isa") = "",
             scan_doc);
  module.def("masked_posterior_jvp", &scan_masks, py::arg("tree"), py::arg("images"),
             py::arg("noisy").noconvert(), py::arg("scale").noconvert(),
             py::arg("centre").noconvert(), py::arg("tangents").noconvert(), py::kw_only(),
             py::arg("threads"), py::arg("isa") = "", scan_doc);
}

}  // namespace pyflocality
