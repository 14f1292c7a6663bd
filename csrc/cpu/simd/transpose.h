// Included by vectors that have AVX2.

constexpr std::size_t kTurned = 8;

// Turns 8 rows of 8 numbers, `stride` apart, into columns: to[k * step + row] is from[row][k].
inline void transpose(const float* from, std::size_t stride, float* to, std::size_t step) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (std::size_t k = 0; k < 8; k += 2) {
    const __m256 a = _mm256_loadu_ps(from + k * stride);
    const __m256 b = _mm256_loadu_ps(from + (k + 1) * stride);
    pairs[k] = _mm256_unpacklo_ps(a, b);
    pairs[k + 1] = _mm256_unpackhi_ps(a, b);
  }
  // A half b of number 4 g + j is column 4 b + j of rows 4 g to 4 g + 3.
#pragma GCC unroll 2
  for (std::size_t g = 0; g < 8; g += 4) {
#pragma GCC unroll 2
    for (std::size_t j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(pairs[g + j]), b = _mm256_castps_pd(pairs[g + 2 + j]);
      fours[g + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[g + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (std::size_t j = 0; j < 4; ++j) {
    const __m256 first = fours[j], second = fours[4 + j];
    _mm256_storeu_ps(to + j * step, _mm256_permute2f128_ps(first, second, 0x20));
    _mm256_storeu_ps(to + (4 + j) * step, _mm256_permute2f128_ps(first, second, 0x31));
  }
}
