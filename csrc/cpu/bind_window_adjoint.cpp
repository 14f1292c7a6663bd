#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "bind_scan.h"
#include "window_adjoint.h"

namespace py = pybind11;

namespace pyflocality {
namespace {

py::tuple scan_patches(const py::array& images, const Array<float>& noisy,
                       const Array<float>& scale, std::size_t channels, std::size_t height,
                       std::size_t width, std::size_t window, py::ssize_t threads,
                       const std::string& isa) {
  const WindowShape shape = checked_shape_inside(noisy, channels, height, width, window);
  Scan scan(images, noisy, scale, height * width, 0, threads, isa);
  return scan.run([&] {
    patch_weights(shape, scan.images, scan.batch, scan.result, scan.threads, scan.instructions,
                  check_signals);
  });
}

// Sums [B, 1, D] of a patch set, or [B, K, D] of cotangents, which come with mean and centre.
Array<double> spread(const py::array& images, const Array<float>& noisy, const Array<float>& scale,
                     const Array<double>& minimum, const Array<double>& total,
                     const std::optional<Array<float>>& cotangents,
                     const std::optional<Array<float>>& mean,
                     const std::optional<Array<float>>& centre, std::size_t channels,
                     std::size_t height, std::size_t width, std::size_t window, py::ssize_t threads,
                     const std::string& isa) {
  const WindowShape shape = cotangents
                                ? checked_shape(noisy, channels, height, width, window)
                                : checked_shape_inside(noisy, channels, height, width, window);
  Scan scan(images, noisy, scale, 0, 0, threads, isa);
  check_rows(minimum, noisy, height * width, "minimum");
  check_rows(total, noisy, height * width, "total");
  WindowWeights weights{minimum.data(), total.data(), nullptr, 0, nullptr, nullptr};
  if (cotangents) {
    if (!mean || !centre) throw py::value_error("`cotangents` need `mean` and `centre`");
    const Tangents directions = checked_tangents(noisy, *centre, *cotangents);
    check_rows(*mean, noisy, scan.images.dim, "mean");
    weights.cotangents = directions.tangents;
    weights.count = directions.count;
    weights.mean = mean->data();
    weights.centre = directions.centre;
  }
  Array<double> sums({scan.batch.batch, weights.sums(), scan.images.dim});
  double* result = sums.mutable_data();
  scan.run([&] {
    window_adjoint(shape, scan.images, scan.batch, weights, result, scan.threads, scan.instructions,
                   check_signals);
  });
  return sums;
}

}  // namespace

void bind_window_adjoint(py::module_& module) {
  module.def("patch_weights", &scan_patches, py::arg("images"), py::arg("noisy").noconvert(),
             py::arg("scale").noconvert(), py::kw_only(), py::arg("channels"), py::arg("height"),
             py::arg("width"), py::arg("window"), py::arg("threads"), py::arg("isa") = "",
             "Scan images [N, D] with noisy images [B, D] in stored units.\n\n"
             "Returns minimum [B, H W], total [B, H W] and no values [B, H W, 0], for the windows "
             "that fit inside the image.");
  module.def("window_adjoint", &spread, py::arg("images"), py::arg("noisy").noconvert(),
             py::arg("scale").noconvert(), py::arg("minimum").noconvert(),
             py::arg("total").noconvert(), py::arg("cotangents").noconvert() = py::none(),
             py::arg("mean").noconvert() = py::none(), py::arg("centre").noconvert() = py::none(),
             py::kw_only(), py::arg("channels"), py::arg("height"), py::arg("width"),
             py::arg("window"), py::arg("threads"), py::arg("isa") = "",
             "Spread the posterior weights of images [N, D] over windows.\n\n"
             "Returns sums in stored units: [B, 1, D] over the windows that fit inside the image "
             "or, for cotangents [B, K, D], [B, K, D] over all.");
}

}  // namespace pyflocality
