// Canonical Huffman codes, high bits first. See src/gossamer/pack/coders/huffman.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace gossamer {

constexpr int kMaxLength = 24;
constexpr int kFast = 12;  // bits looked up at once

inline uint64_t load_be64(const uint8_t* p) {
  uint64_t v = 0;
  for (int i = 0; i < 8; i++) v = v << 8 | p[i];  // compilers make this one load
  return v;
}

// Symbols and lengths in order of code; the lengths ascend and make a complete code.
class HuffmanTable {
 public:
  HuffmanTable(const uint32_t* symbol, const uint8_t* length, size_t count)
      : symbol_(symbol, symbol + count), fast_(size_t(1) << kFast) {
    uint64_t code = 0;  // left-aligned in kMaxLength bits
    std::memset(limit_, 0, sizeof limit_);
    for (size_t i = 0; i < count; i++) {
      int l = length[i];
      if (l < 1 || l > kMaxLength || (i && l < length[i - 1]) || symbol[i] >> 24)
        throw std::invalid_argument("Huffman lengths are out of order or range");
      if (l > longest_) {
        longest_ = l;
        // code - index of the first code of this length
        first_[l] = int64_t(code >> (kMaxLength - l)) - int64_t(i);
      }
      uint64_t next = code + (uint64_t(1) << (kMaxLength - l));
      if (next > uint64_t(1) << kMaxLength)
        throw std::invalid_argument("Huffman lengths make an overfull code");
      if (l <= kFast)
        for (uint64_t c = code >> (kMaxLength - kFast); c < next >> (kMaxLength - kFast); c++)
          fast_[c] = symbol[i] << 8 | uint32_t(l);
      limit_[l] = next;
      code = next;
    }
    if (code != uint64_t(1) << kMaxLength)
      throw std::invalid_argument("Huffman lengths make an incomplete code");
    for (int l = 1; l <= kMaxLength; l++)
      if (!limit_[l]) limit_[l] = limit_[l - 1];
  }

  int longest() const { return longest_; }

  // symbol << 8 | length of the code at the top of `bits`.
  uint32_t look_up(uint64_t bits) const {
    uint32_t e = fast_[bits >> (64 - kFast)];
    if (e) return e;
    uint64_t top = bits >> (64 - kMaxLength);
    int l = kFast + 1;
    while (top >= limit_[l]) l++;  // the code is complete: limit_[longest] is above any top
    int64_t index = int64_t(top >> (kMaxLength - l)) - first_[l];
    return symbol_[size_t(index)] << 8 | uint32_t(l);
  }

  template <class Symbol>
  void decode(const uint8_t* data, size_t size, Symbol* out, size_t n) const {
    const size_t total = 8 * size;
    const int batch = 56 / longest_;  // codes in one load
    size_t at = 0, i = 0;
    while (i + size_t(batch) <= n && (at >> 3) + 8 <= size) {
      uint64_t bits = load_be64(data + (at >> 3)) << (at & 7);
      for (int k = 0; k < batch; k++) {
        uint32_t e = look_up(bits);
        out[i++] = Symbol(e >> 8);
        bits <<= e & 0xff;
        at += e & 0xff;
      }
    }
    for (; i < n && at < total; i++) {
      uint8_t rest[8] = {0};
      size_t byte = at >> 3;
      std::memcpy(rest, data + byte, size - byte < 8 ? size - byte : 8);
      uint32_t e = look_up(load_be64(rest) << (at & 7));
      out[i] = Symbol(e >> 8);
      at += e & 0xff;
    }
    bool good = i == n && at <= total && at + 8 > total;
    if (good && at < total) good = !(data[size - 1] & ((1 << (total - at)) - 1));
    if (!good) throw std::invalid_argument("a Huffman stream does not end with its symbols");
  }

 private:
  std::vector<uint32_t> symbol_, fast_;
  uint64_t limit_[kMaxLength + 1];
  int64_t first_[kMaxLength + 1] = {0};
  int longest_ = 0;
};

// table[symbol] = code << 5 | length.
template <class Symbol>
std::vector<uint8_t> huffman_encode(const Symbol* in, size_t n, const uint32_t* table,
                                    size_t alphabet) {
  uint64_t bits = 0;
  for (size_t i = 0; i < n; i++) {
    if (in[i] >= alphabet || !(table[in[i]] & 31))
      throw std::invalid_argument("a symbol has no Huffman code");
    bits += table[in[i]] & 31;
  }
  std::vector<uint8_t> out((bits + 7) / 8);
  uint8_t* p = out.data();
  uint64_t acc = 0;
  int held = 0;
  for (size_t i = 0; i < n; i++) {
    uint32_t e = table[in[i]];
    acc = acc << (e & 31) | e >> 5;
    held += int(e & 31);
    while (held >= 8) *p++ = uint8_t(acc >> (held -= 8));
  }
  if (held) *p = uint8_t(acc << (8 - held));
  return out;
}

}  // namespace gossamer
