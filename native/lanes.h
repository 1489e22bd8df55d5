// GOSSAMER_LANES 32-bit lanes, float or integer; included by each_isa.h once for each namespace.
// Everything is written in the compiler's vector types; only what they cannot say has intrinsics.
// Integer results are the same bits everywhere: dot4 takes activations of seven bits, so that
// vpmaddubsw, which saturates at 16 bits, never does (127 * 128 * 2 < 32768).
#define GOSSAMER_INLINE static inline __attribute__((always_inline))

constexpr int kLanes = GOSSAMER_LANES;
typedef float F __attribute__((vector_size(4 * GOSSAMER_LANES)));
typedef int32_t I __attribute__((vector_size(4 * GOSSAMER_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * GOSSAMER_LANES)));

template <class V>
GOSSAMER_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
GOSSAMER_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}
GOSSAMER_INLINE F splat(float x) { return x - F{}; }
GOSSAMER_INLINE I splat(int32_t x) { return x - I{}; }

GOSSAMER_INLINE I iota() {
  I v;
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}
GOSSAMER_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
// To the nearest, ties to even; |v| < 2^22.
GOSSAMER_INLINE I to_nearest(F v) {
#if defined(GOSSAMER_LANES_AVX512)
  return (I)_mm512_cvtps_epi32((__m512)v);
#elif defined(GOSSAMER_LANES_AVX2)
  return (I)_mm256_cvtps_epi32((__m256)v);
#elif defined(GOSSAMER_LANES_NEON)
  return (I)vcvtnq_s32_f32((float32x4_t)v);
#else
  F shifted = v + 12582912.0f;
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
#endif
}
// NaN stays NaN.
GOSSAMER_INLINE F clamp(F v, F low, F high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Four vectors, each in a byte of a lane: to the nearest, of 0 to 127. `most` is at most 127.
GOSSAMER_INLINE I to_quads(F a, F b, F c, F d, F most) {
  a = a > most ? most : a, b = b > most ? most : b;
  c = c > most ? most : c, d = d > most ? most : d;
#if defined(GOSSAMER_LANES_AVX512)
  // What is below zero, whole numbers of 32 bits have it or not, saturates to zero in the packing.
  const __m512i ab = _mm512_packs_epi32((__m512i)to_nearest(a), (__m512i)to_nearest(b));
  const __m512i cd = _mm512_packs_epi32((__m512i)to_nearest(c), (__m512i)to_nearest(d));
  const __m512i turn = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  return (I)_mm512_shuffle_epi8(_mm512_packus_epi16(ab, cd), turn);
#elif defined(GOSSAMER_LANES_AVX2)
  const __m256i ab = _mm256_packs_epi32((__m256i)to_nearest(a), (__m256i)to_nearest(b));
  const __m256i cd = _mm256_packs_epi32((__m256i)to_nearest(c), (__m256i)to_nearest(d));
  const __m256i turn = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (I)_mm256_shuffle_epi8(_mm256_packus_epi16(ab, cd), turn);
#else
  const F zero{};
  a = a < zero ? zero : a, b = b < zero ? zero : b;
  c = c < zero ? zero : c, d = d < zero ? zero : d;
  return to_nearest(a) | to_nearest(b) << 8 | to_nearest(c) << 16 | to_nearest(d) << 24;
#endif
}
// Lanes 0, 2, 4, ... of two vectors behind each other.
GOSSAMER_INLINE I even_lanes(I a, I b) {
#if defined(GOSSAMER_LANES_AVX512)
  const __m512i at = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return (I)_mm512_permutex2var_epi32((__m512i)a, at, (__m512i)b);
#elif defined(GOSSAMER_LANES_AVX2)
  const __m256 both = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (I)_mm256_permute4x64_epi64((__m256i)both, 0xd8);
#elif defined(GOSSAMER_LANES_NEON)
  return (I)vuzp1q_s32((int32x4_t)a, (int32x4_t)b);
#else
  I v;
  for (int i = 0; i < kLanes / 2; i++) v[i] = a[2 * i], v[i + kLanes / 2] = b[2 * i];
  return v;
#endif
}
// The greater of the bytes of each.
GOSSAMER_INLINE I greater_bytes(I a, I b) {
  typedef uint8_t B __attribute__((vector_size(4 * GOSSAMER_LANES)));
  const B x = (B)a, y = (B)b;
  return (I)(x > y ? x : y);
}

// acc + w * x
GOSSAMER_INLINE F madd(F acc, F w, F x) {
#if defined(GOSSAMER_LANES_AVX512)
  return (F)_mm512_fmadd_ps((__m512)w, (__m512)x, (__m512)acc);
#elif defined(GOSSAMER_LANES_AVX2)
  return (F)_mm256_fmadd_ps((__m256)w, (__m256)x, (__m256)acc);
#elif defined(GOSSAMER_LANES_NEON)
  return (F)vfmaq_f32((float32x4_t)acc, (float32x4_t)w, (float32x4_t)x);
#else
  return acc + w * x;
#endif
}

// acc + the sum of four products in each lane: x unsigned, of seven bits, w signed bytes.
GOSSAMER_INLINE I dot4(I acc, I x, I w) {
#if defined(GOSSAMER_LANES_AVX512)
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
#elif defined(GOSSAMER_LANES_AVX2)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)w);
  return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(GOSSAMER_LANES_NEON_DOT)
  return (I)vdotq_s32((int32x4_t)acc, (int8x16_t)x, (int8x16_t)w);
#elif defined(GOSSAMER_LANES_NEON)
  const int8x16_t a = (int8x16_t)x, b = (int8x16_t)w;
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return acc + (I)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
  // In 16 bits: two products of seven by eight bits, summed, fit.
  typedef int16_t H __attribute__((vector_size(4 * GOSSAMER_LANES)));
  const H even = (H)(x & 0x00ff00ff) * ((H)w << 8 >> 8);
  const I both = (I)(even + (H)((I)((U)x >> 8) & 0x00ff00ff) * ((H)w >> 8));
  return acc + (both << 16 >> 16) + (both >> 16);
#endif
}

// acc + the sum of two products in each lane: x and w are pairs of signed 16 bits.
GOSSAMER_INLINE I dot2(I acc, I x, I w) {
#if defined(GOSSAMER_LANES_AVX512)
  return (I)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
#elif defined(GOSSAMER_LANES_AVX2)
  return acc + (I)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(GOSSAMER_LANES_NEON)
  const int16x8_t a = (int16x8_t)x, b = (int16x8_t)w;
  return acc + (I)vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
#elif defined(GOSSAMER_X86) && GOSSAMER_LANES == 4
  return acc + (I)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
  return acc + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
}

// Some lanes, first <= i < end, of which none may lie outside of the vector.
#if defined(GOSSAMER_LANES_AVX512)
typedef __mmask16 Lanes;
GOSSAMER_INLINE Lanes lanes_between(int first, int end) {
  return (__mmask16)(((1u << end) - 1) & ~((1u << first) - 1));
}
#elif defined(GOSSAMER_LANES_AVX2)
typedef __m256i Lanes;
GOSSAMER_INLINE Lanes lanes_between(int first, int end) {
  const I at = iota();
  return (__m256i)((at >= first) & (at < end));
}
#else
struct Lanes {
  int first, end;
};
GOSSAMER_INLINE Lanes lanes_between(int first, int end) { return {first, end}; }
#endif

// These lanes from memory, no other byte of which is read; `fill` elsewhere.
GOSSAMER_INLINE I load_lanes(const void* from, const Lanes& lanes, const I& fill) {
#if defined(GOSSAMER_LANES_AVX512)
  return (I)_mm512_mask_loadu_epi32((__m512i)fill, lanes, from);
#elif defined(GOSSAMER_LANES_AVX2)
  return (I)_mm256_blendv_epi8((__m256i)fill, _mm256_maskload_epi32((const int*)from, lanes), lanes);
#else
  if (lanes.end - lanes.first == kLanes) return load<I>(from);
  I v = fill;
  for (int i = lanes.first; i < lanes.end; i++) {
    int32_t x;
    __builtin_memcpy(&x, (const char*)from + 4 * i, 4);
    v[i] = x;
  }
  return v;
#endif
}

GOSSAMER_INLINE int inside(int64_t lane) { return lane < 0 ? 0 : lane > kLanes ? kLanes : int(lane); }

// Lanes first <= i < end, which may lie outside of the vector.
GOSSAMER_INLINE I load_part(const void* from, int64_t first, int64_t end, const I& fill) {
  const int low = inside(first), high = inside(end);
  if (low >= high) return fill;
  if (high - low == kLanes) return load<I>(from);
  return load_lanes(from, lanes_between(low, high), fill);
}

// The first `count` lanes to memory.
template <class V>
GOSSAMER_INLINE void store_first(void* to, V v, int count) {
  if (count >= kLanes) return store(to, v);
#if defined(GOSSAMER_LANES_AVX512)
  _mm512_mask_storeu_epi32(to, lanes_between(0, count), (__m512i)v);
#elif defined(GOSSAMER_LANES_AVX2)
  _mm256_maskstore_epi32((int*)to, lanes_between(0, count), (__m256i)v);
#else
  __builtin_memcpy(to, &v, size_t(4) * size_t(count > 0 ? count : 0));
#endif
}

[[maybe_unused]] static uint16_t greatest(const uint16_t* v, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < n; i++) most = v[i] > most ? v[i] : most;
  return most;
}

// Bytes of a book of 16 by the low four bits.
GOSSAMER_INLINE I look_up(const int8_t* book, I code) {
  code &= 0x0f0f0f0f;
#if defined(GOSSAMER_LANES_AVX512)
  const __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)book));
  return (I)_mm512_shuffle_epi8(b, (__m512i)code);
#elif defined(GOSSAMER_LANES_AVX2)
  const __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)book));
  return (I)_mm256_shuffle_epi8(b, (__m256i)code);
#elif defined(GOSSAMER_LANES_NEON)
  return (I)vqtbl1q_s8(vld1q_s8(book), (uint8x16_t)code);
#else
  uint8_t at[4 * kLanes];
  __builtin_memcpy(at, &code, sizeof at);
  for (int i = 0; i < 4 * kLanes; i++) at[i] = uint8_t(book[at[i]]);
  return load<I>(at);
#endif
}
