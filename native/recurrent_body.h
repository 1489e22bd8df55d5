// Gates of recurrent steps over lanes: see recurrent.cpp. Compiled for each instruction set.

#include "exponential_body.h"

// The units i and on of an array with `size` of them; zeros beyond its end.
GOSSAMER_INLINE F units(const float* from, int64_t i, int64_t size) {
  return (F)load_part(from + i, 0, int(size - i < kLanes ? size - i : kLanes), I{});
}

// c' = s(f) c + s(i) tanh(g); h = s(o) tanh(c'), each gate the sum of x and g.
static void lstm(const float* x, const float* g, int64_t size, float* c, float* h, float* y) {
  for (int64_t i = 0; i < size; i += kLanes) {
    F gate[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
      gate[k] = units(x + k * size, i, size) + units(g + k * size, i, size);
    const F kept = sigmoid(gate[1]) * units(c, i, size);
    const F cell = kept + sigmoid(gate[0]) * tangent(gate[2]);
    const F state = sigmoid(gate[3]) * tangent(cell);
    const int count = int(size - i);
    store_first(c + i, cell, count);
    store_first(h + i, state, count);
    store_first(y + i, state, count);
  }
}

// r = s(x + g), z = s(x + g), n = tanh(x + r (g + bias)); h' = (1 - z) n + z h.
static void gru(const float* x, const float* g, const float* bias, int64_t size, float* h,
                float* y) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const F reset = sigmoid(units(x, i, size) + units(g, i, size));
    const F update = sigmoid(units(x + size, i, size) + units(g + size, i, size));
    F own = units(g + 2 * size, i, size);
    if (bias) own = own + units(bias, i, size);
    const F fresh = tangent(units(x + 2 * size, i, size) + reset * own);
    const F state = fresh + update * (units(h, i, size) - fresh);
    const int count = int(size - i);
    store_first(h + i, state, count);
    store_first(y + i, state, count);
  }
}
