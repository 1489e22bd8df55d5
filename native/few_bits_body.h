// Dense matrices of 2-bit ternary or 4-bit codes times a vector: see few_bits.cpp. Compiled for each
// instruction set (each_isa.h).

constexpr int kRows = 4;            // at a time: they share the loads of x
constexpr int kStep = 4 * kLanes;   // bytes of a vector

// The codes are read once, in order: what comes 4 KB later is asked for now.
GOSSAMER_INLINE void ahead_of_codes(const uint8_t* code) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; i++) __builtin_prefetch(code + 4096 + 64 * i);
}

GOSSAMER_INLINE int32_t total(I v) {
#if defined(GOSSAMER_LANES_NEON)
  return vaddvq_s32((int32x4_t)v);
#else
  int32_t all[kLanes], sum = 0;
  __builtin_memcpy(all, &v, sizeof all);
  for (int i = 0; i < kLanes; i++) sum += all[i];
  return sum;
#endif
}

// acc + the products of four fields of two bits (0 to 2) with four vectors of signed bytes.
GOSSAMER_INLINE I fields(I acc, I code, const int8_t* x, int64_t apart) {
  const I two = splat(0x03030303);
#if defined(GOSSAMER_LANES_AVX2)
  // at most 4 * 2 * 2 * 128 = 2048 in 16 bits
  __m256i sum = _mm256_maddubs_epi16((__m256i)(code & two), (__m256i)load<I>(x));
#pragma GCC unroll 3
  for (int k = 1; k < 4; k++) {
    const __m256i field = (__m256i)(((I)((U)code >> (2 * k))) & two);
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(field, (__m256i)load<I>(x + k * apart)));
  }
  return acc + (I)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#else
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) acc = dot4(acc, (I)((U)code >> (2 * k)) & two, load<I>(x + k * apart));
  return acc;
#endif
}

// Four rows. 256 columns are 64 bytes of each: field k of byte i is column 64 k + i.
static void ternary_rows(const uint8_t* code, int64_t chunks, const int8_t* x, int32_t* y) {
  I s[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) s[r] = I{};
  for (int64_t c = 0; c < chunks; c++, x += 256, code += 64 * kRows) {
    ahead_of_codes(code);
    for (int i = 0; i < 64; i += kStep)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) s[r] = fields(s[r], load<I>(code + 64 * r + i), x + i, 64);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) y[r] = total(s[r]);
}

// Four rows. 128 columns are 64 bytes of each: the low half of byte i is column i, the high one
// column 64 + i.
static void book_rows(const uint8_t* code, int64_t chunks, const int8_t* book, const uint8_t* x,
                      int32_t* y) {
  I s[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) s[r] = I{};
  for (int64_t c = 0; c < chunks; c++, x += 128, code += 64 * kRows) {
    ahead_of_codes(code);
    for (int i = 0; i < 64; i += kStep) {
      const I low = load<I>(x + i), high = load<I>(x + 64 + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const I v = load<I>(code + 64 * r + i);
        s[r] = dot4(s[r], low, look_up(book, v));
        s[r] = dot4(s[r], high, look_up(book, (I)((U)v >> 4)));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) y[r] = total(s[r]);
}

// Rows from .. to of one sample, from a multiple of four; y has room for as much.
static void any_rows(const FewBits& f, int64_t from, int64_t to, const void* x, int32_t* y) {
  for (; from < to; from += kRows, y += kRows) {
    const uint8_t* code = f.codes + from * f.chunks * 64;
    if (f.book) book_rows(code, f.chunks, f.book, (const uint8_t*)x, y);
    else ternary_rows(code, f.chunks, (const int8_t*)x, y);
  }
}

// Signed bytes of a row (127 is its largest absolute value), their sum. False: not finite.
static bool signed_bytes(const float* x, int64_t n, int8_t* code, float* scale, int32_t* sum) {
  float top = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; i++) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    top = a > top ? a : top;
    finite &= a - a == 0;
  }
  if (!finite) return false;
  *scale = top > 1e-36f ? top / 127.0f : 1.0f;
  const float inverse = 1.0f / *scale, magic = 12582912.0f;
  int32_t all = 0;
  for (int64_t i = 0; i < n; i++) {
    float v = (x[i] * inverse + magic) - magic;
    v = v < -127 ? -127 : v;
    v = v > 127 ? 127 : v;
    const int32_t q = int32_t(v);
    code[i] = int8_t(q);
    all += q;
  }
  *sum = all;
  return true;
}

// A row's own values, 4 or 16 of them, by codes of 2 or 4 bits.
template <int BITS>
struct Values {
#if defined(GOSSAMER_LANES_AVX512)
  __m512 all;
#elif defined(GOSSAMER_LANES_AVX2)
  __m256 low, high;  // of 2 bits: the same four in both halves
#else
  const float* all;
#endif
};

template <int BITS>
GOSSAMER_INLINE Values<BITS> values(const float* book) {
#if defined(GOSSAMER_LANES_AVX512)
  if constexpr (BITS == 2) return {_mm512_broadcast_f32x4(_mm_loadu_ps(book))};
  else return {_mm512_loadu_ps(book)};
#elif defined(GOSSAMER_LANES_AVX2)
  if constexpr (BITS == 2) {
    const __m256 four = _mm256_broadcast_ps((const __m128*)book);
    return {four, four};
  } else return {_mm256_loadu_ps(book), _mm256_loadu_ps(book + 8)};
#else
  return {book};
#endif
}

// What the BITS bits of each lane from `shift` on stand for.
template <int BITS>
GOSSAMER_INLINE F value(const Values<BITS>& of, I code, int shift) {
  const I at = (I)((U)code >> shift);
#if defined(GOSSAMER_LANES_AVX512)
  return (F)_mm512_permutexvar_ps((__m512i)at, of.all);  // the low four bits
#elif defined(GOSSAMER_LANES_AVX2)
  if constexpr (BITS == 2) return (F)_mm256_permutevar_ps(of.low, (__m256i)at);  // the low two
  const __m256 low = _mm256_permutevar8x32_ps(of.low, (__m256i)at);  // the low three
  const __m256 high = _mm256_permutevar8x32_ps(of.high, (__m256i)at);
  return (F)_mm256_blendv_ps(low, high, (__m256)((U)code << (28 - shift)));
#else
  F v;
  for (int i = 0; i < kLanes; i++) v[i] = of.all[at[i] & ((1 << BITS) - 1)];
  return v;
#endif
}

// Float32 activations in the order in which lanes meet them: of a chunk's field k, byte b of each of
// its sixteen 32-bit words is column 64 k + 4 j + b. Columns beyond the last are zero.
template <int BITS>
static void reorder(const float* x, int64_t n, int64_t chunks, float* to) {
  for (int64_t field = 0; field < chunks * (8 / BITS); field++, x += 64, n -= 64)
    for (int b = 0; b < 4; b++)
      for (int j = 0; j < 16; j++, to++) *to = 4 * j + b < n ? x[4 * j + b] : 0.0f;
}

// R of the four rows that lie together, on S samples `apart` floats from each other; y: (S, R).
template <int BITS, int R, int S>
GOSSAMER_INLINE void valued(const uint8_t* code, int64_t chunks, const float* book, const float* x,
                            int64_t apart, float* y) {
  F sum[S][R];
  Values<BITS> of[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    of[r] = values<BITS>(book + (r << BITS));
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) sum[s][r] = F{};
  }
  for (int64_t c = 0; c < chunks; c++, x += 512 / BITS, code += 64 * kRows) {
    ahead_of_codes(code);
    for (int v = 0; v < 16; v += kLanes)
#pragma GCC unroll 16
      for (int f = 0; f < 32 / BITS; f++) {
        const int shift = 8 * (f % 4) + BITS * (f / 4);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const F w = value(of[r], load<I>(code + 64 * r + 4 * v), shift);
#pragma GCC unroll 4
          for (int s = 0; s < S; s++)
            sum[s][r] = madd(sum[s][r], w, load<F>(x + s * apart + 16 * f + v));
        }
      }
  }
  for (int s = 0; s < S; s++)
    for (int r = 0; r < R; r++) {
      float all = 0;
      for (int i = 0; i < kLanes; i++) all += sum[s][r][i];
      y[s * R + r] = all;
    }
}

// Rows from .. to, from a multiple of four, of `samples` samples in the order of `reorder`.
template <int BITS>
static void valued_rows(const RowBooks& f, int64_t from, int64_t to, const float* x,
                        int64_t samples, float* out, int64_t rows) {
  constexpr int kOne = BITS == 2 ? 4 : 2, kTwo = 2;  // as many as the registers of AVX2 hold
  const int64_t columns = f.chunks * (512 / BITS);
  float y[2 * kRows];
  for (; from < to; from += kRows) {
    const uint8_t* code = f.codes + from * f.chunks * 64;
    const float* book = (const float*)f.book + (from << BITS);
    int64_t n = 0;
    for (; n + 4 <= samples; n += 4)
      for (int r = 0; r < kRows; r += kTwo) {
        valued<BITS, kTwo, 4>(code + 64 * r, f.chunks, book + (r << BITS), x + n * columns, columns, y);
        for (int i = 0; i < 4 * kTwo; i++)
          if (from + r + i % kTwo < to) out[(n + i / kTwo) * rows + from + r + i % kTwo] = y[i];
      }
    for (; n < samples; n++)
      for (int r = 0; r < kRows; r += kOne) {
        valued<BITS, kOne, 1>(code + 64 * r, f.chunks, book + (r << BITS), x + n * columns, 0, y);
        for (int i = 0; i < kOne; i++)
          if (from + r + i < to) out[n * rows + from + r + i] = y[i];
      }
  }
}

// The same on bytes of seven bits, one sample: exact sums; y has room for a multiple of four.
template <int BITS>
static void coded_rows(const RowBooks& f, int64_t from, int64_t to, const uint8_t* x, int32_t* y) {
  for (; from < to; from += kRows, y += kRows) {
    const uint8_t* code = f.codes + from * f.chunks * 64;
    const int8_t* book = (const int8_t*)f.book + (from << BITS);
    int8_t wide[kRows][16];  // of 2 bits: four times, so that the field above does not matter
    for (int i = 0; i < kRows * 16; i++)
      wide[i / 16][i % 16] = book[(i / 16 << BITS) + (i & ((1 << BITS) - 1))];
    I s[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) s[r] = I{};
    const uint8_t* at = x;
    for (int64_t c = 0; c < f.chunks; c++, at += 512 / BITS, code += 64 * kRows) {
      ahead_of_codes(code);
      for (int i = 0; i < 64; i += kStep)
#pragma GCC unroll 4
        for (int k = 0; k < 8 / BITS; k++) {
          const I bytes = load<I>(at + 64 * k + i);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; r++) {
            const I v = load<I>(code + 64 * r + i);
            s[r] = dot4(s[r], bytes, look_up(wide[r], (I)((U)v >> (BITS * k))));
          }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) y[r] = total(s[r]);
  }
}
