// To codes of seven bits and back, and pools of codes; layers on them: layers.h.
#pragma once
#include "others.h"

namespace gossamer::c {

// On codes (N, quads, H, W, 4); padding is the least code.
inline Step max_pool_int8(const Binding& b) {
  b.fits(b.in[0] && b.in[0].rank() == 5 && b.in[0].shape[4] == 4, "codes in fours");
  b.fits(b.out.dtype == GOSSAMER_UINT8, "its result");
  const Pool pool(b, 1);
  const uint8_t* x = b.in[0].data;
  uint8_t* y = b.out.data;
  return [=](size_t) {
    uint8_t most[4] = {};
    pool.run(
        [&](bool first, int64_t at) {
          for (int k = 0; k < 4; k++)
            most[k] = first ? x[4 * at + k] : std::max(most[k], x[4 * at + k]);
        },
        [&](int64_t window, int64_t seen) {
          for (int k = 0; k < 4; k++) y[4 * window + k] = seen ? most[k] : 0;
        });
  };
}

// Codes of seven bits: maps (N, C, H, W) to (N, quads, H, W, 4), rows as they are.
struct Quads {
  int64_t images = 0, channels = 0, quads = 0, size = 0;

  Quads(const Binding& b, const Operand& plain, const Operand& codes) {
    b.fits(codes.dtype == GOSSAMER_UINT8 && plain.dtype == GOSSAMER_FLOAT32, "codes and floats");
    b.fits(plain.rank() == 2 || plain.rank() == 4, "rows or maps");
    images = plain.shape[0], channels = plain.shape[1];
    if (plain.rank() == 2) {  // each row is an image of one channel
      b.fits(codes.shape == plain.shape, "its result");
      size = channels, channels = 0;
      return;
    }
    quads = (channels + 3) / 4, size = plain.shape[2] * plain.shape[3];
    b.fits(codes.shape == Shape{images, quads, plain.shape[2], plain.shape[3], 4}, "its result");
  }
  // f(place of a float, place of its code)
  template <class F>
  void run(F f) const {
    if (!channels)
      for (int64_t i = 0; i < images * size; i++) f(i, i);
    for (int64_t n = 0; n < images; n++)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < size; i++)
          f((n * channels + c) * size + i, ((n * quads + c / 4) * size + i) * 4 + c % 4);
  }
};

inline Step quantize(const Binding& b) {
  const Operand &x = b.floats(0), &y = b.out;
  const Quads to(b, x, y);
  const double scale = b.setting("scale").real();
  const int64_t zero = b.setting("zero").whole();
  b.fits(std::isfinite(scale) && scale > 0 && zero >= 0 && zero <= 127, "scale and zero point");
  const float inverse = float(1 / scale), middle = float(zero);
  const float* from = x.floats();
  return [=, codes = y.data, n = y.count()](size_t) {
    std::fill(codes, codes + n, uint8_t(0));
    to.run([&](int64_t i, int64_t j) {
      if (!std::isfinite(from[i]))
        throw BadInput("a value is NaN or infinite, which no code of an int8 plan stands for");
      codes[j] = uint8_t(std::min(127.0f, std::max(0.0f, std::nearbyint(from[i] * inverse + middle))));
    });
  };
}

inline Step dequantize(const Binding& b) {
  const Operand &x = b.in[0], &y = b.out;
  const Quads from(b, y, x);
  const double scale = b.setting("scale").real();
  const int64_t zero = b.setting("zero").whole();
  b.fits(std::isfinite(scale) && scale > 0 && zero >= 0 && zero <= 127, "scale and zero point");
  const float factor = float(scale), shift = float(-double(zero) * scale);
  return [=, codes = x.data, to = y.floats()](size_t) {
    from.run([&](int64_t i, int64_t j) { to[i] = float(codes[j]) * factor + shift; });
  };
}

}  // namespace gossamer::c
