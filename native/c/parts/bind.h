// How an operator is bound to the memory of one call: its arrays, its settings, and what is checked.
#pragma once
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "pack.h"

namespace gossamer::c {

// A value that no code stands for, or an index beyond its table: a fault of the inputs.
struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One operator on the arrays of a block: called with the number of threads, again and again.
typedef std::function<void(size_t)> Step;
typedef std::variant<std::monostate, PackedConv, PackedBytes, PackedRows> Packed;

struct Operand {
  Shape shape;
  int dtype = 0;
  uint8_t* data = nullptr;  // null: left out

  explicit operator bool() const { return data != nullptr; }
  int64_t count() const { return elements(shape); }
  float* floats() const { return reinterpret_cast<float*>(data); }
  size_t rank() const { return shape.size(); }
};

struct Binding {
  const Node& node;
  const Packed& packed;
  std::vector<Operand> in;
  Operand out;
  size_t limit;  // bytes that a kernel may take for itself

  void fits(bool good, const char* what) const {
    if (!good) throw FormatError(node.op + " does not fit: " + what);
  }
  // Input i, which is there, in float32 as the result is.
  const Operand& floats(size_t i) const {
    fits(bool(in[i]), "an input is left out");
    if (in[i].dtype != GOSSAMER_FLOAT32) throw Unsupported(node.op + " of another type than float32");
    return in[i];
  }
  const Json& setting(const char* name) const { return node.a.field(name); }

  // Two or three numbers for each dimension of a map, each from `least` to 65536.
  std::vector<int64_t> each(const char* name, size_t rank, int64_t least) const {
    const auto result = setting(name).wholes();
    fits(result.size() == rank, name);
    for (int64_t v : result) fits(v >= least && v <= 65536, name);
    return result;
  }
  // Before and after for each dimension.
  std::vector<int64_t> pairs(const char* name, size_t rank) const {
    std::vector<int64_t> result;
    fits(setting(name).list().size() == rank, name);
    for (const Json& pair : setting(name).list()) {
      const auto both = pair.wholes();
      fits(both.size() == 2 && std::min(both[0], both[1]) >= 0 &&
               std::max(both[0], both[1]) <= 65536, name);
      result.insert(result.end(), both.begin(), both.end());
    }
    return result;
  }
  int64_t axis(const Json& from, size_t rank) const {
    const int64_t result = from.whole();
    fits(result >= 0 && result < int64_t(rank), "an axis");
    return result;
  }
};

// A function of one value, in place.
class Activation {
 public:
  explicit Activation(const Binding& b) {
    const Json& given = b.setting("activation");
    if (given.kind == Json::kNull) return;
    static constexpr struct {
      const char* name;
      Kind kind;
      size_t settings;
    } all[] = {{"relu", kRelu, 0},       {"clamp", kClamp, 2},           {"gelu", kGelu, 0},
               {"gelu_tanh", kGeluTanh, 0}, {"hardswish", kHardswish, 0},
               {"hardsigmoid", kHardsigmoid, 0}, {"sigmoid", kSigmoid, 0}, {"tanh", kTanh, 0},
               {"silu", kSilu, 0},       {"leaky_relu", kLeaky, 1},      {"elu", kElu, 1},
               {"exp", kExp, 0},         {"neg", kNeg, 0},               {"sqrt", kSqrt, 0},
               {"abs", kAbs, 0},         {"rsqrt", kRsqrt, 0},           {"pow", kPow, 1}};
    const std::string& name = given.at(0).string();
    for (const auto& one : all)
      if (name == one.name && given.list().size() == one.settings + 1) {
        kind_ = one.kind;
        if (one.settings) low_ = float(given.at(1).real());
        if (one.settings == 2) high_ = float(given.at(2).real());
        return;
      }
    throw FormatError("activation '" + name.substr(0, 40) + "' is unknown");
  }

  // The clamp that kernels compute; what is more is left to apply().
  float low() const {
    return kind_ == kRelu ? 0 : kind_ == kClamp ? low_ : -std::numeric_limits<float>::infinity();
  }
  float high() const { return kind_ == kClamp ? high_ : std::numeric_limits<float>::infinity(); }
  bool more() const { return kind_ != kNone && kind_ != kRelu && kind_ != kClamp; }

  void apply(float* y, int64_t n) const {
    const float low = low_, high = high_;
    const auto each = [&](auto f) {
      for (int64_t i = 0; i < n; i++) y[i] = f(y[i]);
    };
    const auto sigmoid = [](float v) { return 1 / (1 + std::exp(-v)); };
    const auto part = [](float v) {  // clip(v + 3, 0, 6) / 6
      const float w = v + 3;
      return (w < 0 ? 0.0f : w > 6 ? 6.0f : w) * (1.0f / 6);
    };
    switch (kind_) {
      case kNone: return;
      case kRelu: return each([](float v) { return v < 0 ? 0.0f : v; });
      case kClamp: return each([=](float v) { return v < low ? low : v > high ? high : v; });
      case kGelu:
        return each([](float v) { return v * 0.5f * (1 + std::erf(v * 0.70710678f)); });
      case kGeluTanh:
        return each([](float v) {
          return v * 0.5f * (1 + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
        });
      case kHardswish: return each([=](float v) { return v * part(v); });
      case kHardsigmoid: return each(part);
      case kSigmoid: return each(sigmoid);
      case kTanh: return each([](float v) { return std::tanh(v); });
      case kSilu: return each([=](float v) { return v * sigmoid(v); });
      case kLeaky: return each([=](float v) { return v < 0 ? v * low : v; });
      case kElu: return each([=](float v) { return v < 0 ? low * std::expm1(v) : v; });
      case kExp: return each([](float v) { return std::exp(v); });
      case kNeg: return each([](float v) { return -v; });
      case kSqrt: return each([](float v) { return std::sqrt(v); });
      case kAbs: return each([](float v) { return std::fabs(v); });
      case kRsqrt: return each([](float v) { return 1 / std::sqrt(v); });
      case kPow: return each([=](float v) { return std::pow(v, low); });
    }
  }

 private:
  enum Kind {
    kNone, kRelu, kClamp, kGelu, kGeluTanh, kHardswish, kHardsigmoid, kSigmoid, kTanh, kSilu,
    kLeaky, kElu, kExp, kNeg, kSqrt, kAbs, kRsqrt, kPow
  };
  Kind kind_ = kNone;
  float low_ = 0, high_ = 0;
};

// Steps between neighbours along each dimension, in elements.
inline Shape strides_of(const Shape& shape) {
  Shape result(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) result[i - 1] = result[i] * shape[i];
  return result;
}

// f(offset of the first, offset of the second) over all of `shape`, the last dimension innermost.
template <class F>
void walk(const Shape& shape, const Shape& one, const Shape& other, F f) {
  const int64_t all = elements(shape);
  Shape at(shape.size());
  int64_t a = 0, b = 0;
  for (int64_t i = 0; i < all; i++) {
    f(a, b);
    for (size_t d = shape.size(); d-- > 0;) {
      a += one[d], b += other[d];
      if (++at[d] < shape[d]) break;
      a -= one[d] * shape[d], b -= other[d] * shape[d], at[d] = 0;
    }
  }
}

// Strides of an operand as one of `shape`: 0 where it is stretched. Throws where it cannot be.
inline Shape stretched(const Binding& b, const Shape& have, const Shape& shape) {
  b.fits(have.size() <= shape.size(), "more dimensions than its result");
  Shape result(shape.size(), 0);
  const Shape own = strides_of(have);
  for (size_t i = 0; i < have.size(); i++) {
    const size_t at = shape.size() - have.size() + i;
    b.fits(have[i] == shape[at] || have[i] == 1, "shapes that do not stretch to its result");
    result[at] = have[i] == 1 ? 0 : own[i];
  }
  return result;
}

}  // namespace gossamer::c
