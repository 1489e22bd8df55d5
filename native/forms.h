// The byte forms of gradient codes: signs without gaps, base 3; and statistics of a gradient.
// Layouts are those of gossamer/distribute/wire/planes.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dispatch.h"
#ifdef GOSSAMER_X86
// GCC takes the undefined operands of its own AVX-512 header for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace gossamer {

inline uint64_t load_word(const uint8_t* p) {
  uint64_t w;
  std::memcpy(&w, p, 8);
  return w;
}

// Bits one after another in little-endian words.
struct BitWriter {
  uint8_t* out;
  uint64_t held = 0;
  unsigned fill = 0;

  // Stores the unfinished word, too: room for a word a call is needed.
  __attribute__((always_inline)) inline void put(uint64_t bits, unsigned count) {
    held |= bits << fill;
    std::memcpy(out, &held, 8);
    const uint64_t rest = bits >> 1 >> (63 - fill);
    const unsigned total = fill + count;
    out += total >> 6 << 3;
    held = total >> 6 ? rest : held;
    fill = total & 63;
  }

  uint8_t* finish() {
    if (fill) {
      std::memcpy(out, &held, 8);
      out += 8;
    }
    return out;
  }
};

// The 64 bits from bit `at` on; what lies past the last word is repeated bits, not to be used.
__attribute__((always_inline)) inline uint64_t bits_at(const uint8_t* data, size_t words,
                                                       uint64_t at) {
  if (words == 0) return 0;
  const size_t last = words - 1, i = size_t(at >> 6), a = i < last ? i : last;
  const size_t b = a < last ? a + 1 : last;
  const unsigned shift = unsigned(at & 63);
  return load_word(data + 8 * a) >> shift | load_word(data + 8 * b) << 1 << (63 - shift);
}

__attribute__((always_inline)) inline uint64_t any_of(const uint8_t* words, int planes) {
  uint64_t where = load_word(words);
  for (int b = 1; b < planes; b++) where |= load_word(words + 8 * b);
  return where;
}

// ---- sparse: planes to magnitudes and gapless signs, and back ----

inline void squeeze_portable(const uint64_t* planes, size_t groups, int p, uint8_t* out,
                             BitWriter& signs) {
  for (size_t i = 0; i < groups; i++, planes += p + 1, out += 8 * p) {
    std::memcpy(out, planes, 8 * size_t(p));
    uint64_t bits = 0, where = any_of(out, p);
    unsigned k = 0;
    for (; where; where &= where - 1) bits |= (planes[p] >> __builtin_ctzll(where) & 1) << k++;
    signs.put(bits, k);
  }
}

inline uint64_t spread_portable(const uint8_t* in, size_t groups, int p, const uint8_t* signs,
                                size_t words, uint64_t at, uint64_t* planes) {
  for (size_t i = 0; i < groups; i++, planes += p + 1, in += 8 * p) {
    std::memcpy(planes, in, 8 * size_t(p));
    uint64_t neg = 0, bits = bits_at(signs, words, at);
    for (uint64_t where = any_of(in, p); where; where &= where - 1, bits >>= 1, at++)
      neg |= (bits & 1) << __builtin_ctzll(where);
    planes[p] = neg;
  }
  return at;
}

inline uint64_t count_portable(const uint8_t* in, size_t groups, int p) {
  uint64_t count = 0;
  for (size_t i = 0; i < groups; i++, in += 8 * p)
    count += uint64_t(__builtin_popcountll(any_of(in, p)));
  return count;
}

#ifdef GOSSAMER_X86
GOSSAMER_AVX2 __attribute__((always_inline)) inline void squeeze_any(
    const uint64_t* planes, size_t groups, int p, uint8_t* out, BitWriter& signs) {
  BitWriter own = signs;  // in registers
  for (size_t i = 0; i < groups; i++, planes += p + 1, out += 8 * p) {
    uint64_t where = 0;
    for (int b = 0; b < p; b++) {
      where |= planes[b];
      std::memcpy(out + 8 * b, planes + b, 8);
    }
    own.put(_pext_u64(planes[p], where), unsigned(__builtin_popcountll(where)));
  }
  signs = own;
}

GOSSAMER_AVX2 inline void squeeze_bmi2(const uint64_t* planes, size_t groups, int p, uint8_t* out,
                                       BitWriter& signs) {
  if (p == 1) squeeze_any(planes, groups, 1, out, signs);
  else squeeze_any(planes, groups, p, out, signs);
}

GOSSAMER_AVX2 __attribute__((always_inline)) inline uint64_t spread_any(
    const uint8_t* in, size_t groups, int p, const uint8_t* signs, size_t words, uint64_t at,
    uint64_t* planes) {
  for (size_t i = 0; i < groups; i++, planes += p + 1, in += 8 * p) {
    uint64_t where = 0;
    for (int b = 0; b < p; b++) {
      planes[b] = load_word(in + 8 * b);
      where |= planes[b];
    }
    const uint64_t count = uint64_t(__builtin_popcountll(where));
    // mostly one unaligned load has all
    const uint64_t bits = count <= 57 && (at >> 3) + 8 <= 8 * words
                              ? load_word(signs + (at >> 3)) >> (at & 7)
                              : bits_at(signs, words, at);
    planes[p] = _pdep_u64(bits, where);
    at += count;
  }
  return at;
}

GOSSAMER_AVX2 inline uint64_t spread_bmi2(const uint8_t* in, size_t groups, int p,
                                          const uint8_t* signs, size_t words, uint64_t at,
                                          uint64_t* planes) {
  return p == 1 ? spread_any(in, groups, 1, signs, words, at, planes)
                : spread_any(in, groups, p, signs, words, at, planes);
}

GOSSAMER_AVX2 inline uint64_t count_bmi2(const uint8_t* in, size_t groups, int p) {
  uint64_t count = 0;
  if (p == 1)
    for (size_t i = 0; i < groups; i++) count += uint64_t(__builtin_popcountll(load_word(in + 8 * i)));
  else
    for (size_t i = 0; i < groups; i++)
      count += uint64_t(__builtin_popcountll(any_of(in + 8 * size_t(p) * i, p)));
  return count;
}
#endif

inline void squeeze(Isa isa, const uint64_t* planes, size_t groups, int p, uint8_t* out,
                    BitWriter& signs) {
#ifdef GOSSAMER_X86
  if (isa >= kAvx2) return squeeze_bmi2(planes, groups, p, out, signs);
#endif
  (void)isa;
  squeeze_portable(planes, groups, p, out, signs);
}

inline uint64_t spread(Isa isa, const uint8_t* in, size_t groups, int p, const uint8_t* signs,
                       size_t words, uint64_t at, uint64_t* planes) {
#ifdef GOSSAMER_X86
  if (isa >= kAvx2) return spread_bmi2(in, groups, p, signs, words, at, planes);
#endif
  (void)isa;
  return spread_portable(in, groups, p, signs, words, at, planes);
}

inline uint64_t count_nonzero(Isa isa, const uint8_t* in, size_t groups, int p) {
#ifdef GOSSAMER_X86
  if (isa >= kAvx2) return count_bmi2(in, groups, p);
#endif
  (void)isa;
  return count_portable(in, groups, p);
}

// ---- base 3: blocks of 5 groups in 64 bytes; words are (non-zero, negative) ----

inline void to_base3_portable(const uint64_t* planes, uint8_t* out) {
  for (int j = 0; j < 64; j++) {
    int value = 0;
    for (int p = 4; p >= 0; p--) {
      const int some = int(planes[2 * p] >> j & 1), neg = int(planes[2 * p + 1] >> j & 1);
      value = 3 * value + 1 + some - 2 * neg;
    }
    out[j] = uint8_t(value);
  }
}

inline void from_base3_portable(const uint8_t* in, uint64_t* planes) {
  std::memset(planes, 0, 80);
  for (int j = 0; j < 64; j++) {
    unsigned value = in[j];
    for (int p = 0; p < 5; p++, value /= 3) {
      planes[2 * p] |= uint64_t(value % 3 != 1) << j;
      planes[2 * p + 1] |= uint64_t(value % 3 == 0) << j;
    }
  }
}

#ifdef GOSSAMER_X86
GOSSAMER_AVX512 inline void to_base3_avx512(const uint64_t* planes, uint8_t* out) {
  const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);
  __m512i value = _mm512_setzero_si512();
  for (int p = 4; p >= 0; p--) {
    const uint64_t some = planes[2 * p], neg = planes[2 * p + 1];
    value = _mm512_add_epi8(_mm512_add_epi8(value, value), value);
    // digits 0, 1, 2 for -1, 0, 1
    value = _mm512_mask_add_epi8(value, ~some, value, one);
    value = _mm512_mask_add_epi8(value, some & ~neg, value, two);
  }
  _mm512_storeu_si512(out, value);
}

GOSSAMER_AVX512 inline void from_base3_avx512(const uint8_t* in, uint64_t* planes) {
  const __m512i all = _mm512_loadu_si512(in);
  const __m512i third = _mm512_set1_epi16(171), one = _mm512_set1_epi16(1);
  __m512i value[2] = {_mm512_cvtepu8_epi16(_mm512_castsi512_si256(all)),
                      _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(all, 1))};
  for (int p = 0; p < 5; p++) {
    uint64_t some = 0, neg = 0;
    for (int h = 0; h < 2; h++) {
      // x / 3 = 171 x >> 9 for x < 256
      const __m512i q = _mm512_srli_epi16(_mm512_mullo_epi16(value[h], third), 9);
      const __m512i digit =
          _mm512_sub_epi16(value[h], _mm512_add_epi16(q, _mm512_add_epi16(q, q)));
      some |= uint64_t(_mm512_cmpneq_epi16_mask(digit, one)) << 32 * h;
      neg |= uint64_t(_mm512_testn_epi16_mask(digit, digit)) << 32 * h;
      value[h] = q;
    }
    planes[2 * p] = some;
    planes[2 * p + 1] = neg;
  }
}
#endif

inline void to_base3(Isa isa, const uint64_t* planes, uint8_t* out) {
#ifdef GOSSAMER_X86
  if (isa == kAvx512) return to_base3_avx512(planes, out);
#endif
  (void)isa;
  to_base3_portable(planes, out);
}

inline void from_base3(Isa isa, const uint8_t* in, uint64_t* planes) {
#ifdef GOSSAMER_X86
  if (isa == kAvx512) return from_base3_avx512(in, planes);
#endif
  (void)isa;
  from_base3_portable(in, planes);
}

// The last block, of `count` < 320 elements: byte j holds elements j + stride p.
inline void to_base3_tail(const uint64_t* planes, size_t count, uint8_t* out) {
  const size_t stride = (count + 4) / 5;
  for (size_t j = 0; j < stride; j++) {
    int value = 0;
    for (size_t p = 5; p-- > 0;) {
      const size_t e = j + stride * p;
      int digit = 1;
      if (e < count)
        digit += int(planes[e / 64 * 2] >> e % 64 & 1) - 2 * int(planes[e / 64 * 2 + 1] >> e % 64 & 1);
      value = 3 * value + digit;
    }
    out[j] = uint8_t(value);
  }
}

// False where a code past the end is not 0.
inline bool from_base3_tail(const uint8_t* in, size_t count, uint64_t* planes) {
  const size_t stride = (count + 4) / 5;
  for (size_t w = 0; w < (count + 63) / 64 * 2; w++) planes[w] = 0;
  bool fine = true;
  for (size_t j = 0; j < stride; j++) {
    unsigned value = in[j];
    for (size_t p = 0; p < 5; p++, value /= 3) {
      const size_t e = j + stride * p;
      if (e >= count) {
        fine = fine && value % 3 == 1;
        continue;
      }
      planes[e / 64 * 2] |= uint64_t(value % 3 != 1) << e % 64;
      planes[e / 64 * 2 + 1] |= uint64_t(value % 3 == 0) << e % 64;
    }
  }
  return fine;
}

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
