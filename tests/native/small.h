// Small operators (floats_body.h, small_body.h) beside what a processor computes in double.
#pragma once

namespace {

void one_function(Function f, const char* name, const std::vector<float>& x, double (*wanted)(double)) {
  std::vector<float> y(x.size());
  GOSSAMER_PICK(isa(), activate)(f, 0.5f, 1.25f, x.data(), y.data(), int64_t(x.size()));
  for (size_t i = 0; i < x.size(); i++) expect(name, int64_t(i), y[i], wanted(x[i]), 1e-6 + 4e-7 * std::fabs(wanted(x[i])));
}

void functions() {
  auto x = reals(draw(1, 70));
  for (float& v : x) v *= 4;
  one_function(Function::kNone, "nothing", x, [](double v) { return v; });
  one_function(Function::kRelu, "relu", x, [](double v) { return std::max(v, 0.0); });
  one_function(Function::kClamp, "clamp", x, [](double v) { return std::min(std::max(v, 0.5), 1.25); });
  one_function(Function::kLeaky, "leaky", x, [](double v) { return v < 0 ? v / 2 : v; });
  one_function(Function::kElu, "elu", x, [](double v) { return v < 0 ? std::expm1(v) / 2 : v; });
  one_function(Function::kSigmoid, "sigmoid", x, [](double v) { return 1 / (1 + std::exp(-v)); });
  one_function(Function::kTanh, "tanh", x, [](double v) { return std::tanh(v); });
  one_function(Function::kSilu, "silu", x, [](double v) { return v / (1 + std::exp(-v)); });
  one_function(Function::kGelu, "gelu", x, [](double v) { return v * (1 + std::erf(v / std::sqrt(2.0))) / 2; });
  one_function(Function::kGeluTanh, "gelu_tanh", x, [](double v) {
    return v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))) / 2;
  });
  one_function(Function::kHardsigmoid, "hardsigmoid", x, [](double v) { return std::min(std::max(v + 3, 0.0), 6.0) / 6; });
  one_function(Function::kHardswish, "hardswish", x, [](double v) { return v * std::min(std::max(v + 3, 0.0), 6.0) / 6; });
  one_function(Function::kNeg, "neg", x, [](double v) { return -v; });
  one_function(Function::kAbs, "abs", x, [](double v) { return std::fabs(v); });
}

void joins() {
  const int64_t n = draw(1, 70), a_step = draw(0, 1), b_step = draw(0, 1);
  const auto a = reals(n);
  auto b = reals(n);
  for (float& v : b) v = v < 0 ? v - 1 : v + 1;
  for (int j = 0; j < 6; j++) {
    std::vector<float> y(size_t(n), 0.0f);
    GOSSAMER_PICK(isa(), join_line)(Join(j), a.data(), a_step, b.data(), b_step, y.data(), n);
    for (int64_t i = 0; i < n; i++) {
      const double p = a[size_t(i * a_step)], q = b[size_t(i * b_step)];
      const double all[] = {p + q, p - q, p * q, p / q, std::max(p, q), std::min(p, q)};
      expect("joined", i, y[size_t(i)], all[j], 1e-6 * (1 + std::fabs(all[j])));
    }
  }
}

void rows_of_floats() {
  const int64_t n = draw(1, 150), k = draw(1, 20);
  auto x = reals(n);
  const auto w = reals(n), shift = reals(n), left = reals(k), matrix = reals(k * n);
  double sum = 0, product = 0, squares = 0, whole = 0;
  for (int64_t i = 0; i < n; i++) sum += x[size_t(i)], product += double(x[size_t(i)]) * w[size_t(i)];
  expect("sum", n, GOSSAMER_PICK(isa(), row_sum)(x.data(), n), sum, 1e-4);
  expect("dot", n, GOSSAMER_PICK(isa(), product_of)(x.data(), w.data(), n), product, 1e-4);
  std::vector<float> y(size_t(n), 0.0f);
  GOSSAMER_PICK(isa(), normalize)(x.data(), w.data(), shift.data(), 1e-3f, y.data(), n);
  for (float v : x) squares += (v - sum / double(n)) * (v - sum / double(n));
  for (int64_t i = 0; i < n; i++) {
    const double v = (x[size_t(i)] - sum / double(n)) / std::sqrt(squares / double(n) + double(1e-3f));
    expect("normalized", i, y[size_t(i)], v * w[size_t(i)] + shift[size_t(i)], 2e-5);
  }
  x[0] = n > 1 && draw(0, 1) ? -INFINITY : x[0];
  GOSSAMER_PICK(isa(), softmax)(x.data(), y.data(), n);
  for (float v : x) whole += std::exp(double(v));
  for (int64_t i = 0; i < n; i++) expect("softmax", i, y[size_t(i)], std::exp(double(x[size_t(i)])) / whole, 1e-6);
  GOSSAMER_PICK(isa(), row_times)(left.data(), matrix.data(), k, n, y.data());
  for (int64_t i = 0; i < n; i++) {
    double v = 0;
    for (int64_t j = 0; j < k; j++) v += double(left[size_t(j)]) * matrix[size_t(j * n + i)];
    expect("row times matrix", i, y[size_t(i)], v, 1e-4);
  }
  const auto finite = GOSSAMER_PICK(isa(), all_finite);
  expect("finite", n, finite(w.data(), n), 1, 0);
  auto bad = w;
  bad[size_t(draw(0, n - 1))] = draw(0, 1) ? INFINITY : NAN;
  expect("not finite", n, finite(bad.data(), n), 0, 0);
}

void pooled() {
  const int64_t places = draw(1, 50), step = draw(1, 4);
  const auto x = reals((places - 1) * step + 1), y0 = reals(places);
  for (bool greatest : {true, false}) {
    auto y = y0;
    GOSSAMER_PICK(isa(), pool_line)(greatest, x.data(), step, 0, places, y.data());
    for (int64_t i = 0; i < places; i++) {
      const float v = x[size_t(i * step)], old = y0[size_t(i)];
      expect("pool", i, y[size_t(i)], greatest ? std::max(v, old) : v + old, 0);
    }
  }
}

}  // namespace
