// The extension module pyflocality._C. Arrays come as NumPy arrays and are never copied or
// converted.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "arrays.h"
#include "bind_products.h"
#include "cpu_features.h"
#include "difference_tree.h"
#include "equivariant_posterior.h"
#include "global_posterior.h"
#include "mapped_guard.h"
#include "masked_posterior.h"
#include "posterior.h"
#include "weighted_posterior.h"
#include "window_posterior.h"

namespace py = pybind11;

namespace pyflocality {
namespace {

Pass checked_pass(const py::array& images, const Floats& noisy, const Floats& scale,
                  py::ssize_t threads, const std::string& isa) {
  if (noisy.ndim() != 2) {
    throw py::value_error("`noisy` must have shape [B, D], got " + shape_text(noisy));
  }
  if (images.ndim() != 2 || images.shape(0) == 0 || images.shape(1) != noisy.shape(1)) {
    throw py::value_error("`images` must have shape [N, D] with D = " +
                          std::to_string(noisy.shape(1)) + ", got " + shape_text(images));
  }
  check_shape(scale, "scale", {size(noisy, 0)}, "[B]");
  StoredImages stored{nullptr, nullptr, size(images, 0), size(images, 1)};
  if (py::isinstance<Array<std::uint8_t>>(images)) {
    stored.bytes = static_cast<const std::uint8_t*>(images.data());
  } else if (py::isinstance<Floats>(images)) {
    stored.floats = static_cast<const float*>(images.data());
  } else {
    throw py::type_error("`images` must be a contiguous array of uint8 or float32");
  }
  return {stored,
          {noisy.data(), scale.data(), size(noisy, 0)},
          checked_threads(threads),
          choose_instruction_set(isa),
          check_signals};
}

// Runs a kernel without the interpreter's lock, where there is anything to do.
template <typename Kernel>
void run(const Pass& pass, const Kernel& kernel) {
  if (pass.batch.count == 0) return;
  const py::gil_scoped_release release;
  kernel();
}

// What a scan answers, for some queries of each noisy image and the sums of each.
template <typename Kernel>
py::object scan(const Pass& pass, std::size_t queries, std::size_t sums, const Kernel& kernel) {
  const std::size_t batch = pass.batch.count;
  Doubles minimum({batch, queries}), total({batch, queries}), weighted({batch, queries, sums});
  const ScanResult result{minimum.mutable_data(), total.mutable_data(), weighted.mutable_data()};
  run(pass, [&] { kernel(result); });
  return py::make_tuple(minimum, total, weighted);
}

// What a second pass answers.
template <typename Kernel>
py::object apply(const Pass& pass, const PosteriorWeights& weights, const Kernel& kernel) {
  const std::size_t count = weights.cotangents ? weights.count : pass.values.answered();
  Doubles sums({pass.batch.count, count, pass.images.dim});
  double* result = sums.mutable_data();
  run(pass, [&] { kernel(result); });
  return std::move(sums);
}

Tangents checked_tangents(const Pass& pass, const Floats& tangents, const Floats& centre) {
  const std::size_t count = tangents.ndim() == 3 ? size(tangents, 1) : 0;
  check_shape(centre, "centre", {pass.batch.count, pass.images.dim}, "[B, D]");
  check_shape(tangents, "tangents", {pass.batch.count, count, pass.images.dim}, "[B, K, D]");
  return {centre.data(), tangents.data(), count};
}

PosteriorWeights checked_weights(const Pass& pass, std::size_t queries, const Doubles& minimum,
                                 const Doubles& total) {
  check_shape(minimum, "minimum", {pass.batch.count, queries}, "[B, Q]");
  check_shape(total, "total", {pass.batch.count, queries}, "[B, Q]");
  return {minimum.data(), total.data()};
}

PosteriorWeights checked_cotangents(const Pass& pass, PosteriorWeights weights,
                                    const Floats& cotangents, const Floats& mean,
                                    const Floats& centre) {
  const std::size_t batch = pass.batch.count, values = pass.values.answered() * pass.images.dim;
  const std::size_t count = cotangents.ndim() == 3 ? size(cotangents, 1) : 0;
  check_shape(cotangents, "cotangents", {batch, count, values}, "[B, K, A D]");
  check_shape(mean, "mean", {batch, values}, "[B, A D]");
  check_shape(centre, "centre", {batch, pass.images.dim}, "[B, D]");
  weights.cotangents = cotangents.data();
  weights.count = count;
  weights.mean = mean.data();
  weights.centre = centre.data();
  return weights;
}

// A window that is odd, and cut at the border, or one that fits inside the image.
WindowShape checked_window(const Pass& pass, const ImageShape& image, std::size_t window,
                           bool inside) {
  const auto [channels, height, width] = image;
  if (inside ? window == 0 || window > std::min(height, width) : window % 2 == 0) {
    throw py::value_error(std::string("`window` must ") +
                          (inside ? "fit inside the image" : "be odd") + ", got " +
                          std::to_string(window));
  }
  if (pass.images.dim != channels * height * width) {
    throw py::value_error("`image_shape` must be that of images of " +
                          std::to_string(pass.images.dim) + " values");
  }
  return {channels, height, width, window};
}

void check_tree(const Pass& pass, const DifferenceTree& tree, bool answers) {
  if (pass.images.dim != tree.inputs_count) {
    throw py::value_error("`images` must have as many values as the tree has inputs");
  }
  if (answers && tree.answered() == 0) {
    throw py::value_error("the outputs of `tree` must answer values of inputs");
  }
}

// The pass with what a masked kernel counts from, if anything.
Pass centred(Pass pass, const std::optional<Floats>& centre) {
  if (!centre) return pass;
  check_shape(*centre, "centre", {pass.images.dim}, "[D]");
  pass.batch.centre = centre->data();
  return pass;
}

py::object scan_global(const Pass& pass) {
  return scan(pass, 1, pass.values.answered() * pass.images.dim,
              [&](const ScanResult& result) { global_posterior(pass, result); });
}

py::object scan_global_jvp(const Pass& pass, const Floats& centre, const Floats& directions) {
  const Tangents tangents = checked_tangents(pass, directions, centre);
  return scan(pass, 1, tangents.sums(pass.images.dim),
              [&](const ScanResult& result) { global_posterior_jvp(pass, tangents, result); });
}

py::object scan_windows(const Pass& pass, const ImageShape& image, std::size_t window) {
  const WindowShape shape = checked_window(pass, image, window, false);
  return scan(pass, shape.pixels(), pass.values.answered() * shape.channels,
              [&](const ScanResult& result) { window_posterior(pass, shape, result); });
}

py::object scan_windows_jvp(const Pass& pass, const Floats& centre, const Floats& directions,
                            const ImageShape& image, std::size_t window) {
  const Tangents tangents = checked_tangents(pass, directions, centre);
  const WindowShape shape = checked_window(pass, image, window, false);
  const std::size_t sums = tangents.sums(pass.values.answered() * shape.channels);
  return scan(pass, shape.pixels(), sums, [&](const ScanResult& result) {
    window_posterior_jvp(pass, shape, tangents, result);
  });
}

py::object apply_windows_vjp(const Pass& pass, const Doubles& minimum, const Doubles& total,
                             const Floats& cotangents, const Floats& mean, const Floats& centre,
                             const ImageShape& image, std::size_t window) {
  const WindowShape shape = checked_window(pass, image, window, false);
  const PosteriorWeights weights = checked_cotangents(
      pass, checked_weights(pass, shape.pixels(), minimum, total), cotangents, mean, centre);
  return apply(pass, weights,
               [&](double* sums) { window_posterior_vjp(pass, shape, weights, sums); });
}

py::object scan_patches(const Pass& pass, const ImageShape& image, std::size_t window) {
  const WindowShape shape = checked_window(pass, image, window, true);
  return scan(pass, shape.pixels(), 0,
              [&](const ScanResult& result) { patch_set_scan(pass, shape, result); });
}

py::object apply_patches(const Pass& pass, const Doubles& minimum, const Doubles& total,
                         const ImageShape& image, std::size_t window) {
  const WindowShape shape = checked_window(pass, image, window, true);
  const PosteriorWeights weights = checked_weights(pass, shape.pixels(), minimum, total);
  return apply(pass, weights,
               [&](double* sums) { window_posterior_vjp(pass, shape, weights, sums); });
}

py::object scan_shifts(const Pass& pass, const ImageShape& image, std::size_t window,
                       bool circular) {
  if (circular) checked_window(pass, image, window, true);
  const WindowShape shape = checked_window(pass, image, window, false);
  return scan(pass, shape.pixels(), shape.channels, [&](const ScanResult& result) {
    equivariant_posterior(pass, shape, circular, result);
  });
}

py::object scan_masks(const Pass& plain, const DifferenceTree& tree,
                      const std::optional<Floats>& centre) {
  check_tree(plain, tree, plain.values.number > 0);
  const Pass pass = centred(plain, centre);
  return scan(pass, tree.outputs, tree.answered() * pass.values.answered(),
              [&](const ScanResult& result) { masked_posterior(pass, tree, result); });
}

py::object scan_masks_jvp(const Pass& pass, const Floats& centre, const Floats& directions,
                          const DifferenceTree& tree) {
  check_tree(pass, tree, true);
  const Tangents tangents = checked_tangents(pass, directions, centre);
  return scan(pass, tree.outputs, tangents.sums(1), [&](const ScanResult& result) {
    masked_posterior_jvp(pass, tree, tangents, result);
  });
}

py::object apply_masks_vjp(const Pass& plain, const Doubles& minimum, const Doubles& total,
                           const Floats& cotangents, const Floats& mean, const Floats& base,
                           const DifferenceTree& tree, const std::optional<Floats>& centre) {
  check_tree(plain, tree, true);
  const Pass pass = centred(plain, centre);
  const PosteriorWeights weights = checked_cotangents(
      pass, checked_weights(pass, tree.outputs, minimum, total), cotangents, mean, base);
  return apply(pass, weights,
               [&](double* sums) { masked_posterior_vjp(pass, tree, tree, weights, sums); });
}

py::object apply_masks(const Pass& plain, const Doubles& minimum, const Doubles& total,
                       const DifferenceTree& tree, const DifferenceTree& answers,
                       const std::optional<Floats>& centre) {
  check_tree(plain, tree, false);
  check_tree(plain, answers, false);
  if (answers.outputs != tree.outputs) {
    throw py::value_error("`answers` must have as many outputs as `tree`");
  }
  const Pass pass = centred(plain, centre);
  const PosteriorWeights weights = checked_weights(pass, tree.outputs, minimum, total);
  return apply(pass, weights,
               [&](double* sums) { masked_posterior_vjp(pass, tree, answers, weights, sums); });
}

py::object scan_weights(const Pass& pass, const InputWeights& weights) {
  if (pass.images.dim != weights.inputs_count) {
    throw py::value_error("`images` must have as many values as the weights have inputs");
  }
  return scan(pass, weights.outputs, pass.values.answered(),
              [&](const ScanResult& result) { weighted_posterior(pass, weights, result); });
}

// Inputs whose values outputs answer: one for each.
void check_answers(const std::vector<std::uint32_t>& answers, std::size_t inputs,
                   std::size_t outputs) {
  if (answers.size() != outputs) {
    throw py::value_error("`answers` must name an input for each of " + std::to_string(outputs) +
                          " outputs, got " + std::to_string(answers.size()));
  }
  for (const std::uint32_t input : answers) {
    if (input >= inputs) {
      throw py::value_error("`answers` must name inputs below " + std::to_string(inputs) +
                            ", got " + std::to_string(input));
    }
  }
}

InputWeights make_weights(const Floats& weights, const std::vector<std::uint32_t>& answers) {
  if (weights.ndim() != 2) {
    throw py::value_error("`weights` must have shape [Q, D], got " + shape_text(weights));
  }
  const std::size_t outputs = size(weights, 0), inputs = size(weights, 1);
  check_answers(answers, inputs, outputs);
  const py::gil_scoped_release release;
  return input_weights(weights.data(), inputs, outputs, answers);
}

DifferenceTree make_tree(const Array<std::uint8_t>& bits, std::size_t inputs, std::size_t channels,
                         std::size_t height, std::size_t width,
                         const std::vector<std::uint32_t>& answers) {
  if (bits.ndim() != 2 || size(bits, 1) != (inputs + 7) / 8) {
    throw py::value_error("`bits` must have shape [Q, ceil(D / 8)], got " + shape_text(bits));
  }
  const OutputGrid grid{channels, height, width};
  const std::size_t outputs = size(bits, 0);
  if (grid.size() > outputs) {
    throw py::value_error("`bits` must have a row for each output on the grid, got " +
                          shape_text(bits));
  }
  if (!answers.empty()) check_answers(answers, inputs, outputs);
  const py::gil_scoped_release release;
  return build_difference_tree(bits.data(), inputs, outputs, grid, answers);
}

// The pass with value images [N, R, D] that it answers, if any.
Pass answering(Pass pass, const std::optional<Floats>& values, bool with_image) {
  if (!values) return pass;
  const std::size_t number = values->ndim() == 3 ? size(*values, 1) : 0;
  if (number == 0) {
    throw py::value_error("`values` must have shape [N, R, D], got " + shape_text(*values));
  }
  check_shape(*values, "values", {pass.images.count, number, pass.images.dim}, "[N, R, D]");
  pass.values = {values->data(), number, with_image};
  return pass;
}

// Binds what takes a pass and further arguments, as (images, noisy, scale, those, threads, isa).
template <typename... Arguments, typename... Names>
void def_pass(py::module_& module, const char* name,
              py::object (*function)(const Pass&, Arguments...), const std::string& doc,
              const Names&... names) {
  module.def(
      name,
      [function](const py::array& images, const Floats& noisy, const Floats& scale,
                 Arguments... arguments, py::ssize_t threads, const std::string& isa) {
        return function(checked_pass(images, noisy, scale, threads, isa), arguments...);
      },
      py::arg("images"), py::arg("noisy").noconvert(), py::arg("scale").noconvert(), names...,
      py::arg("threads"), py::arg("isa") = "", doc.c_str());
}

// The same of kernels that answer value images.
template <typename... Arguments, typename... Names>
void def_answering(py::module_& module, const char* name,
                   py::object (*function)(const Pass&, Arguments...), const std::string& doc,
                   const Names&... names) {
  module.def(
      name,
      [function](const py::array& images, const Floats& noisy, const Floats& scale,
                 Arguments... arguments, const std::optional<Floats>& values, bool with_image,
                 py::ssize_t threads, const std::string& isa) {
        const Pass pass = checked_pass(images, noisy, scale, threads, isa);
        return function(answering(pass, values, with_image), arguments...);
      },
      py::arg("images"), py::arg("noisy").noconvert(), py::arg("scale").noconvert(), names...,
      py::arg("values").noconvert() = py::none(), py::arg("with_image") = true, py::arg("threads"),
      py::arg("isa") = "", doc.c_str());
}

void bind_passes(py::module_& module) {
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };
  const py::arg_v from = py::arg("centre").noconvert() = py::none();
  const py::arg image("image_shape"), window("window"), tree("tree");
  const py::kw_only keywords;
  const std::string scans =
      "Scan images [N, D] with noisy images [B, D] in stored units.\n\n"
      "Returns minimum [B, Q], total [B, Q] and weighted [B, Q, V]. Value images [N, R, D] are\n"
      "answered in the place of images, or behind them.";
  const std::string jvps =
      "Scan images [N, D] with noisy images [B, D] and tangents [B, K, D] in stored units.\n\n"
      "Returns minimum [B, Q], total [B, Q] and weighted [B, Q, V + K + K V]: sums of values and\n"
      "of inner products, both counted from centre [B, D], and of their products.";
  const std::string sums =
      "Apply the weights of a scan, or their derivative along cotangents [B, K, A D] of A "
      "answered\n"
      "images.\n\n"
      "Returns sums [B, K, D] in stored units, [B, A, D] of the weights themselves.";

  def_answering(module, "global_posterior", &scan_global, scans, keywords);
  def_pass(module, "global_posterior_jvp", &scan_global_jvp, jvps, array("centre"),
           array("tangents"), keywords);
  def_answering(module, "window_posterior", &scan_windows, scans, keywords, image, window);
  def_answering(module, "window_posterior_jvp", &scan_windows_jvp, jvps, array("centre"),
                array("tangents"), keywords, image, window);
  def_answering(module, "window_posterior_vjp", &apply_windows_vjp, sums, array("minimum"),
                array("total"), array("cotangents"), array("mean"), array("centre"), keywords,
                image, window);
  def_pass(module, "patch_set_scan", &scan_patches, scans, keywords, image, window);
  def_answering(module, "patch_set", &apply_patches, sums, array("minimum"), array("total"),
                keywords, image, window);
  def_pass(module, "equivariant_posterior", &scan_shifts, scans, keywords, image, window,
           py::arg("circular"));
  def_answering(module, "masked_posterior", &scan_masks, scans, keywords, tree, from);
  def_pass(module, "masked_posterior_jvp", &scan_masks_jvp, jvps, array("centre"),
           array("tangents"), keywords, tree);
  def_answering(module, "masked_posterior_vjp", &apply_masks_vjp, sums, array("minimum"),
                array("total"), array("cotangents"), array("mean"), array("base"), keywords, tree,
                from);
  def_answering(module, "weighted_posterior", &scan_weights, scans, keywords, py::arg("weights"));
  def_answering(module, "filtered_posterior", &apply_masks, sums, array("minimum"), array("total"),
                keywords, tree, py::arg("answers"), from);
}

}  // namespace
}  // namespace pyflocality

PYBIND11_MODULE(_C, module) {
  using namespace pyflocality;
  module.doc() = "Native CPU kernels of pyflocality.";
  module.def("instruction_sets", &available_instruction_sets,
             "Instruction sets this machine can run kernels for, best first.");
  bind_products(module);
  bind_passes(module);
  py::class_<DifferenceTree>(
      module, "DifferenceTree",
      "Schedule that forms the sums over the masks of all outputs from one another.")
      .def(py::init(&make_tree), py::arg("bits").noconvert(), py::arg("inputs"),
           py::arg("channels"), py::arg("height"), py::arg("width"),
           py::arg("answers") = std::vector<std::uint32_t>())
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
  py::class_<InputWeights>(module, "InputWeights",
                           "Weights [Q, D] of the inputs of outputs, without those of no weight.")
      .def(py::init(&make_weights), py::arg("weights").noconvert(), py::arg("answers"))
      .def_property_readonly(
          "entries", [](const InputWeights& weights) { return weights.inputs.size(); },
          "Inputs that are weighed in all, each for a block of outputs.");
  // All of it runs under the interpreter's lock.
  py::class_<MappedGuard>(module, "MappedGuard",
                          "Replaces pages of a mapped file that cannot be read by zeros.\n\n"
                          "Without it the system ends the process (SIGBUS). `lost` tells that "
                          "there were any; `release` ends the guard.")
      .def(py::init<std::uintptr_t, std::size_t>(), py::arg("address"), py::arg("size"))
      .def_property_readonly("lost", &MappedGuard::lost)
      .def("release", &MappedGuard::release);
}
