// Interleaved rANS: 32-bit states, 16-bit words, frequencies of up to 16 bits.
// The format is described in src/gossamer/pack/coders/ans.py. Every path reads and writes the same bytes.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "intrinsics.h"

namespace gossamer {

constexpr uint32_t kLow = 1u << 16;  // states of several lanes stay at or above this
constexpr int kMaxLanes = 64;
constexpr int kOneEntry = 15;  // bits up to which 32-bit entries stay in the second-level cache

inline uint32_t load_u16(const uint8_t* p) { return p[0] | uint32_t(p[1]) << 8; }
inline uint32_t load_u32(const uint8_t* p) { return load_u16(p) | load_u16(p + 2) << 16; }

inline void check_frequencies(const uint32_t* frequency, size_t alphabet, int bits, int lanes) {
  if (bits < 1 || bits > 16 || (lanes != 1 && lanes != 4 && lanes != 16 && lanes != 64))
    throw std::invalid_argument("rANS bits or lanes out of range");
  uint64_t sum = 0;
  for (size_t s = 0; s < alphabet; s++) {
    if (frequency[s] >> bits) throw std::invalid_argument("a rANS frequency is too large");
    sum += frequency[s];
  }
  if (alphabet > kLow || sum != uint64_t(1) << bits)
    throw std::invalid_argument("rANS frequencies do not sum to a power of two");
}

// What a state's low bits mean. With byte symbols whose frequencies take 12 bits one 32-bit entry
// says it all: symbol | frequency << 8 | offset within the symbol << 20. Else two tables: slot ->
// symbol, and symbol -> frequency | start << 16.
template <class Symbol>
struct RansTable {
  int bits;
  std::vector<uint32_t> packed, info;
  std::vector<Symbol> slot;

  RansTable(const uint32_t* frequency, size_t alphabet, int bits_, int lanes) : bits(bits_) {
    check_frequencies(frequency, alphabet, bits, lanes);
    if (alphabet > size_t(1) << (8 * sizeof(Symbol)))
      throw std::invalid_argument("rANS symbols do not fit the output");
    const uint32_t most = alphabet ? *std::max_element(frequency, frequency + alphabet) : 0;
    const bool one = sizeof(Symbol) == 1 && bits <= kOneEntry && most < 1u << 12;
    if (one) {
      packed.resize(size_t(1) << bits);
    } else {
      slot.resize((size_t(1) << bits) + 4);  // a gather reads 32 bits at each entry
      info.resize(alphabet);
    }
    uint32_t start = 0;
    for (size_t s = 0; s < alphabet; s++) {
      uint32_t f = frequency[s];
      for (uint32_t i = 0; i < f; i++) {
        if (one)
          packed[start + i] = uint32_t(s) | f << 8 | i << 20;
        else
          slot[start + i] = Symbol(s);
      }
      // A start of 2**16 belongs to frequency 0, which no slot names.
      if (!one) info[s] = f | start << 16;
      start += f;
    }
  }
  bool one() const { return !packed.empty(); }
};

#ifdef GOSSAMER_X86
// 32 bits at each of 16 offsets. Two gathers of eight, the upper first: on some cores a third
// faster than one of 16.
template <int Scale>
GOSSAMER_AVX512 inline __m512i gather16(const void* table, __m512i at) {
  const int* t = static_cast<const int*>(table);
  __m256i high = _mm256_i32gather_epi32(t, _mm512_extracti64x4_epi64(at, 1), Scale);
  __m256i low = _mm256_i32gather_epi32(t, _mm512_castsi512_si256(at), Scale);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#endif

template <class Symbol>
class RansDecoder {
 public:
  RansDecoder(const RansTable<Symbol>& table, const uint8_t* data, size_t size, int lanes)
      : table_(table), lanes_(lanes), isa_(isa()) {
    std::memset(x_, 0, sizeof x_);
    word_ = end_ = data + size;
    if (lanes == 1 && size < 4) {
      for (size_t i = 0; i < size; i++) x_[0] |= uint32_t(data[i]) << (8 * i);
      return;
    }
    if (size < size_t(4) * lanes || size % 2)
      throw std::invalid_argument("rANS data has not the length of states and words");
    for (int i = 0; i < lanes; i++) {
      x_[i] = load_u32(data + 4 * i);
      if (lanes > 1 && x_[i] < kLow) throw std::invalid_argument("a rANS state is below 2**16");
    }
    word_ = data + 4 * lanes;
  }

  // The next n symbols: a multiple of the lanes, but in the last call.
  void decode(Symbol* out, size_t n) {
    if (table_.one())
      run<true>(out, n);
    else
      run<false>(out, n);
  }

  // To be called after the last symbol.
  void finish() const {
    bool good = word_ == end_;
    for (int i = 0; i < lanes_; i++) good &= x_[i] == (lanes_ > 1 ? kLow : 0);
    if (!good) throw std::invalid_argument("a rANS stream does not end with its symbols");
  }

 private:
  template <bool One>
  uint32_t step(uint32_t x, Symbol* out) const {
    uint32_t at = x & ((1u << table_.bits) - 1);
    if (One) {
      uint32_t e = table_.packed[at];
      *out = Symbol(e);
      return ((e >> 8) & 0xfff) * (x >> table_.bits) + (e >> 20);
    }
    Symbol s = table_.slot[at];
    uint32_t e = table_.info[s];
    *out = s;
    return (e & 0xffff) * (x >> table_.bits) + at - (e >> 16);
  }

  size_t left() const { return size_t(end_ - word_) / 2; }

  template <bool One>
  void run(Symbol* out, size_t n) {
    size_t done = 0;
    // In each round every lane reads at most one word: with as many words as lanes left, no read
    // passes the end.
    if (lanes_ == 1) {
      done = single<One>(out, n);
#ifdef GOSSAMER_X86
    } else if (lanes_ >= 16 && isa_ == kAvx512) {
      done = lanes_ == 64 ? vector512<One, 4>(out, n) : vector512<One, 1>(out, n);
    } else if (lanes_ >= 16 && isa_ == kAvx2) {
      done = lanes_ == 64 ? vector256<One, 8>(out, n) : vector256<One, 2>(out, n);
#endif
    } else {
      done = lanes_ == 4    ? rounds<One, 4, 4>(out, n)
             : lanes_ == 16 ? rounds<One, 16, 4>(out, n)
                            : rounds<One, 64, 4>(out, n);
    }
    for (; done < n; done++) {
      uint32_t& x = x_[done % lanes_];
      x = step<One>(x, out + done);
      if (x >= kLow) continue;
      if (word_ != end_) {
        x = x << 16 | load_u16(word_);
        word_ += 2;
      } else if (lanes_ > 1) {
        throw std::invalid_argument("rANS words are cut short");
      }
    }
  }

  template <bool One>
  size_t single(Symbol* out, size_t n) {
    uint32_t x = x_[0];
    const uint8_t* w = word_;
    size_t i = 0;
    for (; i < n && w != end_; i++) {
      x = step<One>(x, out + i);
      if (x < kLow) {
        x = x << 16 | load_u16(w);
        w += 2;
      }
    }
    x_[0] = x;
    word_ = w;
    return i;
  }

  template <bool One, int Lanes, int Group>
  size_t rounds(Symbol* out, size_t n) {
    const uint8_t* w = word_;
    size_t i = 0;
    for (; i + Lanes <= n && size_t(end_ - w) >= 2 * Lanes; i += Lanes) {
      for (int g = 0; g < Lanes; g += Group) {
        for (int l = g; l < g + Group; l++) {
          uint32_t x = step<One>(x_[l], out + i + l);
          uint32_t low = x < kLow;
          x_[l] = x << (16 * low) | (load_u16(w) & -low);
          w += 2 * low;
        }
      }
    }
    word_ = w;
    return i;
  }

#ifdef GOSSAMER_X86
  template <bool One, int Vectors>
  GOSSAMER_AVX512 size_t vector512(Symbol* out, size_t n) {
    constexpr int kLanes = 16 * Vectors;
    const int bits = table_.bits;
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), low = _mm512_set1_epi32(kLow);
    const __m512i c12 = _mm512_set1_epi32(0xfff), c16 = _mm512_set1_epi32(0xffff);
    const __m512i symbol_mask = _mm512_set1_epi32(sizeof(Symbol) == 1 ? 0xff : 0xffff);
    const __m512i shift = _mm512_set1_epi32(bits);
    const uint32_t *packed = table_.packed.data(), *info = table_.info.data();
    const Symbol* slot = table_.slot.data();
    __m512i x[Vectors];
    for (int j = 0; j < Vectors; j++) x[j] = _mm512_loadu_si512(x_ + 16 * j);
    const uint8_t* w = word_;
    size_t i = 0;
    for (; i + kLanes <= n && size_t(end_ - w) >= 2 * kLanes; i += kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) {
        __m512i at = _mm512_and_si512(x[j], mask), symbol, f, offset;
        if (One) {
          symbol = gather16<4>(packed, at);
          f = _mm512_and_si512(_mm512_srli_epi32(symbol, 8), c12);
          offset = _mm512_srli_epi32(symbol, 20);
        } else {
          symbol = _mm512_and_si512(gather16<sizeof(Symbol)>(slot, at), symbol_mask);
          __m512i e = gather16<4>(info, symbol);
          f = _mm512_and_si512(e, c16);
          offset = _mm512_sub_epi32(at, _mm512_srli_epi32(e, 16));
        }
        if constexpr (sizeof(Symbol) == 1)
          _mm_storeu_si128((__m128i*)(out + i + 16 * j), _mm512_cvtepi32_epi8(symbol));
        else
          _mm256_storeu_si256((__m256i*)(out + i + 16 * j), _mm512_cvtepi32_epi16(symbol));
        __m512i y =
            _mm512_add_epi32(_mm512_mullo_epi32(f, _mm512_srlv_epi32(x[j], shift)), offset);
        __mmask16 dry = _mm512_cmplt_epu32_mask(y, low);
        __m512i words = _mm512_maskz_expand_epi32(
            dry, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)w)));
        x[j] = _mm512_or_si512(_mm512_mask_slli_epi32(y, dry, y, 16), words);
        w += 2 * _mm_popcnt_u32(dry);
      }
    }
    for (int j = 0; j < Vectors; j++) _mm512_storeu_si512(x_ + 16 * j, x[j]);
    word_ = w;
    return i;
  }

  template <bool One, int Vectors>
  GOSSAMER_AVX2 size_t vector256(Symbol* out, size_t n) {
    constexpr int kLanes = 8 * Vectors;
    static const Spread spread;
    const int bits = table_.bits;
    const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    const __m256i c12 = _mm256_set1_epi32(0xfff), c16 = _mm256_set1_epi32(0xffff);
    const __m256i symbol_mask = _mm256_set1_epi32(sizeof(Symbol) == 1 ? 0xff : 0xffff);
    const __m128i shift = _mm_cvtsi32_si128(bits);
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1,
                                           -1, -1, -1, -1);
    __m256i x[Vectors];
    for (int j = 0; j < Vectors; j++) x[j] = _mm256_loadu_si256((const __m256i*)(x_ + 8 * j));
    const uint8_t* w = word_;
    size_t i = 0;
    for (; i + kLanes <= n && size_t(end_ - w) >= 2 * kLanes; i += kLanes) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; j++) {
        __m256i at = _mm256_and_si256(x[j], mask), symbol, f, offset;
        if (One) {
          symbol = _mm256_i32gather_epi32((const int*)table_.packed.data(), at, 4);
          f = _mm256_and_si256(_mm256_srli_epi32(symbol, 8), c12);
          offset = _mm256_srli_epi32(symbol, 20);
        } else {
          symbol = _mm256_and_si256(
              _mm256_i32gather_epi32((const int*)table_.slot.data(), at, sizeof(Symbol)),
              symbol_mask);
          __m256i e = _mm256_i32gather_epi32((const int*)table_.info.data(), symbol, 4);
          f = _mm256_and_si256(e, c16);
          offset = _mm256_sub_epi32(at, _mm256_srli_epi32(e, 16));
        }
        if constexpr (sizeof(Symbol) == 1) {
          __m256i b = _mm256_shuffle_epi8(symbol, bytes);
          __m128i both =
              _mm_or_si128(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
          _mm_storel_epi64((__m128i*)(out + i + 8 * j), both);
        } else {
          __m256i b = _mm256_permute4x64_epi64(_mm256_packus_epi32(symbol, symbol), 0x08);
          _mm_storeu_si128((__m128i*)(out + i + 8 * j), _mm256_castsi256_si128(b));
        }
        __m256i y =
            _mm256_add_epi32(_mm256_mullo_epi32(f, _mm256_srl_epi32(x[j], shift)), offset);
        __m256i dry = _mm256_cmpeq_epi32(_mm256_srli_epi32(y, 16), _mm256_setzero_si256());
        unsigned which = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(dry)));
        __m256i place =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)spread.lane[which]));
        __m256i words = _mm256_permutevar8x32_epi32(
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)w)), place);
        __m256i full = _mm256_or_si256(_mm256_slli_epi32(y, 16), words);
        x[j] = _mm256_blendv_epi8(y, full, dry);
        w += 2 * _mm_popcnt_u32(which);
      }
    }
    for (int j = 0; j < Vectors; j++) _mm256_storeu_si256((__m256i*)(x_ + 8 * j), x[j]);
    word_ = w;
    return i;
  }

  // For each set of lanes, which of the next words each lane of the set takes.
  struct Spread {
    uint8_t lane[256][8];
    Spread() {
      for (int m = 0; m < 256; m++)
        for (int l = 0, k = 0; l < 8; l++) lane[m][l] = uint8_t(m >> l & 1 ? k++ : 0);
    }
  };
#endif

  const RansTable<Symbol>& table_;
  const uint8_t* word_;
  const uint8_t* end_;
  int lanes_;
  Isa isa_;
  uint32_t x_[kMaxLanes];
};

// States and words of n symbols; throws for a symbol without frequency.
template <class Symbol>
std::vector<uint8_t> rans_encode(const Symbol* in, size_t n, const uint32_t* frequency,
                                 size_t alphabet, int bits, int lanes) {
  check_frequencies(frequency, alphabet, bits, lanes);
  struct Entry {
    uint64_t reciprocal;  // 2**63 / frequency, rounded up: exact quotients of 32-bit states
    uint32_t frequency, start;
  };
  std::vector<Entry> table(alphabet);
  uint32_t start = 0;
  for (size_t s = 0; s < alphabet; s++) {
    uint32_t f = frequency[s];
    table[s] = {f ? ((uint64_t(1) << 63) + f - 1) / f : 0, f, start};
    start += f;
  }
  uint32_t x[kMaxLanes];
  for (int l = 0; l < lanes; l++) x[l] = lanes > 1 ? kLow : 0;
  size_t room = 4 * size_t(lanes) + 2 * n;
  std::vector<uint8_t> out(room);
  uint8_t* p = out.data() + room;  // written from the end: the decoder runs the other way
  for (size_t i = n; i-- > 0;) {
    if (in[i] >= alphabet || !table[in[i]].frequency)
      throw std::invalid_argument("a symbol has no rANS frequency");
    const Entry e = table[in[i]];
    uint32_t s = x[i % lanes];
    uint32_t full = uint64_t(s) >= uint64_t(e.frequency) << (32 - bits);
    if (full) {
      p -= 2;
      p[0] = uint8_t(s);
      p[1] = uint8_t(s >> 8);
      s >>= 16;
    }
    uint32_t q = uint32_t((unsigned __int128)s * e.reciprocal >> 63);
    x[i % lanes] = (q << bits) + (s - q * e.frequency) + e.start;
  }
  size_t state_bytes = 4 * size_t(lanes);
  bool short_state = lanes == 1 && p == out.data() + room;
  if (short_state)
    while (state_bytes && !(x[0] >> (8 * (state_bytes - 1)))) state_bytes--;
  p -= state_bytes;
  for (size_t b = 0; b < state_bytes; b++) p[b] = uint8_t(x[b / 4] >> (8 * (b % 4)));
  out.erase(out.begin(), out.begin() + (p - out.data()));
  return out;
}

}  // namespace gossamer
