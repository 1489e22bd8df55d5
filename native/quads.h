// Sizes of a pool over words of four codes.
#pragma once
#include <cstdint>

namespace gossamer {

struct QuadPool {
  int64_t h, w, oh, ow, kh, kw, sy, sx, top, left, dy, dx;

  // Words of a row with everything that a window, and a vector of 16, may reach beside it.
  int64_t line() const {
    const int64_t reach = (ow + 16) * sx + (kw - 1) * dx + 32, own = left + w;
    return reach > own ? reach : own;
  }
};

}  // namespace gossamer
