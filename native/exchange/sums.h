// Exact sums of codes to bytes and back to floats, all of their bits or those that each group needs.
// What is read comes from other machines, and is checked before anything is written.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "../parallel.h"
#include "forms.h"
#include "planes.h"
#include "shared.h"

namespace gossamer {

template <typename T>
void split(Isa level, const T* v, int bits, uint64_t* out) {
#ifdef GOSSAMER_X86
  if (level == kAvx512) return split_avx512(v, bits, out);
  if (level == kAvx2) return split_avx2(v, bits, out);
#endif
  (void)level;
  split_portable(v, bits, out);
}

inline void join(Isa level, const uint64_t* word, int bits, int32_t top, uint64_t neg, float factor,
          float* out) {
#ifdef GOSSAMER_X86
  if (level == kAvx512) return join_avx512(word, bits, top, neg, factor, out);
  if (level == kAvx2) return join_avx2(word, bits, top, neg, factor, out);
#endif
  (void)level;
  join_portable(word, bits, top, neg, factor, out);
}

inline void check_bits(int bits) {
  if (bits < 1 || bits > 31) throw std::invalid_argument("bits must be 1 to 31");
}

inline size_t padded_head(size_t groups) { return (groups + 7) / 8 * 8; }

template <typename T>
size_t pack_all(const T* sums, size_t n, int bits, bool sparse, uint8_t* out) {
  const size_t groups = groups_of(n);
  const Isa level = isa();
  uint8_t* at = out;
  std::vector<uint8_t> signs(sparse ? 8 * groups : 0);
  BitWriter writer{signs.data()};
  if (sparse) {
    at += padded_head(groups);
    std::memset(out, 0, padded_head(groups));
  }
  for (size_t i = 0; i < groups; i++) {
    T v[64] = {};
    std::memcpy(v, sums + 64 * i, sizeof(T) * std::min<size_t>(64, n - 64 * i));
    uint64_t word[32], planes[2];
    if (!sparse) {
      split(level, v, bits, word);
      std::memcpy(at, word, 8 * size_t(bits));
      at += 8 * bits;
      continue;
    }
    // magnitudes bit by bit: where negative, all bits turned, plus one
    split(level, v, bits, word);
    const uint64_t neg = word[bits - 1];
    uint64_t carry = neg;
    planes[0] = 0;
    planes[1] = neg;
    int need = 0;
    for (int b = 0; b < bits; b++) {
      const uint64_t turned = word[b] ^ neg;
      word[b] = turned ^ carry;
      carry &= turned;
      planes[0] |= word[b];
      if (word[b]) need = b + 1;
    }
    out[i] = uint8_t(need);
    std::memcpy(at, word, 8 * size_t(need));
    at += 8 * need;
    uint8_t where[8];
    squeeze(level, planes, 1, 1, where, writer);
  }
  if (sparse) {
    const size_t size = size_t(writer.finish() - signs.data());
    if (size) std::memcpy(at, signs.data(), size);
    at += size;
  }
  return size_t(at - out);
}

inline size_t pack_sums(AnyIn sums, int bits, bool sparse, Out<uint8_t> out) {
  check_bits(bits);
  const size_t n = sums.size(), groups = groups_of(n);
  const size_t need = sparse ? padded_head(groups) + 8 * size_t(bits + 1) * groups
                             : 8 * size_t(bits) * groups;
  if (out.size() < need) throw std::invalid_argument("out is too small");
  return by_type(sums, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    nb::gil_scoped_release release;
    return pack_all((const T*)sums.data(), n, bits, sparse, out.data());
  });
}

// Where a part of packed sums starts.
struct Place {
  size_t words = 0;
  uint64_t bit = 0;
};

inline std::vector<Place> places(const uint8_t* data, size_t size, size_t n, int bits, bool sparse,
                          const Parts& parts, size_t& signs) {
  const size_t groups = groups_of(n);
  std::vector<Place> all;
  if (!sparse) {
    if (size != 8 * size_t(bits) * groups) throw std::invalid_argument("sums of the wrong length");
    if (n % 64)
      for (int b = 0; b < bits; b++)
        if (load_word(data + size - 8 * size_t(bits) + 8 * size_t(b)) >> n % 64)
          throw std::invalid_argument("bits of sums are set past the last element");
    for (size_t part = 0; part < parts.count; part++)
      all.push_back({part * parts.each * size_t(bits), 0});
    return all;
  }
  const size_t head = padded_head(groups);
  if (size < head || size % 8) throw std::invalid_argument("sums of the wrong length");
  size_t total = 0;
  for (size_t i = 0; i < groups; i++) {
    if (data[i] > bits) throw std::invalid_argument("a group of sums of too many bits");
    total += data[i];
  }
  for (size_t i = groups; i < head; i++)
    if (data[i]) throw std::invalid_argument("bits of the head are set past the last group");
  if (total > (size - head) / 8) throw std::invalid_argument("sums of the wrong length");
  Place at;
  for (size_t i = 0; i < groups; i++) {
    if (i % parts.each == 0) all.push_back(at);
    const int need = data[i];
    const uint8_t* words = data + head + 8 * at.words;
    const uint64_t where = need ? any_of(words, need) : 0;
    if (i == groups - 1 && n % 64 && where >> n % 64)
      throw std::invalid_argument("bits of sums are set past the last element");
    at.words += size_t(need);
    at.bit += uint64_t(__builtin_popcountll(where));
  }
  if (all.empty()) all.push_back(at);
  signs = head + 8 * total;
  if (size - signs != (at.bit + 63) / 64 * 8)
    throw std::invalid_argument("sign bits are not as many as non-zero sums");
  if (at.bit % 64 && load_word(data + size - 8) >> at.bit % 64)
    throw std::invalid_argument("sign bits are set past the last sum");
  return all;
}

inline void decode_sums(In<uint8_t> packed, int bits, bool sparse, float factor, Out<float> out,
                 size_t threads) {
  check_bits(bits);
  const size_t n = out.size(), groups = groups_of(n), size = packed.size();
  const uint8_t* const data = packed.data();
  float* const to = out.data();
  nb::gil_scoped_release release;
  const Parts parts(n, threads);
  size_t signs = 0;
  const std::vector<Place> start = places(data, size, n, bits, sparse, parts, signs);
  if (!std::isfinite(factor)) {
    std::fill(to, to + n, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const Isa level = isa();
  const bool streamed = n >= kStreamed;
  parallel(parts.count, threads, [&](size_t, size_t part) {
    alignas(64) float held[kChunk * 64];
    Place at = start[part];
    const size_t end = std::min(groups, (part + 1) * parts.each);
    const uint8_t* words = data + (sparse ? padded_head(groups) : 0) + 8 * at.words;
    for (size_t from = part * parts.each; from < end; from += kChunk) {
      const size_t count = std::min(kChunk, end - from);
      for (size_t i = from; i < from + count; i++) {
        uint64_t word[32], neg = 0;
        const int need = sparse ? data[i] : bits;
        std::memcpy(word, words, 8 * size_t(need));
        if (sparse && need) {
          uint64_t planes[2];
          const uint64_t where = any_of(words, need);
          at.bit = spread(level, reinterpret_cast<const uint8_t*>(&where), 1, 1, data + signs,
                          (size - signs) / 8, at.bit, planes);
          neg = planes[1];
        }
        words += 8 * need;
        const int32_t high = need ? int32_t(1) << (need - 1) : 0;
        join(level, word, need, sparse ? high : -high, neg, factor, held + 64 * (i - from));
      }
      const size_t values = std::min(64 * count, n - 64 * from);
      if (streamed) stream_copy(held, values, to + 64 * from);
      else std::memcpy(to + 64 * from, held, 4 * values);
    }
#ifdef GOSSAMER_X86
    _mm_sfence();
#endif
  });
}

}  // namespace gossamer
