#pragma once

#include <cmath>
#include <cstddef>

namespace pyflocality {

// 2^f on [-1/2, 1/2], the polynomial of least largest relative error (1.9e-9) of degree 6.
constexpr float kExp2Coefficients[7] = {1.00000000055f,    0.693147205737f,   0.240226468906f,
                                        0.05550328777f,    0.00961848895652f, 0.00133999312095f,
                                        0.000153458121587f};
// Smaller powers of two are not normal floats and count as 0.
constexpr float kExp2Smallest = -126.0f;

// Powers of two below -this cannot change a posterior over `count` images: all of them together
// weigh less than the last bit of the nearest image's weight.
inline float negligible_power(std::size_t count) {
  return 26.0f + std::log2(static_cast<float>(count));
}

// 2^z for z <= 0, 0 below -126: the nearest whole power times the polynomial.
inline float exp2_of_negative(float z) {
  if (!(z >= kExp2Smallest)) return 0.0f;
  const float whole = std::nearbyint(z), f = z - whole;
  float p = kExp2Coefficients[6];
  for (int k = 5; k >= 0; --k) p = p * f + kExp2Coefficients[k];
  return std::ldexp(p, static_cast<int>(whole));
}

}  // namespace pyflocality
