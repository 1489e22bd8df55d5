// The byte forms of gradient codes: signs without gaps, base 3.
// Layouts are those of gossamer/distribute/wire/planes.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../intrinsics.h"

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

}  // namespace gossamer
