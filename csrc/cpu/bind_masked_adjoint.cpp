#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bind_scan.h"
#include "masked_adjoint.h"

namespace py = pybind11;

namespace pyflocality {
namespace {

Array<double> spread(const DifferenceTree& tree, const DifferenceTree& answers,
                     const py::array& images, const Array<float>& noisy, const Array<float>& scale,
                     const Array<double>& minimum, const Array<double>& total,
                     const std::optional<Array<float>>& cotangents,
                     const std::optional<Array<float>>& mean,
                     const std::optional<Array<float>>& base,
                     const std::optional<Array<float>>& centre, py::ssize_t threads,
                     const std::string& isa) {
  Scan scan(images, noisy, scale, 0, 0, threads, isa);
  check_tree(tree, scan);
  check_tree(answers, scan);
  if (answers.outputs != tree.outputs) {
    throw py::value_error("`answers` must have as many outputs as `tree`");
  }
  check_centre(centre, tree, scan);
  check_rows(minimum, noisy, tree.outputs, "minimum");
  check_rows(total, noisy, tree.outputs, "total");
  MaskedWeights weights{minimum.data(), total.data(), nullptr, 0, nullptr, nullptr};
  if (cotangents) {
    if (!mean || !base) throw py::value_error("`cotangents` need `mean` and `base`");
    if (tree.answered() == 0) {
      throw py::value_error(
          "`tree` must have an output for every input where there are cotangents");
    }
    const Tangents directions = checked_tangents(noisy, *base, *cotangents);
    check_rows(*mean, noisy, tree.outputs, "mean");
    weights.cotangents = directions.tangents;
    weights.count = directions.count;
    weights.mean = mean->data();
    weights.base = directions.centre;
  }
  Array<double> sums({scan.batch.batch, weights.sums(), scan.images.dim});
  double* result = sums.mutable_data();
  scan.run([&] {
    masked_adjoint(tree, answers, scan.images, scan.batch, weights, result, scan.threads,
                   scan.instructions, check_signals);
  });
  return sums;
}

}  // namespace

void bind_masked_adjoint(py::module_& module) {
  module.def("masked_adjoint", &spread, py::arg("tree"), py::arg("answers"), py::arg("images"),
             py::arg("noisy").noconvert(), py::arg("scale").noconvert(),
             py::arg("minimum").noconvert(), py::arg("total").noconvert(),
             py::arg("cotangents").noconvert() = py::none(),
             py::arg("mean").noconvert() = py::none(), py::arg("base").noconvert() = py::none(),
             py::kw_only(), py::arg("centre").noconvert() = py::none(), py::arg("threads"),
             py::arg("isa") = "",
             "Spread the posterior weights of images [N, D] over the masks of `answers`.\n\n"
             "Returns sums in stored units: [B, 1, D] or, for cotangents [B, K, D], [B, K, D].");
}

}  // namespace pyflocality
