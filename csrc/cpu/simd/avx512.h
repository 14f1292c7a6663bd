// Vectors of 16 floats. Included by for_each_isa.h inside a namespace.

constexpr int kLanes = 16;
// Image vectors and noisy images a register tile holds: 3 x 8 sums, 3 values and 2 temporaries.
constexpr int kTileVectors = 3;

struct Vec {
  __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const std::uint8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
// a * b + c and c - a * b
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec multiply_sub(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline bool any_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }
inline bool any_at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ) != 0; }
inline float smallest(Vec a) { return _mm512_reduce_min_ps(a.v); }

// As the scalar function of this name, lane by lane.
using pyflocality::exp2_of_negative;
inline Vec exp2_of_negative(Vec z) {
  const __m512 whole = _mm512_roundscale_ps(z.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(z.v, whole);
  __m512 p = _mm512_set1_ps(kExp2Coefficients[6]);
  for (int k = 5; k >= 0; --k) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Coefficients[k]));
  const __mmask16 seen = _mm512_cmp_ps_mask(z.v, _mm512_set1_ps(kExp2Smallest), _CMP_GE_OQ);
  return {_mm512_maskz_scalef_ps(seen, p, whole)};
}

#include "simd/transpose.h"
