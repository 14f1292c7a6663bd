#include "bind_products.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "arrays.h"
#include "covariance.h"
#include "cpu_features.h"
#include "mask_tile.h"
#include "nearest.h"

namespace pyflocality {
namespace {

void accumulate(const Array<std::uint8_t>& images, Array<std::int64_t>& gram,
                Array<std::int64_t>& total, py::ssize_t threads, const std::string& isa) {
  if (images.ndim() != 2) {
    throw py::value_error("`images` must have shape [n, D], got " + shape_text(images));
  }
  const std::size_t count = size(images, 0), dim = size(images, 1);
  const std::string with = " with D = " + std::to_string(dim);
  check_shape(gram, "gram", {dim, dim}, "[D, D]" + with);
  check_shape(total, "total", {dim}, "[D]" + with);
  const std::size_t workers = checked_threads(threads);
  const InstructionSet instructions = choose_instruction_set(isa);
  if (count == 0 || dim == 0) return;

  const std::uint8_t* images_data = images.data();
  std::int64_t* gram_data = gram.mutable_data();
  std::int64_t* total_data = total.mutable_data();
  const py::gil_scoped_release release;
  accumulate_covariance(images_data, count, dim, gram_data, total_data, workers, instructions,
                        check_signals);
}

py::list search_nearest(const Array<std::uint8_t>& images, const Doubles& noisy,
                        const Doubles& limit, std::size_t k, py::ssize_t threads,
                        const std::string& isa) {
  const auto [count, dim] = checked_rows(images, noisy);
  const NearestQueries queries{noisy.data(), limit.data(), size(noisy, 0)};
  check_shape(limit, "limit", {queries.count}, "[B]");
  if (k == 0) throw py::value_error("`k` must be at least 1, got 0");
  const std::size_t workers = checked_threads(threads);
  const InstructionSet instructions = choose_instruction_set(isa);
  const std::uint8_t* images_data = images.data();
  std::vector<std::vector<NearestCandidate>> lists(queries.count);
  if (count > 0 && queries.count > 0) {
    const py::gil_scoped_release release;
    lists = nearest_candidates(images_data, count, dim, queries, k, workers, instructions,
                               check_signals);
  }
  py::list result;
  for (const std::vector<NearestCandidate>& list : lists) {
    Array<std::int64_t> rows(list.size());
    Doubles values(list.size()), slacks(list.size());
    for (std::size_t i = 0; i < list.size(); ++i) {
      rows.mutable_data()[i] = static_cast<std::int64_t>(list[i].image);
      values.mutable_data()[i] = list[i].value;
      slacks.mutable_data()[i] = list[i].slack;
    }
    result.append(py::make_tuple(rows, values, slacks));
  }
  return result;
}

Doubles measure_pairs(const Array<std::uint8_t>& images, const Doubles& noisy, const Doubles& alpha,
                      const Array<std::int64_t>& owner, py::ssize_t threads) {
  const auto [count, dim] = checked_rows(images, noisy);
  check_shape(alpha, "alpha", {size(noisy, 0)}, "[B]");
  check_shape(owner, "owner", {count}, "[n]");
  const NearestPairs pairs{images.data(), count, dim, noisy.data(), alpha.data(), owner.data()};
  for (std::size_t i = 0; i < count; ++i) {
    if (pairs.owner[i] < 0 || pairs.owner[i] >= noisy.shape(0)) {
      throw py::value_error("`owner` must hold numbers of noisy images, got " +
                            std::to_string(pairs.owner[i]));
    }
  }
  const std::size_t workers = checked_threads(threads);
  Doubles distances(count);
  double* result = distances.mutable_data();
  {
    const py::gil_scoped_release release;
    pair_distances(pairs, workers, result);
  }
  return distances;
}

py::object mark_entries(const Floats& values, const Floats& row_slack, const Floats& column_slack,
                        const Doubles& cutoffs, const py::array_t<double, 0>& factor,
                        const Doubles& coefficients, const Array<std::int64_t>& places,
                        std::size_t first_column, std::size_t most_left_open,
                        const std::string& isa) {
  if (values.ndim() != 2) {
    throw py::value_error("`values` must have shape [n, m], got " + shape_text(values));
  }
  const std::size_t rows = size(values, 0), columns = size(values, 1);
  check_shape(row_slack, "row_slack", {rows}, "[n]");
  check_shape(column_slack, "column_slack", {columns}, "[m]");
  check_shape(cutoffs, "cutoffs", {columns}, "[m]");
  const std::size_t terms = coefficients.ndim() == 1 ? size(coefficients, 0) : 0;
  check_shape(coefficients, "coefficients", {terms}, "[K]");
  const std::size_t all = factor.ndim() == 2 ? size(factor, 0) : 0;
  check_shape(factor, "factor", {all, terms}, "[D, K]");
  constexpr py::ssize_t kSize = sizeof(double);
  if (terms > 1 && factor.strides(1) != kSize) {
    throw py::value_error("`factor` must have each row in one piece");
  }
  const std::size_t stride = all > 1 ? static_cast<std::size_t>(factor.strides(0) / kSize) : 0;
  check_shape(places, "places", {rows}, "[n]");
  for (std::size_t i = 0; i < rows; ++i) {
    if (places.data()[i] < 0 || static_cast<std::size_t>(places.data()[i]) >= all) {
      throw py::value_error("`places` must hold rows of `factor`, got " +
                            std::to_string(places.data()[i]));
    }
  }
  if (first_column > all || columns > all - first_column) {
    throw py::value_error("`first_column` must leave room for the columns of `values`");
  }
  const InstructionSet instructions = choose_instruction_set(isa);
  const MaskTile tile{values.data(),
                      rows,
                      columns,
                      row_slack.data(),
                      column_slack.data(),
                      cutoffs.data(),
                      factor.data(),
                      coefficients.data(),
                      terms,
                      stride,
                      places.data(),
                      first_column};
  Array<std::uint8_t> bits({rows, (columns + 7) / 8});
  std::uint8_t* result = bits.mutable_data();
  MarkedTile marked{};
  {
    const py::gil_scoped_release release;
    marked = mark_tile(tile, most_left_open, instructions, result);
  }
  if (!marked.done) return py::none();
  return py::make_tuple(bits, marked.near);
}

}  // namespace

void bind_products(py::module_& module) {
  module.def("accumulate_covariance", &accumulate, py::arg("images").noconvert(),
             py::arg("gram").noconvert(), py::arg("total").noconvert(), py::kw_only(),
             py::arg("threads"), py::arg("isa") = "",
             "Add the sums of uint8 images [n, D], centred by 128, to int64 totals.\n\n"
             "gram [D, D] gains sum_i c_i c_i^T in its upper triangle, total [D] gains sum_i c_i.");
  module.def("nearest_candidates", &search_nearest, py::arg("images").noconvert(),
             py::arg("noisy").noconvert(), py::arg("limit").noconvert(), py::kw_only(),
             py::arg("k"), py::arg("threads"), py::arg("isa") = "",
             "Images of [n, D], uint8, that may be among the k nearest to noisy images [B, D].\n\n"
             "Noisy images are in stored units. Returns for each the images, ascending, their\n"
             "|u|^2 - 2 <t, u>, and how far off these may be; beyond limit [B] no image counts.");
  module.def("pair_distances", &measure_pairs, py::arg("images").noconvert(),
             py::arg("noisy").noconvert(), py::arg("alpha").noconvert(),
             py::arg("owner").noconvert(), py::kw_only(), py::arg("threads"),
             "Squared distances |x - alpha v|^2 of images [n, D], uint8, and the noisy images\n"
             "owner [n] of [B, D], float64 [n].");
  module.def(
      "mark_tile", &mark_entries, py::arg("values").noconvert(), py::arg("row_slack").noconvert(),
      py::arg("column_slack").noconvert(), py::arg("cutoffs").noconvert(),
      py::arg("factor").noconvert(), py::arg("coefficients").noconvert(),
      py::arg("places").noconvert(), py::kw_only(), py::arg("first_column"),
      py::arg("most_left_open"), py::arg("isa") = "",
      "Which entries [n, m] of F diag(c) F^T reach the cutoffs [m] of their columns.\n\n"
      "values are entries in single precision, off by row_slack [n] times column_slack [m]\n"
      "at most; those that may be on either side are formed again. Returns bits\n"
      "[n, ceil(m / 8)] and how many entries lie within 1e-6 of their cutoff, or None where\n"
      "more than most_left_open would have to be formed again.");
}

}  // namespace pyflocality
