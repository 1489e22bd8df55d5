// Runs what quads_body.h computes: included behind each_isa.h with it.
#pragma once
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "parallel.h"
#include "quads.h"
#include "room.h"

namespace gossamer {

// Floats, (images, channels, size), as codes in quads: the nearest to value * factor + shift, of 0 to
// 127. False where a value is NaN or infinite: the codes are then of no use.
inline bool quantize_quads(const float* from, int64_t images, int64_t channels, int64_t size,
                           float factor, float shift, uint32_t* to, size_t threads) {
  const auto some = GOSSAMER_PICK(isa(), quantize_quad);
  const int64_t quads = (channels + 3) / 4;
  std::atomic<bool> finite{true};
  parallel(size_t(images * quads), threads, [&](size_t, size_t item) {
    const int64_t image = int64_t(item) / quads, quad = int64_t(item) % quads;
    const int64_t count = std::min<int64_t>(4, channels - 4 * quad);
    if (!some(from + (image * channels + 4 * quad) * size, count, size, factor, shift,
              to + int64_t(item) * size))
      finite = false;
  });
  return finite;
}

// The other way: code * factor + shift.
inline void dequantize_quads(const uint32_t* from, int64_t images, int64_t channels, int64_t size,
                             float factor, float shift, float* to, size_t threads) {
  const auto some = GOSSAMER_PICK(isa(), dequantize_quad);
  const int64_t quads = (channels + 3) / 4;
  parallel(size_t(images * quads), threads, [&](size_t, size_t item) {
    const int64_t image = int64_t(item) / quads, quad = int64_t(item) % quads;
    some(from + int64_t(item) * size, std::min<int64_t>(4, channels - 4 * quad), size, factor, shift,
         to + (image * channels + 4 * quad) * size);
  });
}

// Raises what a pool cannot be: a window of nothing, or one beyond what `line` holds.
inline void check_pool(const QuadPool& p) {
  for (int64_t v : {p.h, p.w, p.oh, p.ow, p.top, p.left})
    if (v < 0 || v >= int64_t(1) << 24) throw std::invalid_argument("a size is not in [0, 2^24)");
  for (int64_t v : {p.kh, p.kw, p.sy, p.sx, p.dy, p.dx})
    if (v < 1 || v >= int64_t(1) << 24) throw std::invalid_argument("a window's size is not in [1, 2^24)");
}

inline void max_pool_quads(const QuadPool& p, int64_t planes, const uint32_t* from, uint32_t* to,
                           size_t threads) {
  const auto some = GOSSAMER_PICK(isa(), max_pool_plane);
  threads = std::max<size_t>(1, std::min(threads, size_t(planes)));
  const int64_t each = (p.line() + 15) / 16 * 16;
  const auto own = room(int64_t(threads) * each);
  parallel(size_t(planes), threads, [&](size_t worker, size_t plane) {
    some(p, from + int64_t(plane) * p.h * p.w, to + int64_t(plane) * p.oh * p.ow,
         own.get() + int64_t(worker) * each);
  });
}

}  // namespace gossamer
