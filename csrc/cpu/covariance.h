#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu_features.h"

namespace pyflocality {

// Exact sums behind the covariance of 8-bit images. With c = u - 128:
//
//   gram[a * dim + b] += sum_i c[i, a] c[i, b]   for a <= b (the rest of gram is not touched)
//   total[a]          += sum_i c[i, a]
//
// images is [count, dim], row-major. All sums are integers, so the result does not depend on the
// number of threads, the instruction set or how the images are split into calls.
//
// checkpoint is called on the calling thread between blocks of images and may throw; gram and
// total then hold the images of the finished blocks only.
void accumulate_covariance(const std::uint8_t* images, std::size_t count, std::size_t dim,
                           std::int64_t* gram, std::int64_t* total, std::size_t threads,
                           InstructionSet isa, const std::function<void()>& checkpoint);

}  // namespace pyflocality
