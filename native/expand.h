// From entropy-coded gaps and codes straight to float32, in blocks that stay in cache.
#pragma once
#include <algorithm>
#include <memory>

#include "rans.h"

namespace gossamer {

// A stream of byte symbols, coded or plain, taken a chunk at a time.
class Feed {
 public:
  static constexpr size_t kChunk = 4096;  // a multiple of the lanes

  Feed(const uint8_t* plain, size_t count) : at_(plain), ready_(count) {}
  Feed(const uint8_t* data, size_t size, const uint32_t* frequency, size_t alphabet, int bits,
       int lanes, size_t count)
      : left_(count),
        table_(new RansTable<uint8_t>(frequency, alphabet, bits, lanes)),
        coded_(new RansDecoder<uint8_t>(*table_, data, size, lanes)),
        buffer_(kChunk) {}

  const uint8_t* at() const { return at_; }
  // Symbols at hand, more being decoded if there are none; 0 at the end of the stream.
  size_t ready() {
    if (!ready_ && left_) {
      ready_ = std::min(kChunk, left_);
      coded_->decode(buffer_.data(), ready_);
      at_ = buffer_.data();
      left_ -= ready_;
      if (!left_) coded_->finish();
    }
    return ready_;
  }
  void skip(size_t n) {
    at_ += n;
    ready_ -= n;
  }

 private:
  const uint8_t* at_ = nullptr;
  size_t ready_ = 0, left_ = 0;
  std::unique_ptr<RansTable<uint8_t>> table_;
  std::unique_ptr<RansDecoder<uint8_t>> coded_;
  std::vector<uint8_t> buffer_;
};

constexpr size_t kBlock = 4096;  // floats: half of a small first-level cache
// Results that do not fit the caches anyway are written past them.
constexpr size_t kStream = size_t(1) << 20;

// `n` floats, a multiple of 16, to 64-byte aligned memory.
#ifdef GOSSAMER_X86
GOSSAMER_AVX512 inline void stream512(float* to, const float* from, size_t n) {
  for (size_t i = 0; i < n; i += 16) _mm512_stream_ps(to + i, _mm512_load_ps(from + i));
}
GOSSAMER_AVX2 inline void stream256(float* to, const float* from, size_t n) {
  for (size_t i = 0; i < n; i += 8) _mm256_stream_ps(to + i, _mm256_load_ps(from + i));
}
#endif

inline void write_past(float* to, const float* from, size_t n, Isa level) {
#ifdef GOSSAMER_X86
  if (level == kAvx512) return stream512(to, from, n);
  if (level == kAvx2) return stream256(to, from, n);
#endif
  (void)level;
  std::memcpy(to, from, n * sizeof(float));
}

inline void fence() {
#ifdef GOSSAMER_X86
  _mm_sfence();
#endif
}

// Calls block(target, first, n) for consecutive blocks of `out`. A large `out` is filled through
// a small aligned buffer.
template <class Block>
void in_blocks(float* out, size_t size, Block block) {
  const Isa level = isa();
  const bool past = size >= kStream && level != kScalar;
  alignas(64) float buffer[kBlock];
  size_t at = 0;
  if (past) {  // up to the first aligned float
    at = (64 - reinterpret_cast<uintptr_t>(out) % 64) % 64 / sizeof(float);
    if (at) block(out, size_t(0), at);
  }
  while (at < size) {
    size_t n = std::min(kBlock, size - at);
    if (past && n % 16 == 0) {
      block(buffer, at, n);
      write_past(out + at, buffer, n, level);
    } else {
      block(out + at, at, n);
    }
    at += n;
  }
  if (past) fence();
}

// Zeros, and book[code] after each gap. Symbols of the gaps are described in gaps.py.
inline void expand_sparse(Feed& gaps, Feed& codes, const float* book, float* out, size_t size) {
  size_t position = 0;  // of the next entry
  uint32_t last = 0;
  in_blocks(out, size, [&](float* target, size_t first, size_t n) {
    std::memset(target, 0, n * sizeof(float));
    const size_t end = first + n;
    while (position < end) {
      size_t count = gaps.ready(), have = codes.ready();
      if (!count) return;
      if (!have) throw std::invalid_argument("there are more gaps than codes");
      // An escape takes no code, so no more codes than gaps are taken.
      const size_t most = std::min(count, have);
      const uint8_t* g = gaps.at();
      const uint8_t* c = codes.at();
      size_t p = position, i = 0;
      for (; i < most; i++) {
        const size_t q = p + g[i];
        if (q >= end) break;
        const uint32_t real = g[i] != 255;
        // Without a branch: an escape writes zero to an entry that is still zero.
        uint32_t value;
        std::memcpy(&value, book + *c, 4);
        value &= -real;
        std::memcpy(target + (q - first), &value, 4);
        c += real;
        p = q + real;
      }
      if (i) last = g[i - 1];
      const bool full = i < most;
      position = p;
      gaps.skip(i);
      codes.skip(size_t(c - codes.at()));
      if (full) return;
    }
  });
  if (gaps.ready()) throw std::invalid_argument("gaps lead beyond the last entry");
  if (codes.ready()) throw std::invalid_argument("there are more codes than gaps");
  if (last == 255) throw std::invalid_argument("gaps end in an escape");
}

#ifdef GOSSAMER_X86
GOSSAMER_AVX512 inline size_t look_up512(const uint8_t* code, size_t n, const float* book,
                                         size_t entries, float* out) {
  const __m512 low = _mm512_loadu_ps(book), high = _mm512_loadu_ps(book + 16);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(code + i)));
    __m512 value = entries <= 32 ? _mm512_permutex2var_ps(low, index, high)
                                 : _mm512_i32gather_ps(index, book, 4);
    _mm512_storeu_ps(out + i, value);
  }
  return i;
}
#endif

// book[symbol] for every entry; `book` has room for 256.
inline void expand_dense(Feed& symbols, const float* book, size_t entries, float* out,
                         size_t size) {
  const Isa level = isa();
  in_blocks(out, size, [&](float* target, size_t, size_t n) {
    while (n) {
      size_t count = std::min(symbols.ready(), n), i = 0;
      if (!count) throw std::invalid_argument("there are fewer symbols than entries");
      const uint8_t* s = symbols.at();
#ifdef GOSSAMER_X86
      if (level == kAvx512) i = look_up512(s, count, book, entries, target);
#endif
      for (; i < count; i++) target[i] = book[s[i]];
      symbols.skip(count);
      target += count;
      n -= count;
    }
  });
  (void)level;
  (void)entries;
  if (symbols.ready()) throw std::invalid_argument("there are more symbols than entries");
}

}  // namespace gossamer
