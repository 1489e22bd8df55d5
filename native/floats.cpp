// Small operators on float32 that are bound to their arrays (floats_body.h): what lies between the
// layers of a network, and layers too small for another engine's call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "floats.h"
#include "step.h"

#define GOSSAMER_BODY "floats_all.h"
#include "each_isa.h"

namespace nb = nanobind;

namespace {

using gossamer::Function;
using gossamer::Join;

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Strided = nb::ndarray<const float, nb::device::cpu>;

void need(bool good) {
  if (!good) throw std::invalid_argument("arrays differ in size");
}

// A function of every value, in place or not.
class Unary {
 public:
  Unary(const std::string& name, float one, float other, Array<const float, 1> x, Array<float, 1> y)
      : x_(x), y_(y), one_(one), other_(other) {
    static const char* const names[] = {
        "", "relu", "clamp", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh",
        "hardsigmoid", "hardswish", "neg", "abs"};
    const auto* found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names)) throw std::invalid_argument("no function is called " + name);
    function_ = Function(found - names);
    need(x.size() == y.size());
    run_ = GOSSAMER_PICK(gossamer::isa(), activate);
  }
  bool run() const {
    run_(function_, one_, other_, x_.data(), y_.data(), int64_t(x_.size()));
    return true;
  }

 private:
  Array<const float, 1> x_;
  Array<float, 1> y_;
  float one_, other_;
  Function function_;
  void (*run_)(Function, float, float, const float*, float*, int64_t);
};

// Two arrays of the result's shape, each with steps of its own: zero where it is stretched.
class Binary {
 public:
  Binary(const std::string& name, Strided one, Strided other, nb::ndarray<float, nb::c_contig, nb::device::cpu> y)
      : one_(one), other_(other), y_(y) {
    static const char* const names[] = {"add", "sub", "mul", "div", "maximum", "minimum"};
    const auto* found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names)) throw std::invalid_argument("no function is called " + name);
    join_ = Join(found - names);
    need(one.ndim() == y.ndim() && other.ndim() == y.ndim());
    for (size_t i = 0; i < y.ndim(); i++) {
      need(one.shape(i) == y.shape(i) && other.shape(i) == y.shape(i));
      const Dim d{int64_t(y.shape(i)), one.stride(i), other.stride(i)};
      if (d.count == 1) continue;
      if (!dims_.empty() && dims_.back().one == d.count * d.one && dims_.back().other == d.count * d.other)
        dims_.back() = {dims_.back().count * d.count, d.one, d.other};
      else
        dims_.push_back(d);
    }
    if (dims_.empty()) dims_.push_back({1, 1, 1});
    const auto plain = [](int64_t step) { return step == 0 || step == 1; };
    if (!plain(dims_.back().one) || !plain(dims_.back().other)) dims_.push_back({1, 1, 1});
    run_ = GOSSAMER_PICK(gossamer::isa(), join_line);
  }
  bool run() const {
    if (y_.size()) lines(0, one_.data(), other_.data(), y_.data());
    return true;
  }

 private:
  struct Dim {
    int64_t count, one, other;
  };

  // The end of what was written.
  float* lines(size_t at, const float* a, const float* b, float* y) const {
    const Dim& d = dims_[at];
    if (at + 1 == dims_.size()) {
      run_(join_, a, d.one, b, d.other, y, d.count);
      return y + d.count;
    }
    for (int64_t i = 0; i < d.count; i++) y = lines(at + 1, a + i * d.one, b + i * d.other, y);
    return y;
  }

  Strided one_, other_;
  nb::ndarray<float, nb::c_contig, nb::device::cpu> y_;
  Join join_;
  std::vector<Dim> dims_;
  void (*run_)(Join, const float*, int64_t, const float*, int64_t, float*, int64_t);
};

class Mean {
 public:
  Mean(Array<const float, 2> x, Array<float, 1> y) : x_(x), y_(y) {
    need(x.shape(0) == y.shape(0) && x.shape(1));
    run_ = GOSSAMER_PICK(gossamer::isa(), row_sum);
  }
  bool run() const {
    const int64_t count = int64_t(x_.shape(1));
    const float factor = 1 / float(count);
    for (int64_t i = 0; i < int64_t(y_.size()); i++)
      y_.data()[i] = run_(x_.data() + i * count, count) * factor;
    return true;
  }

 private:
  Array<const float, 2> x_;
  Array<float, 1> y_;
  float (*run_)(const float*, int64_t);
};

// x W^T + bias. A row of the weight serves all of x before the next is read.
class Linear {
 public:
  Linear(Array<const float, 2> x, Array<const float, 2> weight,
         Array<const float, 1> bias, Array<float, 2> y)
      : x_(x), weight_(weight), y_(y), bias_(bias) {
    need(x.shape(1) == weight.shape(1) && x.shape(0) == y.shape(0) && weight.shape(0) == y.shape(1) &&
         (!bias.size() || bias.size() == y.shape(1)));
    run_ = GOSSAMER_PICK(gossamer::isa(), product_of);
  }
  bool run() const {
    const int64_t rows = int64_t(y_.shape(0)), outputs = int64_t(y_.shape(1));
    const int64_t inputs = int64_t(x_.shape(1));
    for (int64_t m = 0; m < outputs; m++)
      for (int64_t n = 0; n < rows; n++)
        y_.data()[n * outputs + m] =
            run_(x_.data() + n * inputs, weight_.data() + m * inputs, inputs) +
            (bias_.size() ? bias_.data()[m] : 0.0f);
    return true;
  }

 private:
  Array<const float, 2> x_, weight_;
  Array<float, 2> y_;
  Array<const float, 1> bias_;
  float (*run_)(const float*, const float*, int64_t);
};

class LayerNorm {
 public:
  LayerNorm(Array<const float, 2> x, Array<const float, 1> scale, Array<const float, 1> shift,
            float eps, Array<float, 2> y)
      : x_(x), scale_(scale), shift_(shift), y_(y), eps_(eps) {
    need(x.shape(0) == y.shape(0) && x.shape(1) == y.shape(1) && x.shape(1) &&
         (!scale.size() || scale.size() == x.shape(1)) && (!shift.size() || shift.size() == x.shape(1)));
    run_ = GOSSAMER_PICK(gossamer::isa(), normalize);
  }
  bool run() const {
    const int64_t count = int64_t(x_.shape(1));
    for (int64_t i = 0; i < int64_t(x_.shape(0)); i++)
      run_(x_.data() + i * count, scale_.size() ? scale_.data() : nullptr,
           shift_.size() ? shift_.data() : nullptr, eps_, y_.data() + i * count, count);
    return true;
  }

 private:
  Array<const float, 2> x_;
  Array<const float, 1> scale_, shift_;
  Array<float, 2> y_;
  float eps_;
  void (*run_)(const float*, const float*, const float*, float, float*, int64_t);
};

class Softmax {
 public:
  Softmax(Array<const float, 2> x, Array<float, 2> y) : x_(x), y_(y) {
    need(x.shape(0) == y.shape(0) && x.shape(1) == y.shape(1) && x.shape(1));
    run_ = GOSSAMER_PICK(gossamer::isa(), softmax);
  }
  bool run() const {
    const int64_t count = int64_t(x_.shape(1));
    for (int64_t i = 0; i < int64_t(x_.shape(0)); i++) run_(x_.data() + i * count, y_.data() + i * count, count);
    return true;
  }

 private:
  Array<const float, 2> x_;
  Array<float, 2> y_;
  void (*run_)(const float*, float*, int64_t);
};

// Products of as many pairs of matrices: (b, m, k) (b, k, n).
class Products {
 public:
  Products(Array<const float, 3> x, Array<const float, 3> y, Array<float, 3> out)
      : x_(x), y_(y), out_(out) {
    need(x.shape(0) == y.shape(0) && x.shape(0) == out.shape(0) && x.shape(1) == out.shape(1) &&
         x.shape(2) == y.shape(1) && y.shape(2) == out.shape(2));
    run_ = GOSSAMER_PICK(gossamer::isa(), row_times);
  }
  bool run() const {
    const int64_t m = int64_t(x_.shape(1)), k = int64_t(x_.shape(2)), n = int64_t(y_.shape(2));
    for (int64_t b = 0; b < int64_t(x_.shape(0)); b++)
      for (int64_t i = 0; i < m; i++)
        run_(x_.data() + (b * m + i) * k, y_.data() + b * k * n, k, n, out_.data() + (b * m + i) * n);
    return true;
  }

 private:
  Array<const float, 3> x_, y_;
  Array<float, 3> out_;
  void (*run_)(const float*, const float*, int64_t, int64_t, float*);
};

// The greatest, or the sum times a factor, of each window of (planes, h, w); outside is nothing.
class Pool {
 public:
  Pool(bool greatest, const std::vector<int64_t>& sizes, float factor, Array<const float, 3> x,
       Array<float, 3> y)
      : x_(x), y_(y), greatest_(greatest), factor_(factor) {
    if (sizes.size() != 8) throw std::invalid_argument("sizes has the wrong length");
    for (size_t i = 0; i < 8; i++)
      if (sizes[i] < (i == 4 || i == 5 ? 0 : 1) || sizes[i] > 1 << 20)
        throw std::invalid_argument("a size is out of range");
    need(x.shape(0) == y.shape(0));
    kh_ = sizes[0], kw_ = sizes[1], sy_ = sizes[2], sx_ = sizes[3], top_ = sizes[4], left_ = sizes[5];
    dy_ = sizes[6], dx_ = sizes[7];
    run_ = GOSSAMER_PICK(gossamer::isa(), pool_line);
  }
  bool run() const {
    const int64_t h = int64_t(x_.shape(1)), w = int64_t(x_.shape(2));
    const int64_t oh = int64_t(y_.shape(1)), ow = int64_t(y_.shape(2));
    // Places o with 0 <= o * s - before + at < size.
    const auto range = [](int64_t size, int64_t s, int64_t offset, int64_t places) {
      const int64_t lo = offset >= 0 ? 0 : (-offset + s - 1) / s;
      const int64_t hi = size <= offset ? 0 : (size - offset + s - 1) / s;
      return std::pair<int64_t, int64_t>(lo, std::min(hi, places));
    };
    for (int64_t p = 0; p < int64_t(x_.shape(0)); p++) {
      const float* map = x_.data() + p * h * w;
      float* out = y_.data() + p * oh * ow;
      std::fill_n(out, oh * ow, greatest_ ? -std::numeric_limits<float>::infinity() : 0.0f);
      for (int64_t ky = 0; ky < kh_; ky++) {
        const int64_t down = ky * dy_ - top_;
        const auto [y0, y1] = range(h, sy_, down, oh);
        for (int64_t kx = 0; kx < kw_; kx++) {
          const int64_t across = kx * dx_ - left_;
          const auto [x0, x1] = range(w, sx_, across, ow);
          for (int64_t y = y0; y < y1; y++)
            run_(greatest_, map + (y * sy_ + down) * w + across, sx_, x0, x1, out + y * ow);
        }
      }
      if (!greatest_)
        for (int64_t i = 0; i < oh * ow; i++) out[i] *= factor_;
    }
    return true;
  }

 private:
  Array<const float, 3> x_;
  Array<float, 3> y_;
  bool greatest_;
  float factor_;
  int64_t kh_, kw_, sy_, sx_, top_, left_, dy_, dx_;
  void (*run_)(bool, const float*, int64_t, int64_t, int64_t, float*);
};

// Rows of a table; an index beyond it is refused.
class Embedding {
 public:
  Embedding(Array<const float, 2> table, Array<const int64_t, 1> indexes, Array<float, 2> y)
      : table_(table), indexes_(indexes), y_(y) {
    need(indexes.size() == y.shape(0) && table.shape(1) == y.shape(1));
  }
  bool run() const {
    const int64_t rows = int64_t(table_.shape(0)), size = int64_t(table_.shape(1));
    for (size_t i = 0; i < indexes_.size(); i++)
      if (indexes_.data()[i] < 0 || indexes_.data()[i] >= rows) return false;
    for (size_t i = 0; i < indexes_.size(); i++)
      std::copy_n(table_.data() + indexes_.data()[i] * size, size, y_.data() + int64_t(i) * size);
    return true;
  }

 private:
  Array<const float, 2> table_;
  Array<const int64_t, 1> indexes_;
  Array<float, 2> y_;
};

}  // namespace

NB_MODULE(floats, m) {
  m.doc() = "Small operators on float32.";
  auto unary = nb::class_<Unary>(m, "Unary", "A function of every value; x and y may be one array.")
                   .def(nb::init<const std::string&, float, float, Array<const float, 1>, Array<float, 1>>(),
                        nb::arg("function"), nb::arg("one"), nb::arg("other"), nb::arg("x"), nb::arg("y"));
  auto binary =
      nb::class_<Binary>(m, "Binary", "Two arrays of the result's shape, which may have steps of zero.")
          .def(nb::init<const std::string&, Strided, Strided, nb::ndarray<float, nb::c_contig, nb::device::cpu>>(),
               nb::arg("function"), nb::arg("one"), nb::arg("other"), nb::arg("y"));
  auto mean = nb::class_<Mean>(m, "Mean", "The mean of each row.")
                  .def(nb::init<Array<const float, 2>, Array<float, 1>>(), nb::arg("x"), nb::arg("y"));
  auto linear = nb::class_<Linear>(m, "Linear", "x W^T + bias, which may be empty.")
                    .def(nb::init<Array<const float, 2>, Array<const float, 2>,
                                  Array<const float, 1>, Array<float, 2>>(),
                         nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("y"));
  auto norm = nb::class_<LayerNorm>(m, "LayerNorm", "Rows normalized, then scaled and shifted unless these are empty.")
                  .def(nb::init<Array<const float, 2>, Array<const float, 1>, Array<const float, 1>,
                                float, Array<float, 2>>(),
                       nb::arg("x"), nb::arg("scale"), nb::arg("shift"), nb::arg("eps"), nb::arg("y"));
  auto soft = nb::class_<Softmax>(m, "Softmax", "Of each row.")
                  .def(nb::init<Array<const float, 2>, Array<float, 2>>(), nb::arg("x"), nb::arg("y"));
  auto products = nb::class_<Products>(m, "Products", "Products of as many pairs of matrices.")
                      .def(nb::init<Array<const float, 3>, Array<const float, 3>, Array<float, 3>>(),
                           nb::arg("x"), nb::arg("y"), nb::arg("out"));
  auto embedding =
      nb::class_<Embedding>(m, "Embedding", "Rows of a table; False for an index beyond it.")
          .def(nb::init<Array<const float, 2>, Array<const int64_t, 1>, Array<float, 2>>(),
               nb::arg("table"), nb::arg("indexes"), nb::arg("y"));
  auto pool =
      nb::class_<Pool>(m, "Pool",
                       "The greatest, or the sum times a factor, of each window of (planes, height, "
                       "width). Sizes: kernel, stride, top and left padding, dilation, two each.")
          .def(nb::init<bool, const std::vector<int64_t>&, float, Array<const float, 3>, Array<float, 3>>(),
               nb::arg("greatest"), nb::arg("sizes"), nb::arg("factor"), nb::arg("x"), nb::arg("y"));
  gossamer::define_step(pool);
  gossamer::define_step(unary);
  gossamer::define_step(binary);
  gossamer::define_step(mean);
  gossamer::define_step(linear);
  gossamer::define_step(norm);
  gossamer::define_step(soft);
  gossamer::define_step(products);
  gossamer::define_step(embedding);
}
