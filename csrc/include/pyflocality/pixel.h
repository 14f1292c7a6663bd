// What a stored byte means, for every native kernel. Compiles for the host and, under NVCC or
// NVRTC, for the device.
#pragma once

#if defined(__CUDACC__)
#define PYFLOCALITY_HOST_DEVICE __host__ __device__
#else
#define PYFLOCALITY_HOST_DEVICE
#endif

namespace pyflocality {

// The byte that centring takes to zero: u in [0, 255] becomes c = u - 128 in [-128, 127].
constexpr int kByteCentre = 128;

// Number of images whose products sum to less than 2^31 whatever the bytes: c c' <= 2^14 for two
// centred bytes, |u c'| <= 255 * 128 where one of the two stays as stored.
constexpr int kMaxImagesCentredCentred = 131071;
constexpr int kMaxImagesStoredCentred = 65793;

PYFLOCALITY_HOST_DEVICE constexpr int centred_byte(unsigned char u) {
  return static_cast<int>(u) - kByteCentre;
}

// Type of a stored value, and the range of its values.
template <bool kBytes>
struct StoredAs;
template <>
struct StoredAs<true> {
  using Type = unsigned char;
  static constexpr float kLowest = 0.0f, kHighest = 255.0f;
};
template <>
struct StoredAs<false> {
  using Type = float;
  static constexpr float kLowest = -1.0f, kHighest = 1.0f;
};

}  // namespace pyflocality
