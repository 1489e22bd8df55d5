// Codes of seven bits, four channels to a word: quantized, dequantized, pooled.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <vector>

#include "quads.h"
#include "step.h"

#define GOSSAMER_BODY "quads_body.h"
#include "each_isa.h"
#include "quads_run.h"

namespace nb = nanobind;

namespace {

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// Channels of codes that go with maps of floats.
template <class T>
void check_quads(const Array<T, 3>& floats, size_t codes) {
  if (codes != floats.shape(0) * ((floats.shape(1) + 3) / 4) * floats.shape(2))
    throw std::invalid_argument("codes and floats differ in size");
}

class Quantize {
 public:
  Quantize(Array<const float, 3> x, float factor, float shift, Array<uint32_t, 1> out, size_t threads)
      : x_(x), out_(out), factor_(factor), shift_(shift), threads_(threads) {
    check_quads(x, out.size());
  }
  bool run() const {
    return gossamer::quantize_quads(x_.data(), int64_t(x_.shape(0)), int64_t(x_.shape(1)),
                                    int64_t(x_.shape(2)), factor_, shift_, out_.data(), threads_);
  }

 private:
  Array<const float, 3> x_;
  Array<uint32_t, 1> out_;
  float factor_, shift_;
  size_t threads_;
};

class Dequantize {
 public:
  Dequantize(Array<const uint32_t, 1> x, float factor, float shift, Array<float, 3> out, size_t threads)
      : x_(x), out_(out), factor_(factor), shift_(shift), threads_(threads) {
    check_quads(out, x.size());
  }
  bool run() const {
    gossamer::dequantize_quads(x_.data(), int64_t(out_.shape(0)), int64_t(out_.shape(1)),
                               int64_t(out_.shape(2)), factor_, shift_, out_.data(), threads_);
    return true;
  }

 private:
  Array<const uint32_t, 1> x_;
  Array<float, 3> out_;
  float factor_, shift_;
  size_t threads_;
};

class MaxPool {
 public:
  MaxPool(const std::vector<int64_t>& sizes, Array<const uint32_t, 3> x, Array<uint32_t, 3> out,
          size_t threads)
      : x_(x), out_(out), threads_(threads) {
    if (sizes.size() != 8) throw std::invalid_argument("sizes has the wrong length");
    const auto at = [](const auto& a, size_t i) { return int64_t(a.shape(i)); };
    pool_ = {at(x, 1), at(x, 2), at(out, 1), at(out, 2), sizes[0], sizes[1],
             sizes[2], sizes[3], sizes[4],   sizes[5],   sizes[6], sizes[7]};
    gossamer::check_pool(pool_);
    if (x.shape(0) != out.shape(0)) throw std::invalid_argument("input and output differ in planes");
  }
  bool run() const {
    gossamer::max_pool_quads(pool_, int64_t(x_.shape(0)), x_.data(), out_.data(), threads_);
    return true;
  }

 private:
  Array<const uint32_t, 3> x_;
  Array<uint32_t, 3> out_;
  gossamer::QuadPool pool_{};
  size_t threads_;
};

}  // namespace

NB_MODULE(quads, m) {
  m.doc() = "Codes of seven bits, four channels to a word.";
  auto quantize =
      nb::class_<Quantize>(
          m, "Quantize",
          "Floats (images, channels, size) to codes in fours; False where one is NaN or infinite.")
          .def(nb::init<Array<const float, 3>, float, float, Array<uint32_t, 1>, size_t>(),
               nb::arg("x"), nb::arg("factor"), nb::arg("shift"), nb::arg("out"), nb::arg("threads"));
  auto dequantize =
      nb::class_<Dequantize>(m, "Dequantize", "Codes in fours to floats (images, channels, size).")
          .def(nb::init<Array<const uint32_t, 1>, float, float, Array<float, 3>, size_t>(),
               nb::arg("x"), nb::arg("factor"), nb::arg("shift"), nb::arg("out"), nb::arg("threads"));
  auto pool =
      nb::class_<MaxPool>(
          m, "MaxPool",
          "The greatest code of each window of (planes, height, width) words; outside is zero. "
          "Sizes: kernel, stride, top and left padding, dilation, two each.")
          .def(nb::init<const std::vector<int64_t>&, Array<const uint32_t, 3>, Array<uint32_t, 3>,
                        size_t>(),
               nb::arg("sizes"), nb::arg("x"), nb::arg("out"), nb::arg("threads"));
  gossamer::define_step(quantize);
  gossamer::define_step(dequantize);
  gossamer::define_step(pool);
}
