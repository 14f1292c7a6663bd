// Online softmax in units of distance, for every native kernel. Compiles for the host and, under
// NVCC or NVRTC, for the device.
//
// With distances e_i and weights 2^(-f (e_i - m)), m the smallest distance seen, a state keeps m
// and sums of weights times terms. The difference e_i - m is taken before the factor f, so the
// rounding of large logits at small noise cancels, and no noise (f the largest factor) gives the
// mean of the nearest images without any special case. Factors are positive and finite, 2^-126 to
// 2^120: an infinite distance then always weighs nothing, and equal distances weigh one.
#pragma once

#include "pyflocality/pixel.h"

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

namespace pyflocality {

PYFLOCALITY_HOST_DEVICE inline float infinity() {
#if defined(__CUDA_ARCH__)
  return __int_as_float(0x7f800000);
#else
  return HUGE_VALF;
#endif
}

PYFLOCALITY_HOST_DEVICE inline float smaller(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fminf(a, b);
#else
  return std::fmin(a, b);
#endif
}

// 2^x. The device's own instruction flushes results below 2^-126 to zero, which beside the weight
// 1 of the nearest image are nothing.
PYFLOCALITY_HOST_DEVICE inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// Weight of a distance beside another one. A state without images has an infinite minimum: its
// sums weigh nothing beside those of a finite one.
PYFLOCALITY_HOST_DEVICE inline float relative_weight(float distance, float minimum, float factor) {
  return power_of_two((minimum - distance) * factor);
}

template <int kSums>
struct OnlineSoftmax {
  float minimum;
  float sums[kSums];

  PYFLOCALITY_HOST_DEVICE void init() {
    minimum = infinity();
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
  }

  // Before weights of distances at or above `nearest` are added. The minimum rarely falls, so the
  // sums are left alone where it does not.
  PYFLOCALITY_HOST_DEVICE void lower(float nearest, float factor) {
    if (nearest < minimum) {
      const float decay = relative_weight(minimum, nearest, factor);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] *= decay;
      minimum = nearest;
    }
  }

  PYFLOCALITY_HOST_DEVICE float weight(float distance, float factor) const {
    return relative_weight(distance, minimum, factor);
  }
};

}  // namespace pyflocality
