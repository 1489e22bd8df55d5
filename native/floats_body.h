// Small operators on float32, in lanes: see floats.cpp. Compiled for each instruction set, behind
// exponential_body.h.

// `count` values from `from`, at most a vector; `fill` beyond.
GOSSAMER_INLINE F some(const float* from, int64_t count, float fill = 0) {
  return (F)load_part(from, 0, inside(count), (I)splat(fill));
}
GOSSAMER_INLINE float sum_of(F v) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}
GOSSAMER_INLINE float greatest_of(F v) {
  float most = v[0];
  for (int i = 1; i < kLanes; i++) most = v[i] > most ? v[i] : most;
  return most;
}

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
GOSSAMER_INLINE F error_function(F x) {
  const F size = x < 0 ? -x : x, t = 1.0f / (size * 0.3275911f + 1.0f);
  F p = splat(1.061405429f);
  p = madd(splat(-1.453152027f), p, t);
  p = madd(splat(1.421413741f), p, t);
  p = madd(splat(-0.284496736f), p, t);
  p = madd(splat(0.254829592f), p, t);
  const F v = 1.0f - p * t * exponential(-size * size);
  return x < 0 ? -v : v;
}

GOSSAMER_INLINE F activated(Function f, F v, float one, float other) {
  const F zero{};
  switch (f) {
    case Function::kRelu: return v < zero ? zero : v;
    case Function::kClamp: return clamp(v, splat(one), splat(other));
    case Function::kLeaky: return v < zero ? v * one : v;
    case Function::kElu: return v < zero ? (exponential(v) - 1.0f) * one : v;
    case Function::kSigmoid: return sigmoid(v);
    case Function::kTanh: return tangent(v);
    case Function::kSilu: return v * sigmoid(v);
    case Function::kGelu: return v * (error_function(v * 0.70710678f) + 1.0f) * 0.5f;
    case Function::kGeluTanh: {
      const F cube = v * v * v;
      return v * (tangent((v + cube * 0.044715f) * 0.79788456f) + 1.0f) * 0.5f;
    }
    case Function::kHardsigmoid: return clamp(v + 3.0f, zero, splat(6.0f)) * (1.0f / 6);
    case Function::kHardswish: return v * (clamp(v + 3.0f, zero, splat(6.0f)) * (1.0f / 6));
    case Function::kNeg: return -v;
    case Function::kAbs: return v < zero ? -v : v;
    default: return v;
  }
}

// y = f(x), `count` values; y may be x.
static void activate(Function f, float one, float other, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store_first(y + i, activated(f, some(x + i, count - i), one, other), inside(count - i));
}

GOSSAMER_INLINE F joined(Join j, F a, F b) {
  switch (j) {
    case Join::kAdd: return a + b;
    case Join::kSub: return a - b;
    case Join::kMul: return a * b;
    case Join::kDiv: return a / b;
    case Join::kMaximum: {
      const F most = a > b ? a : b;  // NaN of either stays
      return a == a ? most : a;
    }
    default: {
      const F least = a < b ? a : b;
      return a == a ? least : a;
    }
  }
}

// y = a j b over a line; steps of 1, or of 0: one value for all.
static void join_line(Join j, const float* a, int64_t a_step, const float* b, int64_t b_step, float* y,
                      int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const F left = a_step ? some(a + i, count - i, 1) : splat(*a);
    const F right = b_step ? some(b + i, count - i, 1) : splat(*b);
    store_first(y + i, joined(j, left, right), inside(count - i));
  }
}

static float product_of(const float* x, const float* w, int64_t count) {
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int k = 0; k < 4; k++)
      sums[k] = madd(sums[k], load<F>(w + i + k * kLanes), load<F>(x + i + k * kLanes));
  for (; i < count; i += kLanes) sums[0] = madd(sums[0], some(w + i, count - i), some(x + i, count - i));
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static float row_sum(const float* x, int64_t count) {
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int k = 0; k < 4; k++) sums[k] += load<F>(x + i + k * kLanes);
  for (; i < count; i += kLanes) sums[0] += some(x + i, count - i);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// (x - mean) / sqrt(variance + eps) * scale + shift of a row.
static void normalize(const float* x, const float* scale, const float* shift, float eps, float* y,
                      int64_t count) {
  const float mean = row_sum(x, count) / float(count);
  F squares{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F v = some(x + i, count - i, mean) - mean;
    squares += v * v;
    store_first(y + i, v, inside(count - i));
  }
  const float factor = 1 / __builtin_sqrtf(sum_of(squares) / float(count) + eps);
  for (int64_t i = 0; i < count; i += kLanes) {
    F v = some(y + i, count - i) * factor;
    if (scale) v = v * some(scale + i, count - i);
    if (shift) v = v + some(shift + i, count - i);
    store_first(y + i, v, inside(count - i));
  }
}

static void softmax(const float* x, float* y, int64_t count) {
  constexpr float kLeast = -__builtin_inff();
  F most = splat(kLeast);
  for (int64_t i = 0; i < count; i += kLanes) {
    const F v = some(x + i, count - i, kLeast);
    most = v > most ? v : most;
  }
  const float top = greatest_of(most);
  F sums{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F v = some(x + i, count - i, kLeast) - top;
    const F e = v < -87.0f ? F{} : exponential(v);  // hidden places count for nothing
    sums += e;
    store_first(y + i, e, inside(count - i));
  }
  const float factor = 1 / sum_of(sums);
  for (int64_t i = 0; i < count; i += kLanes)
    store_first(y + i, some(y + i, count - i) * factor, inside(count - i));
}

// y (n) = x (k) Y (k, n).
static void row_times(const float* x, const float* matrix, int64_t k, int64_t n, float* y) {
  if (n == 1) {
    *y = product_of(x, matrix, k);
    return;
  }
  int64_t at = 0;
  for (; at + 4 * kLanes <= n; at += 4 * kLanes) {
    F sums[4] = {};
    for (int64_t i = 0; i < k; i++) {
      const F v = splat(x[i]);
      for (int j = 0; j < 4; j++) sums[j] = madd(sums[j], v, load<F>(matrix + i * n + at + j * kLanes));
    }
    for (int j = 0; j < 4; j++) store(y + at + j * kLanes, sums[j]);
  }
  for (; at < n; at += kLanes) {
    F sums{};
    for (int64_t i = 0; i < k; i++) sums = madd(sums, splat(x[i]), some(matrix + i * n + at, n - at));
    store_first(y + at, sums, inside(n - at));
  }
}

// y = y or what lies under a tap of the window, joined: places lo .. hi of a line, `step` apart.
static void pool_line(bool greatest, const float* x, int64_t step, int64_t lo, int64_t hi, float* y) {
  for (int64_t i = lo; i < hi; i += kLanes) {
    const int64_t left = hi - i;
    F v;
    if (step == 1) {
      v = some(x + i, left);
    } else if (step == 2) {
      const int64_t reach = 2 * left - 1;  // none behind the last place
      v = (F)even_lanes(load_part(x + 2 * i, 0, reach, I{}),
                        load_part(x + 2 * i + kLanes, 0, reach - kLanes, I{}));
    } else {
      for (int k = 0; k < kLanes; k++) v[k] = k < left ? x[(i + k) * step] : 0;
    }
    const F old = some(y + i, left);
    const I kept = (I)(old >= v) | (I)(old != old);  // NaN of either stays
    store_first(y + i, greatest ? (kept ? old : v) : old + v, inside(left));
  }
}
