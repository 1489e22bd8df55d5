// Bit planes of gradient codes and of their sums, a group of 64 elements at a time: to floats, to
// exact sums, and back to planes. Each kernel has a portable, an AVX2 and an AVX-512 version with the
// same bits; the arithmetic is that of gossamer/distribute/codecs/eager.py. The file must be compiled
// with -ffp-contract=off. A group's planes are P + 1 words: magnitude bits 0 .. P - 1, then signs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../intrinsics.h"

namespace gossamer {

#define GOSSAMER_INLINE __attribute__((always_inline)) inline

// ---- decode: full groups, out = (sum over streams of unit * code) * factor ----

template <int P, bool Half>
void mean_portable(const uint64_t* const* streams, const float* units, size_t count, size_t groups,
                   float factor, float* out, bool) {
  for (size_t i = 0; i < groups; i++, out += 64) {
    float total[64] = {};
    for (size_t s = 0; s < count; s++) {
      const uint64_t* word = streams[s] + i * (P + 1);
      for (int e = 0; e < 64; e++) {
        int32_t code = 0;
        for (int b = 0; b < P; b++) code |= int32_t(word[b] >> e & 1) << b;
        if (Half) code = 2 * code + 1;
        code = word[P] >> e & 1 ? -code : code;
        total[e] += float(code) * units[s];
      }
    }
    for (int e = 0; e < 64; e++) out[e] = total[e] * factor;
  }
}

#ifdef GOSSAMER_X86
template <int P, bool Half>
GOSSAMER_AVX2 void mean_avx2(const uint64_t* const* streams, const float* units, size_t count,
                             size_t groups, float factor, float* out, bool stream) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i sign = _mm256_set1_epi32(int(0x80000000u));
  const __m256 times = _mm256_set1_ps(factor);
  for (size_t i = 0; i < groups; i++, out += 64) {
    for (int e = 0; e < 64; e += 8) {
      __m256 total = _mm256_setzero_ps();
      for (size_t s = 0; s < count; s++) {
        const uint64_t* word = streams[s] + i * (P + 1);
        __m256i code = _mm256_setzero_si256();
        for (int b = 0; b < P; b++) {
          const __m256i has =
              _mm256_and_si256(_mm256_set1_epi32(int(word[b] >> e & 0xff)), bit);
          const __m256i set = _mm256_cmpeq_epi32(has, bit);
          code = _mm256_or_si256(code, _mm256_and_si256(set, _mm256_set1_epi32(1 << b)));
        }
        if (Half)
          code = _mm256_add_epi32(_mm256_add_epi32(code, code), _mm256_set1_epi32(1));
        const __m256i has = _mm256_and_si256(_mm256_set1_epi32(int(word[P] >> e & 0xff)), bit);
        const __m256i neg = _mm256_and_si256(_mm256_cmpeq_epi32(has, bit), sign);
        const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(units[s]));
        total = _mm256_add_ps(total, _mm256_xor_ps(value, _mm256_castsi256_ps(neg)));
      }
      total = _mm256_mul_ps(total, times);
      if (stream) _mm256_stream_ps(out + e, total);
      else _mm256_storeu_ps(out + e, total);
    }
  }
}

template <int P, bool Half>
GOSSAMER_AVX512 void mean_avx512(const uint64_t* const* streams, const float* units, size_t count,
                                 size_t groups, float factor, float* out, bool stream) {
  const __m512 times = _mm512_set1_ps(factor);
  const __m512i sign = _mm512_set1_epi32(int(0x80000000u));
  for (size_t i = 0; i < groups; i++, out += 64) {
    __m512 total[4];
    for (int h = 0; h < 4; h++) total[h] = _mm512_setzero_ps();
    for (size_t s = 0; s < count; s++) {
      const uint64_t* word = streams[s] + i * (P + 1);
      const __m512 unit = _mm512_set1_ps(units[s]);
      if (P == 1 && !Half) {  // adding 0 changes nothing, for no total is ever -0
        const uint64_t neg = word[0] & word[1], pos = word[0] & ~word[1];
        for (int h = 0; h < 4; h++) {
          total[h] = _mm512_mask_add_ps(total[h], __mmask16(pos >> 16 * h), total[h], unit);
          total[h] = _mm512_mask_sub_ps(total[h], __mmask16(neg >> 16 * h), total[h], unit);
        }
        continue;
      }
      for (int h = 0; h < 4; h++) {
        __m512i code = _mm512_setzero_si512();
        for (int b = 0; b < P; b++)
          code = _mm512_mask_or_epi32(code, __mmask16(word[b] >> 16 * h), code,
                                      _mm512_set1_epi32(1 << b));
        if (Half)
          code = _mm512_add_epi32(_mm512_add_epi32(code, code), _mm512_set1_epi32(1));
        __m512i value = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(code), unit));
        value = _mm512_mask_xor_epi32(value, __mmask16(word[P] >> 16 * h), value, sign);
        total[h] = _mm512_add_ps(total[h], _mm512_castsi512_ps(value));
      }
    }
    for (int h = 0; h < 4; h++) {
      const __m512 value = _mm512_mul_ps(total[h], times);
      if (stream) _mm512_stream_ps(out + 16 * h, value);
      else _mm512_storeu_ps(out + 16 * h, value);
    }
  }
}
#endif  // GOSSAMER_X86

// ---- exact sums: full groups of planes added to int8, int16 or int32 ----

template <int P, bool Half, typename T>
GOSSAMER_INLINE void add_codes(const uint64_t* word, T* total) {
  T code[64];
  for (int e = 0; e < 64; e++) {
    int32_t value = 0;
    for (int b = 0; b < P; b++) value |= int32_t(word[b] >> e & 1) << b;
    if (Half) value = 2 * value + 1;
    const int32_t neg = -int32_t(word[P] >> e & 1);
    code[e] = T((value ^ neg) - neg);
  }
  for (int e = 0; e < 64; e++) total[e] = T(total[e] + code[e]);
}

template <int P, bool Half, typename T>
void sum_portable(const uint64_t* planes, size_t groups, T* total) {
  for (size_t i = 0; i < groups; i++) add_codes<P, Half>(planes + i * (P + 1), total + 64 * i);
}

#ifdef GOSSAMER_X86
template <int P, bool Half, typename T>
GOSSAMER_AVX2 void sum_avx2(const uint64_t* planes, size_t groups, T* total) {
  for (size_t i = 0; i < groups; i++) add_codes<P, Half>(planes + i * (P + 1), total + 64 * i);
}

template <int P, bool Half, typename T>
GOSSAMER_AVX512 void sum_avx512(const uint64_t* planes, size_t groups, T* total) {
  const __m512i zero = _mm512_setzero_si512();
  for (size_t i = 0; i < groups; i++, planes += P + 1, total += 64) {
    if (sizeof(T) == 1) {
      __m512i code = zero;
      for (int b = 0; b < P; b++)
        code = _mm512_mask_add_epi8(code, planes[b], code, _mm512_set1_epi8(char(1 << b)));
      if (Half) code = _mm512_add_epi8(_mm512_add_epi8(code, code), _mm512_set1_epi8(1));
      code = _mm512_mask_sub_epi8(code, planes[P], zero, code);
      _mm512_storeu_si512(total, _mm512_add_epi8(_mm512_loadu_si512(total), code));
      continue;
    }
    for (int h = 0; h < 2; h++) {
      __m512i code = zero;
      for (int b = 0; b < P; b++)
        code = _mm512_mask_add_epi16(code, __mmask32(planes[b] >> 32 * h), code,
                                     _mm512_set1_epi16(short(1 << b)));
      if (Half) code = _mm512_add_epi16(_mm512_add_epi16(code, code), _mm512_set1_epi16(1));
      code = _mm512_mask_sub_epi16(code, __mmask32(planes[P] >> 32 * h), zero, code);
      T* own = total + 32 * h;
      if (sizeof(T) == 2) {
        _mm512_storeu_si512(own, _mm512_add_epi16(_mm512_loadu_si512(own), code));
      } else {
        const __m512i a = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(code));
        const __m512i b = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(code, 1));
        _mm512_storeu_si512(own, _mm512_add_epi32(_mm512_loadu_si512(own), a));
        _mm512_storeu_si512(own + 16, _mm512_add_epi32(_mm512_loadu_si512(own + 16), b));
      }
    }
  }
}
#endif  // GOSSAMER_X86

// ---- sums to planes: bit b of 64 integers ----

template <typename T>
GOSSAMER_INLINE uint64_t bit_of(const T* v, int b) {
  uint64_t word = 0;
  for (int e = 0; e < 64; e++) word |= uint64_t(uint32_t(int32_t(v[e])) >> b & 1) << e;
  return word;
}

template <typename T>
void split_portable(const T* v, int bits, uint64_t* out) {
  for (int b = 0; b < bits; b++) out[b] = bit_of(v, b);
}

#ifdef GOSSAMER_X86
template <typename T>
GOSSAMER_AVX2 void split_avx2(const T* v, int bits, uint64_t* out) {
  for (int b = 0; b < bits; b++) out[b] = bit_of(v, b);
}

template <typename T>
GOSSAMER_AVX512 void split_avx512(const T* v, int bits, uint64_t* out) {
  constexpr int width = 8 * int(sizeof(T)), registers = int(sizeof(T));
  __m512i x[4];
  for (int r = 0; r < registers; r++) x[r] = _mm512_loadu_si512(v + 64 / registers * r);
  for (int b = 0; b < bits; b++) {
    const int at = b < width ? b : width - 1;  // the sign goes on
    uint64_t word = 0;
    if (sizeof(T) == 1)
      word = _mm512_test_epi8_mask(x[0], _mm512_set1_epi8(char(1 << at)));
    else if (sizeof(T) == 2)
      for (int r = 0; r < registers; r++)
        word |= uint64_t(_mm512_test_epi16_mask(x[r], _mm512_set1_epi16(short(1 << at)))) << 32 * r;
    else
      for (int r = 0; r < registers; r++)
        word |= uint64_t(_mm512_test_epi32_mask(x[r], _mm512_set1_epi32(int(1u << at)))) << 16 * r;
    out[b] = word;
  }
}
#endif  // GOSSAMER_X86

// ---- planes of sums to floats: one group; `top` is what the highest bit counts ----

GOSSAMER_INLINE void join_any(const uint64_t* word, int bits, int32_t top, uint64_t neg,
                              float factor, float* out) {
  int32_t value[64] = {};
  for (int b = 0; b < bits; b++) {
    const int32_t weight = b == bits - 1 ? top : int32_t(1) << b;
    for (int e = 0; e < 64; e++) value[e] += int32_t(word[b] >> e & 1) * weight;
  }
  for (int e = 0; e < 64; e++) {
    const int32_t minus = -int32_t(neg >> e & 1);
    out[e] = float((value[e] ^ minus) - minus) * factor;
  }
}

inline void join_portable(const uint64_t* word, int bits, int32_t top, uint64_t neg, float factor,
                          float* out) {
  join_any(word, bits, top, neg, factor, out);
}

#ifdef GOSSAMER_X86
GOSSAMER_AVX2 inline void join_avx2(const uint64_t* word, int bits, int32_t top, uint64_t neg,
                                    float factor, float* out) {
  join_any(word, bits, top, neg, factor, out);
}

GOSSAMER_AVX512 inline void join_avx512(const uint64_t* word, int bits, int32_t top, uint64_t neg,
                                        float factor, float* out) {
  __m512i value[4];
  for (int h = 0; h < 4; h++) value[h] = _mm512_setzero_si512();
  for (int b = 0; b < bits; b++) {
    const __m512i weight = _mm512_set1_epi32(b == bits - 1 ? top : int32_t(1) << b);
    for (int h = 0; h < 4; h++)
      value[h] = _mm512_mask_add_epi32(value[h], __mmask16(word[b] >> 16 * h), value[h], weight);
  }
  const __m512 times = _mm512_set1_ps(factor);
  for (int h = 0; h < 4; h++) {
    value[h] = _mm512_mask_sub_epi32(value[h], __mmask16(neg >> 16 * h), _mm512_setzero_si512(),
                                     value[h]);
    _mm512_storeu_ps(out + 16 * h, _mm512_mul_ps(_mm512_cvtepi32_ps(value[h]), times));
  }
}
#endif  // GOSSAMER_X86

}  // namespace gossamer
