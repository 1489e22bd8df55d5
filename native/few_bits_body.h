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
