// Vectors of 8 floats in plain C++. Included by for_each_isa.h inside a namespace.

constexpr int kLanes = 8;
constexpr int kTileVectors = 1;

struct Vec {
  float v[kLanes];
};

#define PYFLOCALITY_LANES(expression)                          \
  Vec result;                                                  \
  for (int k = 0; k < kLanes; ++k) result.v[k] = (expression); \
  return result

inline Vec broadcast(float value) { PYFLOCALITY_LANES(value); }
inline Vec zero() { return broadcast(0.0f); }
inline Vec load(const float* p) { PYFLOCALITY_LANES(p[k]); }
inline Vec load(const std::uint8_t* p) { PYFLOCALITY_LANES(static_cast<float>(p[k])); }
inline void store(float* p, Vec a) { std::copy_n(a.v, kLanes, p); }
inline Vec add(Vec a, Vec b) { PYFLOCALITY_LANES(a.v[k] + b.v[k]); }
inline Vec sub(Vec a, Vec b) { PYFLOCALITY_LANES(a.v[k] - b.v[k]); }
inline Vec mul(Vec a, Vec b) { PYFLOCALITY_LANES(a.v[k] * b.v[k]); }
// a * b + c and c - a * b
inline Vec multiply_add(Vec a, Vec b, Vec c) { PYFLOCALITY_LANES(a.v[k] * b.v[k] + c.v[k]); }
inline Vec multiply_sub(Vec a, Vec b, Vec c) { PYFLOCALITY_LANES(c.v[k] - a.v[k] * b.v[k]); }
inline Vec min(Vec a, Vec b) { PYFLOCALITY_LANES(b.v[k] < a.v[k] ? b.v[k] : a.v[k]); }
inline Vec max(Vec a, Vec b) { PYFLOCALITY_LANES(a.v[k] < b.v[k] ? b.v[k] : a.v[k]); }
inline bool any_less(Vec a, Vec b) {
  bool any = false;
  for (int k = 0; k < kLanes; ++k) any |= a.v[k] < b.v[k];
  return any;
}
inline bool any_at_most(Vec a, Vec b) {
  bool any = false;
  for (int k = 0; k < kLanes; ++k) any |= a.v[k] <= b.v[k];
  return any;
}
inline float smallest(Vec a) { return *std::min_element(a.v, a.v + kLanes); }

using pyflocality::exp2_of_negative;
inline Vec exp2_of_negative(Vec z) { PYFLOCALITY_LANES(exp2_of_negative(z.v[k])); }

constexpr std::size_t kTurned = 8;

// Turns 8 rows of 8 numbers, `stride` apart, into columns: to[k * step + row] is from[row][k].
inline void transpose(const float* from, std::size_t stride, float* to, std::size_t step) {
  for (std::size_t row = 0; row < kTurned; ++row) {
    for (std::size_t k = 0; k < kTurned; ++k) to[k * step + row] = from[row * stride + k];
  }
}

#undef PYFLOCALITY_LANES
