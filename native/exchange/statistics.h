// Statistics of a gradient, chunk by chunk: the same bits from every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../intrinsics.h"

namespace gossamer {

// ---- statistics of one chunk: 16 lanes in order, folded in halves ----

constexpr size_t kStatistics = 4096;

struct Statistics {
  double sum, squares;
  uint32_t largest;  // bits of the largest magnitude
};

inline double fold_lanes(double* lane) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

// `n` elements from where 16 lanes stand; a remainder of n / 16 counts as followed by zeros.
template <bool Absolute>
void add_lanes(const float* g, size_t n, double* sum, double* squares, uint32_t& largest) {
  for (size_t e = 0; e < n; e++) {
    uint32_t bits;
    std::memcpy(&bits, g + e, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
    double v = double(g[e]);
    if (Absolute) v = v < 0 ? -v : v;
    sum[e & 15] += v;
    squares[e & 15] += v * v;
  }
}

template <bool Absolute>
Statistics statistics_portable(const float* g, size_t n) {
  double sum[16] = {}, squares[16] = {};
  uint32_t largest = 0;
  add_lanes<Absolute>(g, n, sum, squares, largest);
  return {fold_lanes(sum), fold_lanes(squares), largest};
}

#ifdef GOSSAMER_X86
template <bool Absolute>
GOSSAMER_AVX2 Statistics statistics_avx2(const float* g, size_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256d sum[4], squares[4];
  for (int k = 0; k < 4; k++) sum[k] = squares[k] = _mm256_setzero_pd();
  __m256i most = _mm256_setzero_si256();
  size_t e = 0;
  for (; e + 16 <= n; e += 16)
    for (int k = 0; k < 2; k++) {
      __m256i raw = _mm256_loadu_si256((const __m256i*)(g + e + 8 * k));
      const __m256i bits = _mm256_and_si256(raw, magnitude);
      most = _mm256_max_epu32(most, bits);
      if (Absolute) raw = bits;
      const __m256 x = _mm256_castsi256_ps(raw);
      const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
      const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      sum[2 * k] = _mm256_add_pd(sum[2 * k], a);
      sum[2 * k + 1] = _mm256_add_pd(sum[2 * k + 1], b);
      // a * a is exact in double precision: fused or not, one rounding
      squares[2 * k] = _mm256_fmadd_pd(a, a, squares[2 * k]);
      squares[2 * k + 1] = _mm256_fmadd_pd(b, b, squares[2 * k + 1]);
    }
  double s[16], q[16];
  uint32_t m[8], largest = 0;
  for (int k = 0; k < 4; k++) {
    _mm256_storeu_pd(s + 4 * k, sum[k]);
    _mm256_storeu_pd(q + 4 * k, squares[k]);
  }
  _mm256_storeu_si256((__m256i*)m, most);
  for (int k = 0; k < 8; k++) largest = m[k] > largest ? m[k] : largest;
  add_lanes<Absolute>(g + e, n - e, s, q, largest);
  return {fold_lanes(s), fold_lanes(q), largest};
}

template <bool Absolute>
GOSSAMER_AVX512 Statistics statistics_avx512(const float* g, size_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512d s0 = _mm512_setzero_pd(), s1 = s0, q0 = s0, q1 = s0;
  __m512i most = _mm512_setzero_si512();
  size_t e = 0;
  for (; e + 16 <= n; e += 16) {
    _mm_prefetch((const char*)(g + e) + 8192, _MM_HINT_T0);
    __m512i raw = _mm512_loadu_si512(g + e);
    const __m512i bits = _mm512_and_si512(raw, magnitude);
    most = _mm512_max_epu32(most, bits);
    if (Absolute) raw = bits;
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_castsi512_ps(raw)));
    const __m512d b =
        _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(raw, 1)));
    s0 = _mm512_add_pd(s0, a);
    s1 = _mm512_add_pd(s1, b);
    // a * a is exact in double precision: fused or not, one rounding
    q0 = _mm512_fmadd_pd(a, a, q0);
    q1 = _mm512_fmadd_pd(b, b, q1);
  }
  double s[16], q[16];
  _mm512_storeu_pd(s, s0);
  _mm512_storeu_pd(s + 8, s1);
  _mm512_storeu_pd(q, q0);
  _mm512_storeu_pd(q + 8, q1);
  uint32_t largest = _mm512_reduce_max_epu32(most);
  add_lanes<Absolute>(g + e, n - e, s, q, largest);
  return {fold_lanes(s), fold_lanes(q), largest};
}
#endif

template <bool Absolute>
Statistics statistics_of(Isa isa, const float* g, size_t n) {
#ifdef GOSSAMER_X86
  if (isa == kAvx512) return statistics_avx512<Absolute>(g, n);
  if (isa == kAvx2) return statistics_avx2<Absolute>(g, n);
#endif
  (void)isa;
  return statistics_portable<Absolute>(g, n);
}

}  // namespace gossamer
