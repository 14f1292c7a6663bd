// What the posterior scans take and give.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyflocality {

// Training images [count, dim] as bytes or floats, whichever pointer is set.
struct StoredImages {
  const std::uint8_t* bytes;
  const float* floats;
  std::size_t count, dim;
};

// Noisy images and their noise levels, in the units the images are stored in.
//
//   noisy    [batch, dim]: x / alpha for floats, 127.5 (x / alpha + 1) for bytes
//   scale    [batch]: factor of the squared distances in the power of two, positive and finite
struct NoisyBatch {
  const float* noisy;
  const float* scale;
  std::size_t batch;
  // [dim], or null: what the masked scan counts both sides from. See there.
  const float* centre = nullptr;
};

// Results in stored units: [batch, queries] and, for weighted, [batch, queries, values].
struct ScanResult {
  double* minimum;
  double* total;
  double* weighted;
};

}  // namespace pyflocality
