#include <algorithm>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "cpu_features.h"
#include "difference_tree.h"
#include "equivariant_posterior.h"
#include "global_posterior.h"
#include "masked_posterior.h"
#include "window_posterior.h"

namespace py = pybind11;

namespace pyflocality {
namespace {

std::size_t size(py::ssize_t value) { return static_cast<std::size_t>(value); }

// The arguments all scans share, checked; and the arrays they fill.
struct Scan {
  Scan(const py::array& images_array, const Array<float>& noisy, const Array<float>& scale,
       std::size_t queries, std::size_t values, py::ssize_t thread_count, const std::string& isa)
      : threads(checked_threads(thread_count)), instructions(choose_instruction_set(isa)) {
    if (noisy.ndim() != 2) {
      throw py::value_error("`noisy` must have shape [B, D], got " + shape_text(noisy));
    }
    if (images_array.ndim() != 2 || images_array.shape(0) == 0 ||
        images_array.shape(1) != noisy.shape(1)) {
      throw py::value_error("`images` must have shape [N, D] with D = " +
                            std::to_string(noisy.shape(1)) + ", got " + shape_text(images_array));
    }
    if (scale.ndim() != 1 || scale.shape(0) != noisy.shape(0)) {
      throw py::value_error("`scale` must have shape [B], got " + shape_text(scale));
    }
    images = {nullptr, nullptr, size(images_array.shape(0)), size(images_array.shape(1))};
    if (py::isinstance<Array<std::uint8_t>>(images_array)) {
      images.bytes = static_cast<const std::uint8_t*>(images_array.data());
    } else if (py::isinstance<Array<float>>(images_array)) {
      images.floats = static_cast<const float*>(images_array.data());
    } else {
      throw py::type_error("`images` must be a contiguous array of uint8 or float32");
    }
    batch = {noisy.data(), scale.data(), size(noisy.shape(0))};
    minimum = Array<double>({batch.batch, queries});
    total = Array<double>({batch.batch, queries});
    weighted = Array<double>({batch.batch, queries, values});
    result = {minimum.mutable_data(), total.mutable_data(), weighted.mutable_data()};
  }

  // Runs the kernel without the interpreter's lock.
  template <typename Kernel>
  py::tuple run(const Kernel& kernel) {
    if (batch.batch > 0) {
      const py::gil_scoped_release release;
      kernel();
    }
    return py::make_tuple(minimum, total, weighted);
  }

  std::size_t threads;
  InstructionSet instructions;
  StoredImages images;
  NoisyBatch batch;
  Array<double> minimum, total, weighted;
  ScanResult result;
};

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
  if (window % 2 == 0) {
    throw py::value_error("`window` must be odd, got " + std::to_string(window));
  }
  Scan scan(images, noisy, scale, height * width, channels, threads, isa);
  if (scan.images.dim != channels * height * width) {
    throw py::value_error("`images` must have channels * height * width values");
  }
  return scan.run([&] {
    window_posterior({channels, height, width, window}, scan.images, scan.batch, scan.result,
                     scan.threads, scan.instructions, check_signals);
  });
}

py::tuple scan_patches(const py::array& images, const Array<float>& noisy,
                       const Array<float>& scale, std::size_t channels, std::size_t height,
                       std::size_t width, std::size_t window, bool circular, py::ssize_t threads,
                       const std::string& isa) {
  if (window % 2 == 0 || (circular && window > std::min(height, width))) {
    throw py::value_error("`window` must be odd and, if circular, fit inside the image, got " +
                          std::to_string(window));
  }
  Scan scan(images, noisy, scale, height * width, channels, threads, isa);
  if (scan.images.dim != channels * height * width) {
    throw py::value_error("`images` must have channels * height * width values");
  }
  return scan.run([&] {
    equivariant_posterior({channels, height, width, window}, circular, scan.images, scan.batch,
                          scan.result, scan.threads, scan.instructions, check_signals);
  });
}

py::tuple scan_masks(const DifferenceTree& tree, const py::array& images, const Array<float>& noisy,
                     const Array<float>& scale, py::ssize_t threads, const std::string& isa) {
  Scan scan(images, noisy, scale, tree.outputs, 1, threads, isa);
  if (scan.images.dim != tree.inputs_count) {
    throw py::value_error("`images` must have as many values as the tree has inputs");
  }
  return scan.run([&] {
    masked_posterior(tree, scan.images, scan.batch, scan.result, scan.threads, scan.instructions,
                     check_signals);
  });
}

DifferenceTree make_tree(const Array<std::uint8_t>& bits, std::size_t channels, std::size_t height,
                         std::size_t width) {
  const std::size_t count = channels * height * width;
  if (bits.ndim() != 2 || size(bits.shape(0)) != count || size(bits.shape(1)) != (count + 7) / 8) {
    throw py::value_error("`bits` must have shape [D, ceil(D / 8)], got " + shape_text(bits));
  }
  const py::gil_scoped_release release;
  return build_difference_tree(bits.data(), (count + 7) / 8, channels, height, width);
}

}  // namespace

void bind_posterior(py::module_& module) {
  py::class_<DifferenceTree>(
      module, "DifferenceTree",
      "Schedule that forms the sums over the masks of all outputs from one another.")
      .def(py::init(&make_tree), py::arg("bits").noconvert(), py::arg("channels"),
           py::arg("height"), py::arg("width"))
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
             py::arg("threads"), py::arg("isa") = "", scan_doc);
}

}  // namespace pyflocality
