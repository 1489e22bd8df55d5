// Gates of recurrent steps over lanes: see recurrent.cpp. Compiled for each instruction set.

// e^x within 2 units of the last place for -87 <= x <= 88; beyond, as at the ends (Cephes expf).
GOSSAMER_INLINE F exponential(F x) {
  x = clamp(x, splat(-87.0f), splat(88.0f));
  const I n = to_nearest(x * 1.44269504088896341f);
  const F whole = to_float(n);
  const F r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = madd(splat(1.3981999507e-3f), p, r);
  p = madd(splat(8.3334519073e-3f), p, r);
  p = madd(splat(4.1665795894e-2f), p, r);
  p = madd(splat(1.6666665459e-1f), p, r);
  p = madd(splat(5.0000001201e-1f), p, r);
  const F e = madd(r + 1.0f, p, r * r);
  const I power = (n + 127) << 23;
  F scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return e * scale;
}

GOSSAMER_INLINE F sigmoid(F x) { return 1.0f / (exponential(-x) + 1.0f); }

// Cephes tanhf: a polynomial where 1 - 2 / (e^2x + 1) would cancel.
GOSSAMER_INLINE F tangent(F x) {
  const F z = x * x;
  F p = splat(-5.70498872745e-3f);
  p = madd(splat(2.06390887954e-2f), p, z);
  p = madd(splat(-5.37397155531e-2f), p, z);
  p = madd(splat(1.33314422036e-1f), p, z);
  p = madd(splat(-3.33332819422e-1f), p, z);
  const F low = madd(x, p * z, x);
  const F high = 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f);
  return (z < 0.390625f) ? low : high;
}

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
