// To codes of seven bits and back, and pools of codes; layers on them: layers.h.
#pragma once
#include "../../quads_run.h"
#include "others.h"

namespace gossamer::c {

// On codes (N, quads, H, W, 4); padding is the least code.
inline Step max_pool_int8(const Binding& b) {
  b.fits(b.in[0] && b.in[0].rank() == 5 && b.in[0].shape[4] == 4, "codes in fours");
  b.fits(b.out.dtype == GOSSAMER_UINT8, "its result");
  const Pool pool(b, 1);  // checks the windows
  const QuadPool p{pool.size[1],   pool.size[2],   pool.places[1], pool.places[2],
                   pool.kernel[1], pool.kernel[2], pool.stride[1], pool.stride[2],
                   pool.before[1], pool.before[2], pool.dilation[1], pool.dilation[2]};
  check_pool(p);
  if (double(p.line()) * 4 > double(b.limit)) throw std::bad_alloc();
  return [p, planes = pool.images, x = reinterpret_cast<const uint32_t*>(b.in[0].data),
          y = reinterpret_cast<uint32_t*>(b.out.data)](size_t threads) {
    max_pool_quads(p, planes, x, y, threads);
  };
}

// Codes of seven bits: maps (N, C, H, W) to (N, quads, H, W, 4), rows as they are.
struct Coding {
  int64_t images = 0, channels = 0, size = 0;            // rows: no channels
  float factor = 0, shift = 0, inverse = 0, middle = 0;  // of a code, and of a value

  Coding(const Binding& b, const Operand& plain, const Operand& codes) {
    b.fits(codes.dtype == GOSSAMER_UINT8 && plain.dtype == GOSSAMER_FLOAT32, "codes and floats");
    b.fits(plain.rank() == 2 || plain.rank() == 4, "rows or maps");
    const bool maps = plain.rank() == 4;
    if (maps) {
      images = plain.shape[0], channels = plain.shape[1], size = plain.shape[2] * plain.shape[3];
      const Shape quads{images, (channels + 3) / 4, plain.shape[2], plain.shape[3], 4};
      b.fits(channels > 0 && codes.shape == quads, "its result");
    } else {
      size = plain.count();
      b.fits(codes.shape == plain.shape, "its result");
    }
    const double scale = b.setting("scale").real();
    const int64_t zero = b.setting("zero").whole();
    b.fits(std::isfinite(scale) && scale > 0 && zero >= 0 && zero <= 127, "scale and zero point");
    factor = float(scale), shift = float(-double(zero) * scale);
    inverse = float(1 / scale), middle = float(zero);
  }
};

inline Step quantize(const Binding& b) {
  const Operand &x = b.floats(0), &y = b.out;
  const Coding k(b, x, y);
  return [k, from = x.floats(), codes = y.data](size_t threads) {
    bool finite = true;
    if (k.channels)
      finite = quantize_quads(from, k.images, k.channels, k.size, k.inverse, k.middle,
                              reinterpret_cast<uint32_t*>(codes), threads);
    else
      for (int64_t i = 0; i < k.size; i++) {
        finite &= std::isfinite(from[i]);
        const float code = std::nearbyint(from[i] * k.inverse + k.middle);
        codes[i] = uint8_t(std::min(127.0f, std::max(0.0f, code)));
      }
    if (!finite) throw BadInput("a value is NaN or infinite, which no code of an int8 plan stands for");
  };
}

inline Step dequantize(const Binding& b) {
  const Operand &x = b.in[0], &y = b.out;
  const Coding k(b, y, x);
  return [k, codes = x.data, to = y.floats()](size_t threads) {
    if (k.channels)
      return dequantize_quads(reinterpret_cast<const uint32_t*>(codes), k.images, k.channels, k.size,
                              k.factor, k.shift, to, threads);
    for (int64_t i = 0; i < k.size; i++) to[i] = float(codes[i]) * k.factor + k.shift;
  };
}

}  // namespace gossamer::c
