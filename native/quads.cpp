// Codes of seven bits, four channels to a word: quantized, dequantized, pooled.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <vector>

#include "quads.h"

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

bool quantize(Array<const float, 3> x, float factor, float shift, Array<uint32_t, 1> out, size_t threads) {
  check_quads(x, out.size());
  nb::gil_scoped_release release;
  return gossamer::quantize_quads(x.data(), int64_t(x.shape(0)), int64_t(x.shape(1)),
                                  int64_t(x.shape(2)), factor, shift, out.data(), threads);
}

void dequantize(Array<const uint32_t, 1> x, float factor, float shift, Array<float, 3> out, size_t threads) {
  check_quads(out, x.size());
  nb::gil_scoped_release release;
  gossamer::dequantize_quads(x.data(), int64_t(out.shape(0)), int64_t(out.shape(1)),
                             int64_t(out.shape(2)), factor, shift, out.data(), threads);
}

void max_pool(const std::vector<int64_t>& sizes, Array<const uint32_t, 3> x, Array<uint32_t, 3> out,
              size_t threads) {
  if (sizes.size() != 8) throw std::invalid_argument("sizes has the wrong length");
  const auto at = [](const auto& a, size_t i) { return int64_t(a.shape(i)); };
  const gossamer::QuadPool p{at(x, 1), at(x, 2), at(out, 1), at(out, 2), sizes[0], sizes[1],
                             sizes[2], sizes[3], sizes[4],   sizes[5],   sizes[6], sizes[7]};
  gossamer::check_pool(p);
  if (x.shape(0) != out.shape(0)) throw std::invalid_argument("input and output differ in planes");
  nb::gil_scoped_release release;
  gossamer::max_pool_quads(p, at(x, 0), x.data(), out.data(), threads);
}

}  // namespace

NB_MODULE(quads, m) {
  m.doc() = "Codes of seven bits, four channels to a word.";
  m.def("quantize", &quantize, nb::arg("x"), nb::arg("factor"), nb::arg("shift"), nb::arg("out"),
        nb::arg("threads"),
        "Floats (images, channels, size) to codes in fours; False where one is NaN or infinite.");
  m.def("dequantize", &dequantize, nb::arg("x"), nb::arg("factor"), nb::arg("shift"), nb::arg("out"),
        nb::arg("threads"), "Codes in fours to floats (images, channels, size).");
  m.def("max_pool", &max_pool, nb::arg("sizes"), nb::arg("x"), nb::arg("out"), nb::arg("threads"),
        "The greatest code of each window of (planes, height, width) words; outside is zero. Sizes: "
        "kernel, stride, top and left padding, dilation, two each.");
}
