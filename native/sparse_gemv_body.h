// Sparse matrix times vector by byte permutes: see sparse_gemv.cpp. Compiled for each instruction set
// (each_isa.h).

// The activations of a block of `Width` columns, from which bytes are picked by index.
template <int Width>
struct Table {
#if defined(GOSSAMER_LANES_AVX512)
  __m512i low, high;
  GOSSAMER_INLINE Table of(const uint8_t* x) {
    const __m512i low = Width == 32 ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)x))
                                    : _mm512_loadu_si512(x);
    return {low, Width == 128 ? _mm512_loadu_si512(x + 64) : low};
  }
  inline __attribute__((always_inline)) I pick(I index) const {
    return (I)(Width == 128 ? _mm512_permutex2var_epi8(low, (__m512i)index, high)
                            : _mm512_permutexvar_epi8((__m512i)index, low));
  }
#elif defined(GOSSAMER_LANES_AVX2)
  __m256i part[Width / 16];
  GOSSAMER_INLINE Table of(const uint8_t* x) {
    Table t;
#pragma GCC unroll 8
    for (int i = 0; i < Width / 16; i++)
      t.part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(x + 16 * i)));
    return t;
  }
  // Bits 0-3 pick inside a part, bits 4-6 the part: vpblendvb reads the topmost bit of a byte.
  inline __attribute__((always_inline)) I pick(I index) const {
    const __m256i at = (__m256i)index, bit4 = _mm256_slli_epi16(at, 3);
    __m256i v[Width / 16];
#pragma GCC unroll 8
    for (int i = 0; i < Width / 16; i++) v[i] = _mm256_shuffle_epi8(part[i], at);
#pragma GCC unroll 4
    for (int i = 0; i < Width / 32; i++) v[i] = _mm256_blendv_epi8(v[2 * i], v[2 * i + 1], bit4);
    if constexpr (Width >= 64) {
      const __m256i bit5 = _mm256_slli_epi16(at, 2);
#pragma GCC unroll 2
      for (int i = 0; i < Width / 64; i++) v[i] = _mm256_blendv_epi8(v[2 * i], v[2 * i + 1], bit5);
    }
    if constexpr (Width == 128) v[0] = _mm256_blendv_epi8(v[0], v[1], _mm256_slli_epi16(at, 1));
    return (I)v[0];
  }
#elif defined(GOSSAMER_LANES_NEON)
  uint8x16x4_t low, high;  // of 64 columns each
  GOSSAMER_INLINE Table of(const uint8_t* x) {
    Table t;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) t.low.val[i] = vld1q_u8(x + 16 * (Width == 32 ? i % 2 : i));
    if constexpr (Width == 128) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) t.high.val[i] = vld1q_u8(x + 64 + 16 * i);
    }
    return t;
  }
  // An index beyond its table gives 0, or leaves what is there.
  inline __attribute__((always_inline)) I pick(I index) const {
    const uint8x16_t at = (uint8x16_t)index;
    if constexpr (Width == 32) return (I)vqtbl2q_u8({{low.val[0], low.val[1]}}, at);
    uint8x16_t v = vqtbl4q_u8(low, at);
    if constexpr (Width == 128) v = vqtbx4q_u8(v, high, vsubq_u8(at, vdupq_n_u8(64)));
    return (I)v;
  }
#else
  const uint8_t* x;
  GOSSAMER_INLINE Table of(const uint8_t* x) { return {x}; }
  inline __attribute__((always_inline)) I pick(I index) const {
    uint8_t at[4 * kLanes];
    __builtin_memcpy(at, &index, sizeof at);
    for (int i = 0; i < 4 * kLanes; i++) at[i] = x[at[i] & (Width - 1)];
    return load<I>(at);
  }
#endif
};

constexpr int kParts = 16 / kLanes;  // vectors of the 16 rows of a group

// Steps are read once, in order: what comes 2 KB later is asked for now.
GOSSAMER_INLINE void ahead(const uint8_t* p) { __builtin_prefetch(p + 2048); }

template <int Width, bool Book>
static void groups(const SparseGemv& g, int64_t from, int64_t to, const uint8_t* x, int32_t* sums) {
  for (int64_t b = 0; b < g.blocks; b++) {
    const Table<Width> table = Table<Width>::of(x + b * Width);
    const int32_t* starts = g.starts + b * g.groups;
    for (int64_t i = from; i < to; i++) {
      const int64_t steps = starts[i + 1] - starts[i];
      const uint8_t* p = g.data + int64_t(starts[i]) * (Book ? 96 : 128);
      int32_t* y = sums + 16 * (i - from);
      I s[kParts];
#pragma GCC unroll 4
      for (int k = 0; k < kParts; k++) s[k] = b ? load<I>(y + k * kLanes) : I{};
      if constexpr (Book) {
        for (int64_t step = 0; step < steps; step += 2, p += 192) {
          ahead(p), ahead(p + 64), ahead(p + 128);
#pragma GCC unroll 4
          for (int k = 0; k < kParts; k++) {
            const I code = load<I>(p + 128 + 4 * k * kLanes);
            s[k] = dot4(s[k], table.pick(load<I>(p + 4 * k * kLanes)), look_up(g.book, code));
            s[k] = dot4(s[k], table.pick(load<I>(p + 64 + 4 * k * kLanes)),
                        look_up(g.book, (I)((U)code >> 4)));
          }
        }
      } else {
        for (int64_t step = 0; step < steps; step++, p += 128) {
          ahead(p), ahead(p + 64);
#pragma GCC unroll 4
          for (int k = 0; k < kParts; k++)
            s[k] = dot4(s[k], table.pick(load<I>(p + 4 * k * kLanes)),
                        load<I>(p + 64 + 4 * k * kLanes));
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kParts; k++) store(y + k * kLanes, s[k]);
    }
  }
}

static void any_groups(const SparseGemv& g, int64_t from, int64_t to, const uint8_t* x,
                       int32_t* sums) {
  if (g.book) {
    if (g.width == 32) groups<32, true>(g, from, to, x, sums);
    else if (g.width == 64) groups<64, true>(g, from, to, x, sums);
    else groups<128, true>(g, from, to, x, sums);
  } else {
    if (g.width == 32) groups<32, false>(g, from, to, x, sums);
    else if (g.width == 64) groups<64, false>(g, from, to, x, sums);
    else groups<128, false>(g, from, to, x, sums);
  }
}

GOSSAMER_INLINE F gather(const float* x, const uint16_t* at) {
#if defined(GOSSAMER_LANES_AVX512)
  const __m512i index = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
  return (F)_mm512_i32gather_ps(index, x, 4);
#elif defined(GOSSAMER_LANES_AVX2)
  const __m256i index = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
  return (F)_mm256_i32gather_ps(x, index, 4);
#else
  F v;
  for (int i = 0; i < kLanes; i++) v[i] = x[at[i]];
  return v;
#endif
}

// Rows from .. to of a float32 matrix in compressed rows.
static void float_rows(const int32_t* starts, const uint16_t* columns, const float* values,
                       const float* x, int64_t from, int64_t to, float* y) {
  for (int64_t r = from; r < to; r++) {
    int32_t i = starts[r];
    const int32_t end = starts[r + 1];
    F s{}, t{};
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      __builtin_prefetch(values + i + 512);
      __builtin_prefetch(columns + i + 1024);
      s = madd(s, load<F>(values + i), gather(x, columns + i));
      t = madd(t, load<F>(values + i + kLanes), gather(x, columns + i + kLanes));
    }
    float lanes[kLanes], sum = 0;
    store(lanes, s + t);
    for (; i < end; i++) sum += values[i] * x[columns[i]];
    for (int k = 0; k < kLanes; k++) sum += lanes[k];
    y[r] = sum;
  }
}

// Codes of seven bits of a row: scale and zero point from its extremes. False: not finite.
[[maybe_unused]] static bool seven_bits(const float* x, int64_t n, uint8_t* code, float* scale, int32_t* zero) {
  float low = 0, high = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; i++) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    finite &= x[i] - x[i] == 0;
  }
  const float step = (high - low) / 127.0f;
  if (!finite || step - step != 0) return false;
  *scale = step > 1e-37f ? step : 1.0f;
  const float inverse = 1.0f / *scale, magic = 12582912.0f;
  const float z = (-low * inverse + magic) - magic;
  *zero = int32_t(z);
  for (int64_t i = 0; i < n; i++) {
    float v = ((x[i] * inverse + magic) - magic) + z;
    v = v < 0 ? 0 : v;
    v = v > 127 ? 127 : v;
    code[i] = uint8_t(int32_t(v));
  }
  return true;
}
