#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "bind_scan.h"
#include "difference_tree.h"
#include "equivariant_posterior.h"
#include "global_posterior.h"
#include "masked_posterior.h"
#include "window_posterior.h"

namespace py = pybind11;

namespace pyflocality {
namespace {

py::tuple scan_global(const py::array& images, const Array<float>& noisy, const Array<float>& scale,
                      py::ssize_t threads, const std::string& isa) {
  const std::size_t values = noisy.ndim() == 2 ? size(noisy.shape(1)) : 0;
  Scan scan(images, noisy, scale, 1, values, threads, isa);
  return scan.run([&] {
    global_posterior(scan.images, scan.batch, scan.result, scan.threads, scan.instructions,
                     check_signals);
  });
}

py::tuple scan_windows(const py::array& images, const Array<float>& noisy,
                       const Array<float>& scale, std::size_t channels, std::size_t height,
                       std::size_t width, std::size_t window, py::ssize_t threads,
                       const std::string& isa) {
  const WindowShape shape = checked_shape(noisy, channels, height, width, window);
  Scan scan(images, noisy, scale, height * width, channels, threads, isa);
  return scan.run([&] {
    window_posterior(shape, scan.images, scan.batch, scan.result, scan.threads, scan.instructions,
                     check_signals);
  });
}

py::tuple scan_patches(const py::array& images, const Array<float>& noisy,
                       const Array<float>& scale, std::size_t channels, std::size_t height,
                       std::size_t width, std::size_t window, bool circular, py::ssize_t threads,
                       const std::string& isa) {
  if (circular && window > std::min(height, width)) {
    throw py::value_error("`window` must fit inside the image if circular, got " +
                          std::to_string(window));
  }
  const WindowShape shape = checked_shape(noisy, channels, height, width, window);
  Scan scan(images, noisy, scale, height * width, channels, threads, isa);
  return scan.run([&] {
    equivariant_posterior(shape, circular, scan.images, scan.batch, scan.result, scan.threads,
                          scan.instructions, check_signals);
  });
}

py::tuple scan_masks(const DifferenceTree& tree, const py::array& images, const Array<float>& noisy,
                     const Array<float>& scale, const std::optional<Array<float>>& centre,
                     py::ssize_t threads, const std::string& isa) {
  Scan scan(images, noisy, scale, tree.outputs, tree.answered(), threads, isa);
  check_tree(tree, scan);
  check_centre(centre, tree, scan);
  return scan.run([&] {
    masked_posterior(tree, scan.images, scan.batch, scan.result, scan.threads, scan.instructions,
                     check_signals);
  });
}

DifferenceTree make_tree(const Array<std::uint8_t>& bits, std::size_t inputs, std::size_t channels,
                         std::size_t height, std::size_t width) {
  if (bits.ndim() != 2 || size(bits.shape(1)) != (inputs + 7) / 8) {
    throw py::value_error("`bits` must have shape [Q, ceil(D / 8)], got " + shape_text(bits));
  }
  const OutputGrid grid{channels, height, width};
  const std::size_t outputs = size(bits.shape(0));
  if (grid.size() > outputs) {
    throw py::value_error("`bits` must have a row for each output on the grid, got " +
                          shape_text(bits));
  }
  const py::gil_scoped_release release;
  return build_difference_tree(bits.data(), inputs, outputs, grid);
}

}  // namespace

void bind_posterior(py::module_& module) {
  py::class_<DifferenceTree>(
      module, "DifferenceTree",
      "Schedule that forms the sums over the masks of all outputs from one another.")
      .def(py::init(&make_tree), py::arg("bits").noconvert(), py::arg("inputs"),
           py::arg("channels"), py::arg("height"), py::arg("width"))
      .def_property_readonly("terms", &DifferenceTree::terms,
                             "Terms added or subtracted in all, per query and image.")
      .def_property_readonly(
          "nodes", [](const DifferenceTree& tree) { return tree.nodes.size(); },
          "Sums that are formed.")
      .def_property_readonly(
          "fresh_starts",
          [](const DifferenceTree& tree) {
            std::size_t count = 0;
            for (const auto& node : tree.nodes) count += node.from == DifferenceTree::kFromEmpty;
            return count;
          },
          "Sums that are formed from nothing.")
      .def_readonly("slots", &DifferenceTree::slots, "Sums kept for later at the same time.");

  const char* scan_doc =
      "Scan images [N, D] with noisy images [B, D] in stored units.\n\n"
      "Returns minimum [B, Q], total [B, Q] and weighted [B, Q, V].";
  module.def("global_posterior", &scan_global, py::arg("images"), py::arg("noisy").noconvert(),
             py::arg("scale").noconvert(), py::kw_only(), py::arg("threads"), py::arg("isa") = "",
             scan_doc);
  module.def("window_posterior", &scan_windows, py::arg("images"), py::arg("noisy").noconvert(),
             py::arg("scale").noconvert(), py::kw_only(), py::arg("channels"), py::arg("height"),
             py::arg("width"), py::arg("window"), py::arg("threads"), py::arg("isa") = "",
             scan_doc);
  module.def("equivariant_posterior", &scan_patches, py::arg("images"),
             py::arg("noisy").noconvert(), py::arg("scale").noconvert(), py::kw_only(),
             py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("window"),
             py::arg("circular"), py::arg("threads"), py::arg("isa") = "", scan_doc);
  module.def("masked_posterior", &scan_masks, py::arg("tree"), py::arg("images"),
             py::arg("noisy").noconvert(), py::arg("scale").noconvert(), py::kw_only(),
             py::arg("centre").noconvert() = py::none(), py::arg("threads"), py::arg("isa") = "",
             scan_doc);
}

}  // namespace pyflocality
