// e^x and what is made of it, in lanes; included by bodies, inside their namespaces.

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
