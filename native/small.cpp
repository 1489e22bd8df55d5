// What moves elements or looks at them, and chains of bound calls as one.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "step.h"

#define GOSSAMER_BODY "small_body.h"
#include "each_isa.h"

namespace nb = nanobind;

namespace {

using Any = nb::ndarray<nb::ro, nb::device::cpu>;
using Writable = nb::ndarray<nb::device::cpu>;
template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// Every element of an array that lies in one piece becomes the same.
class Fill {
 public:
  Fill(Writable to, nb::bytes element) : to_(to), size_(int64_t(to.itemsize())) {
    if (element.size() != to.itemsize() || size_ > 8)
      throw std::invalid_argument("the element has another size than the array's, or more than 8 bytes");
    for (size_t i = to.ndim(); i-- > 0; count_ *= int64_t(to.shape(i)))
      if (to.shape(i) > 1 && to.stride(i) != count_)
        throw std::invalid_argument("what is filled must lie in one piece");
    std::memcpy(element_, element.c_str(), size_t(size_));
    same_ = std::all_of(element_, element_ + size_, [this](char c) { return c == element_[0]; });
  }

  bool run() const {
    char* to = static_cast<char*>(to_.data());
    if (same_)
      std::memset(to, element_[0], size_t(count_ * size_));
    else
      for (int64_t i = 0; i < count_; i++) std::memcpy(to + i * size_, element_, size_t(size_));
    return true;
  }

 private:
  Writable to_;
  int64_t size_, count_ = 1;
  char element_[8] = {};
  bool same_ = false;
};

// Elements of one array to the places of another of the same shape, whatever their strides.
class Copy {
 public:
  Copy(Any from, Writable to) : from_(from), to_(to), size_(int64_t(from.itemsize())) {
    if (from.ndim() != to.ndim() || to.itemsize() != from.itemsize())
      throw std::invalid_argument("the arrays differ in dimensions or in their elements");
    if (size_ != 1 && size_ != 2 && size_ != 4 && size_ != 8)
      throw std::invalid_argument("elements have 1, 2, 4 or 8 bytes");
    for (size_t i = 0; i < from.ndim(); i++) {
      if (from.shape(i) != to.shape(i)) throw std::invalid_argument("the arrays differ in shape");
      add({int64_t(from.shape(i)), from.stride(i) * size_, to.stride(i) * size_});
    }
    if (dims_.empty()) dims_.push_back({1, size_, size_});
  }

  bool run() const {
    copy(0, static_cast<const char*>(from_.data()), static_cast<char*>(to_.data()));
    return true;
  }

 private:
  struct Dim {
    int64_t count, from, to;  // steps in bytes
  };

  // A dimension within the last; joined with it where both arrays run on.
  void add(Dim d) {
    if (d.count == 1) return;
    if (!dims_.empty() && dims_.back().from == d.count * d.from && dims_.back().to == d.count * d.to)
      dims_.back() = {dims_.back().count * d.count, d.from, d.to};
    else
      dims_.push_back(d);
  }

  template <typename T>
  static void line(const Dim& d, const char* from, char* to) {
    for (int64_t i = 0; i < d.count; i++) {
      T value;
      std::memcpy(&value, from + i * d.from, sizeof value);
      std::memcpy(to + i * d.to, &value, sizeof value);
    }
  }

  void copy(size_t at, const char* from, char* to) const {
    const Dim& d = dims_[at];
    if (at + 1 < dims_.size()) {
      for (int64_t i = 0; i < d.count; i++) copy(at + 1, from + i * d.from, to + i * d.to);
    } else if (d.from == size_ && d.to == size_) {
      std::memcpy(to, from, size_t(d.count * size_));
    } else if (size_ == 1) {
      line<uint8_t>(d, from, to);
    } else if (size_ == 2) {
      line<uint16_t>(d, from, to);
    } else if (size_ == 4) {
      line<uint32_t>(d, from, to);
    } else {
      line<uint64_t>(d, from, to);
    }
  }

  Any from_;
  Writable to_;
  int64_t size_;
  std::vector<Dim> dims_;
};

// Floats that are whole numbers, nearly, of 0 to 255: as bytes, halves to the even one.
class Round {
 public:
  Round(Array<const float, 1> x, Array<uint8_t, 1> y) : x_(x), y_(y) {
    if (x.size() != y.size()) throw std::invalid_argument("floats and bytes differ in number");
  }
  bool run() const {
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: beyond it floats have no fraction
    const float* x = x_.data();
    uint8_t* y = y_.data();
    for (size_t i = 0; i < x_.size(); i++) y[i] = uint8_t(int32_t(x[i] + kWhole - kWhole));
    return true;
  }

 private:
  Array<const float, 1> x_;
  Array<uint8_t, 1> y_;
};

// Bound calls of compiled modules, one after the other, without Python between them.
class Chain {
 public:
  explicit Chain(const nb::list& calls) {
    for (nb::handle call : calls) {
      nb::object held = nb::borrow(call);
      const nb::capsule step = nb::cast<nb::capsule>(held.attr("step"));
      if (!step.name() || std::strcmp(step.name(), gossamer::kStep))
        throw std::invalid_argument("a call has another kind of step");
      steps_.push_back(*static_cast<const gossamer::Step*>(step.data()));
      kept_.push_back(std::move(held));
    }
  }

  // False where a call refuses its input; those behind it do not run.
  bool run() const {
    for (const auto& step : steps_)
      if (!step.run(step.self)) return false;
    return true;
  }

 private:
  std::vector<gossamer::Step> steps_;
  std::vector<nb::object> kept_;
};

bool is_finite(nb::ndarray<const float, nb::c_contig, nb::device::cpu> x) {
  nb::gil_scoped_release release;
  return GOSSAMER_PICK(gossamer::isa(), all_finite)(x.data(), int64_t(x.size()));
}

}  // namespace

NB_MODULE(small, m) {
  m.doc() = "Elements moved, and chains of bound calls.";
  auto fill = nb::class_<Fill>(m, "Fill", "Every element becomes the same, given as its bytes.")
                  .def(nb::init<Writable, nb::bytes>(), nb::arg("to"), nb::arg("element"));
  auto copy = nb::class_<Copy>(m, "Copy", "Elements of one array to the places of another.")
                  .def(nb::init<Any, Writable>(), nb::arg("source"), nb::arg("to"));
  auto round = nb::class_<Round>(m, "Round", "Floats of 0 to 255 to the nearest bytes.")
                   .def(nb::init<Array<const float, 1>, Array<uint8_t, 1>>(), nb::arg("x"), nb::arg("y"));
  auto chain = nb::class_<Chain>(m, "Chain", "Bound calls as one.")
                   .def(nb::init<const nb::list&>(), nb::arg("calls"));
  m.def("finite", &is_finite, nb::arg("x"), "Whether no entry is NaN or infinite.");
  gossamer::define_step(fill);
  gossamer::define_step(copy);
  gossamer::define_step(round);
  gossamer::define_step(chain);
}
