// Gradients to codes: floats to bit planes, a group of 64 elements at a time. As in planes.h, each
// kernel has three versions with the same bits, compiled with -ffp-contract=off.
#pragma once
#include "planes.h"

namespace gossamer {

struct Coding {
  float inv, top;
  uint32_t k0, k1, k2, k3, shift;
};

inline uint32_t float_bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}

GOSSAMER_INLINE uint32_t hash(uint32_t c, uint32_t a, uint32_t b) {
  uint32_t x = c + a;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x ^= b;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// The 24-bit word that decides ties of an element.
GOSSAMER_INLINE float tie_word(uint32_t e, const Coding& c) {
  return float(hash(e, c.k2, c.k3) >> 8);
}

// ---- encode: full groups, `first` is the number of the first one ----

template <int P, bool Half>
void encode_portable(const float* g, size_t groups, uint32_t first, const Coding& c,
                     uint64_t* out) {
  for (size_t i = 0; i < groups; i++, g += 64, out += P + 1) {
    uint64_t word[P + 1] = {};
    const uint32_t group = first + uint32_t(i);
    for (uint32_t lane = 0; lane < 32; lane++) {
      // lanes 0..15 of the two halves of the group
      uint32_t x = hash(32 * group + lane, c.k0, c.k1);
      for (int h = 0; h < 2; h++, x >>= 16) {
        const uint32_t e = (lane & 16) * 2 + 16 * h + (lane & 15);
        float v = std::fabs(g[e]) * c.inv;
        v = v < c.top ? v : c.top;
        if (Half) v += 0.5f;
        uint32_t q = uint32_t(v);
        const float d = (v - float(q)) * 65536.0f - float((x + c.shift) & 0xffff);
        q += d >= 1 || (d > 0 && tie_word(64 * group + e, c) < d * 16777216.0f);
        uint64_t neg = float_bits(g[e]) >> 31;
        if (Half) {
          neg ^= q == 0;
          q = q ? q - 1 : 0;
        } else {
          neg &= q != 0;
        }
        for (int b = 0; b < P; b++) word[b] |= uint64_t(q >> b & 1) << e;
        word[P] |= neg << e;
      }
    }
    std::memcpy(out, word, sizeof word);
  }
}

inline void signs_portable(const float* g, size_t groups, uint64_t* out) {
  for (size_t i = 0; i < groups; i++, g += 64) {
    uint64_t word = 0;
    for (int e = 0; e < 64; e++) word |= uint64_t(float_bits(g[e]) >> 31) << e;
    out[i] = word;
  }
}

#ifdef GOSSAMER_X86

// `up` of lanes in `tied`: rare, so element by element.
GOSSAMER_INLINE uint32_t break_ties(uint32_t tied, const float* d, uint32_t e, const Coding& c) {
  uint32_t up = 0;
  for (; tied; tied &= tied - 1) {
    const int lane = __builtin_ctz(tied);
    up |= uint32_t(tie_word(e + uint32_t(lane), c) < d[lane] * 16777216.0f) << lane;
  }
  return up;
}

GOSSAMER_AVX2 GOSSAMER_INLINE __m256i hash_avx2(__m256i c, __m256i a, __m256i b) {
  __m256i x = _mm256_add_epi32(c, a);
  x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  x = _mm256_mullo_epi32(x, _mm256_set1_epi32(0x7feb352d));
  x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
  x = _mm256_xor_si256(x, b);
  x = _mm256_mullo_epi32(x, _mm256_set1_epi32(int(0x846ca68bu)));
  return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}

template <int P, bool Half>
GOSSAMER_AVX2 void encode_avx2(const float* g, size_t groups, uint32_t first, const Coding& c,
                               uint64_t* out) {
  const __m256i k0 = _mm256_set1_epi32(int(c.k0)), k1 = _mm256_set1_epi32(int(c.k1));
  const __m256i low = _mm256_set1_epi32(0xffff), shift = _mm256_set1_epi32(int(c.shift));
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), zero = _mm256_setzero_si256();
  const __m256 inv = _mm256_set1_ps(c.inv), top = _mm256_set1_ps(c.top);
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 one = _mm256_set1_ps(1.0f);
  for (size_t i = 0; i < groups; i++, g += 64, out += P + 1) {
    uint64_t word[P + 1] = {};
    const uint32_t group = first + uint32_t(i);
    for (int part = 0; part < 4; part++) {
      // 8 counters give the words of 8 elements and of those 16 on
      const __m256i at = _mm256_add_epi32(lanes, _mm256_set1_epi32(int(32 * group + 8 * part)));
      const __m256i x = hash_avx2(at, k0, k1);
      for (int h = 0; h < 2; h++) {
        const int e = (part >> 1) * 32 + 16 * h + 8 * (part & 1);
        const __m256 a = _mm256_loadu_ps(g + e);
        __m256i w = h ? _mm256_srli_epi32(x, 16) : x;
        w = _mm256_and_si256(_mm256_add_epi32(w, shift), low);
        __m256 v = _mm256_min_ps(_mm256_mul_ps(_mm256_and_ps(a, magnitude), inv), top);
        if (Half) v = _mm256_add_ps(v, _mm256_set1_ps(0.5f));
        __m256i q = _mm256_cvttps_epi32(v);
        const __m256 f = _mm256_sub_ps(v, _mm256_cvtepi32_ps(q));
        // 65536 f is exact: fused or not, one rounding
        const __m256 d = _mm256_fmsub_ps(f, _mm256_set1_ps(65536.0f), _mm256_cvtepi32_ps(w));
        __m256 up = _mm256_cmp_ps(d, one, _CMP_GE_OQ);
        const __m256 tie = _mm256_andnot_ps(up, _mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_GT_OQ));
        if (const int tied = _mm256_movemask_ps(tie)) {
          float own[8];
          _mm256_storeu_ps(own, d);
          const uint32_t won = break_ties(uint32_t(tied), own, 64 * group + uint32_t(e), c);
          const __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), lanes);
          const __m256i has = _mm256_and_si256(_mm256_set1_epi32(int(won)), bit);
          up = _mm256_or_ps(up, _mm256_castsi256_ps(_mm256_cmpeq_epi32(has, bit)));
        }
        q = _mm256_sub_epi32(q, _mm256_castps_si256(up));
        const uint32_t none = uint32_t(
            _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(q, zero))));
        uint32_t neg = uint32_t(_mm256_movemask_ps(a));
        if (Half) {
          neg ^= none;
          q = _mm256_max_epi32(_mm256_sub_epi32(q, _mm256_set1_epi32(1)), zero);
        } else {
          neg &= ~none;
        }
        for (int b = 0; b < P; b++)
          word[b] |= uint64_t(uint32_t(_mm256_movemask_ps(
                         _mm256_castsi256_ps(_mm256_slli_epi32(q, 31 - b)))))
                     << e;
        word[P] |= uint64_t(neg) << e;
      }
    }
    std::memcpy(out, word, sizeof word);
  }
}

GOSSAMER_AVX2 inline void signs_avx2(const float* g, size_t groups, uint64_t* out) {
  for (size_t i = 0; i < groups; i++, g += 64) {
    uint64_t word = 0;
    for (int e = 0; e < 64; e += 8)
      word |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_loadu_ps(g + e)))) << e;
    out[i] = word;
  }
}

// Before the last x ^= x >> 16.
GOSSAMER_AVX512 GOSSAMER_INLINE __m512i hash_avx512(__m512i x, __m512i b) {
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
  x = _mm512_ternarylogic_epi32(x, _mm512_srli_epi32(x, 15), b, 0x96);
  return _mm512_mullo_epi32(x, _mm512_set1_epi32(int(0x846ca68bu)));
}

// The two 16-bit words of 16 hashes: (low, high).
GOSSAMER_AVX512 GOSSAMER_INLINE void words_avx512(__m512i x, uint32_t shift, __m512i* w) {
  const __m512i low = _mm512_set1_epi32(0xffff), high = _mm512_srli_epi32(x, 16);
  if (shift) {
    x = _mm512_add_epi16(_mm512_xor_si512(x, high), _mm512_set1_epi16(short(shift)));
    w[0] = _mm512_and_si512(x, low);
    w[1] = _mm512_srli_epi32(x, 16);
  } else {
    w[0] = _mm512_ternarylogic_epi32(x, high, low, 0x28);  // (x ^ high) & low
    w[1] = high;
  }
}

GOSSAMER_AVX512 GOSSAMER_INLINE uint64_t join_masks(const __mmask16* m) {
  return _mm512_kunpackd(_mm512_kunpackw(m[3], m[2]), _mm512_kunpackw(m[1], m[0]));
}

// 65536 f is exact, so that the fused difference is rounded once as the two operations are.
// With one plane f is v itself: v >= 1 gives d >= 1, and nothing needs to be truncated. A group
// where some 0 <= d < 1, about one in a thousand, is encoded again by the portable version.
template <int P, bool Half>
GOSSAMER_AVX512 void encode_avx512(const float* g, size_t groups, uint32_t first, const Coding& c,
                                   uint64_t* out) {
  const __m512i k1 = _mm512_set1_epi32(int(c.k1)), unit = _mm512_set1_epi32(1);
  const __m512 inv = _mm512_set1_ps(c.inv), top = _mm512_set1_ps(c.top);
  const __m512 one = _mm512_set1_ps(1.0f), steps = _mm512_set1_ps(65536.0f);
  const uint32_t shift = c.shift;
  __m512i at = _mm512_add_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(int(32 * first + c.k0)));
  for (size_t i = 0; i < groups; i++, g += 64, out += P + 1) {
    __m512i w[4], least = _mm512_set1_epi32(-1);
    words_avx512(hash_avx512(at, k1), shift, w);
    words_avx512(hash_avx512(_mm512_add_epi32(at, _mm512_set1_epi32(16)), k1), shift, w + 2);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(32));
    __mmask16 neg[4], bit[4];
    __m512i q[4];
    for (int h = 0; h < 4; h++) {
      // two pages ahead, which the hardware's prefetcher does not look
      _mm_prefetch((const char*)(g + 16 * h) + 8192, _MM_HINT_T0);
      const __m512 a = _mm512_loadu_ps(g + 16 * h);
      neg[h] = _mm512_movepi32_mask(_mm512_castps_si512(a));
      __m512 v = _mm512_mul_ps(_mm512_abs_ps(a), inv);
      if (P > 1 || Half) {
        v = _mm512_min_ps(v, top);
        if (Half) v = _mm512_add_ps(v, _mm512_set1_ps(0.5f));
        q[h] = _mm512_cvttps_epi32(v);
        v = _mm512_reduce_ps(v, 0x0b);  // v - trunc(v)
      }
      const __m512 d = _mm512_fmsub_ps(v, steps, _mm512_cvtepi32_ps(w[h]));
      least = _mm512_min_epu32(least, _mm512_castps_si512(d));
      // unordered counts as above
      const __mmask16 up = _mm512_cmp_ps_mask(d, one, _CMP_NLT_UQ);
      if (P > 1 || Half) q[h] = _mm512_mask_add_epi32(q[h], up, q[h], unit);
      else bit[h] = up;
    }
    const uint64_t signs = join_masks(neg);
    if (P == 1 && !Half) {
      out[0] = join_masks(bit);
      out[1] = signs & out[0];
    } else {
      for (int h = 0; h < 4; h++) bit[h] = _mm512_testn_epi32_mask(q[h], q[h]);
      const uint64_t none = join_masks(bit);
      if (Half)
        for (int h = 0; h < 4; h++)
          q[h] = _mm512_maskz_sub_epi32(__mmask16(~bit[h]), q[h], unit);
      for (int b = 0; b < P; b++) {
        const __m512i one_bit = _mm512_set1_epi32(1 << b);
        for (int h = 0; h < 4; h++) bit[h] = _mm512_test_epi32_mask(q[h], one_bit);
        out[b] = join_masks(bit);
      }
      out[P] = Half ? signs ^ none : signs & ~none;
    }
    // of floats as integers, those from 0 to below 1 are the smallest
    if (__builtin_expect(_mm512_cmplt_epu32_mask(least, _mm512_castps_si512(one)), 0))
      encode_portable<P, Half>(g, 1, first + uint32_t(i), c, out);
  }
}

GOSSAMER_AVX512 inline void signs_avx512(const float* g, size_t groups, uint64_t* out) {
  for (size_t i = 0; i < groups; i++, g += 64) {
    uint64_t word = 0;
    for (int h = 0; h < 4; h++)
      word |= uint64_t(_mm512_movepi32_mask(_mm512_loadu_si512(g + 16 * h))) << 16 * h;
    out[i] = word;
  }
}
#endif  // GOSSAMER_X86

}  // namespace gossamer
