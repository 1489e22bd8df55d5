// A carry-less binary range coder over [low, high] of 32 bits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace gossamer::context {

using i32 = std::int32_t;
using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;

// The fewest bytes that, followed by zeros, name a number in [low, high].
inline int tail(u32 low, u32 high, u8* out) {
  for (int k = 1;; ++k) {
    const std::uint64_t rest = (std::uint64_t{1} << (32 - 8 * k)) - 1;
    const std::uint64_t value = (low + rest) & ~rest;
    if (value <= high || k == 4) {
      for (int j = 0; j < k; ++j) out[j] = static_cast<u8>(value >> (24 - 8 * j));
      return k;
    }
  }
}

// Carry-less binary range coder over [low, high] of 32 bits.
class Encoder {
 public:
  int code(int bit, i32 p) {
    const u32 middle = low_ + static_cast<u32>((std::uint64_t{high_ - low_} * p) >> 16);
    if (bit)
      high_ = middle;
    else
      low_ = middle + 1;
    while (!((low_ ^ high_) >> 24)) {
      out_.push_back(static_cast<u8>(high_ >> 24));
      low_ <<= 8;
      high_ = high_ << 8 | 255;
    }
    return bit;
  }
  std::vector<u8> finish() {
    u8 last[4];
    out_.insert(out_.end(), last, last + tail(low_, high_, last));
    while (!out_.empty() && !out_.back()) out_.pop_back();
    return std::move(out_);
  }

 private:
  u32 low_ = 0, high_ = 0xFFFFFFFF;
  std::vector<u8> out_;
};

// Reads zeros past the end; finish() tells whether these were all the encoder's bytes.
class Decoder {
 public:
  Decoder(const u8* data, size_t size) : data_(data), size_(size) {
    for (int i = 0; i < 4; ++i) value_ = value_ << 8 | next();
  }
  int code(int, i32 p) {
    const u32 middle = low_ + static_cast<u32>((std::uint64_t{high_ - low_} * p) >> 16);
    const int bit = value_ <= middle;
    if (bit)
      high_ = middle;
    else
      low_ = middle + 1;
    while (!((low_ ^ high_) >> 24)) {
      low_ <<= 8;
      high_ = high_ << 8 | 255;
      value_ = value_ << 8 | next();
    }
    return bit;
  }
  void finish() const {
    u8 last[4];
    const size_t count = tail(low_, high_, last), done = at_ - 4;
    bool good = !size_ || data_[size_ - 1];
    good &= size_ <= done + count;
    for (size_t j = 0; j < count; ++j) good &= last[j] == (done + j < size_ ? data_[done + j] : 0);
    if (!good) throw std::invalid_argument("it does not end where its entries end");
  }

 private:
  u8 next() {
    const u8 byte = at_ < size_ ? data_[at_] : 0;
    ++at_;
    return byte;
  }
  const u8* data_;
  size_t size_, at_ = 0;
  u32 low_ = 0, high_ = 0xFFFFFFFF, value_ = 0;
};

}  // namespace gossamer::context
