// Direct sparse convolution: float32, and 8-bit activations in quads of four channels.
//
// The map is cut into register tiles of up to 14 vectors; rows of a narrow map share a vector, so that
// 7 x 7 takes 4 vectors of 16 lanes and not 7. For a block of input channels that fits the
// first-level cache, the tile's input is copied once for each kernel column, shifted, so that every
// weight ("tap") is one broadcast and 14 aligned multiply-adds, wherever it lies. Stride, padding and
// dilation are dealt with where the copies are made. Sums of a tile stay in a scratch of bounded size
// between blocks; bias, residual, clamp and requantization are applied as they leave it.
// Results do not depend on the number of threads, nor those of integers on the instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <vector>

#include "sparse_conv.h"
#include "step.h"

#define GOSSAMER_BODY "sparse_conv_body.h"
#include "each_isa.h"
#include "sparse_conv_run.h"

namespace nb = nanobind;

namespace {

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// A convolution on these arrays, which it keeps alive: checked once, run as often as wanted.
class Convolution {
 public:
  Convolution(const std::vector<int64_t>& sizes, Array<const int32_t, 1> starts,
              Array<const int32_t, 1> order, Array<const uint16_t, 1> taps,
              Array<const uint32_t, 1> values, Array<const uint32_t, 1> input, uint32_t fill,
              std::optional<Array<const float, 1>> scale, std::optional<Array<const float, 1>> bias,
              std::optional<Array<const uint32_t, 1>> residual, float residual_scale, float low,
              float high, bool quads_out, Array<uint32_t, 1> out, size_t threads)
      : kept_(starts, order, taps, values, input, scale, bias, residual, out), threads_(threads) {
    if (sizes.size() != sizeof(gossamer::ConvSizes) / 8)
      throw std::invalid_argument("sizes has the wrong length");
    gossamer::ConvSizes s;
    std::memcpy(&s, sizes.data(), sizeof s);
    gossamer::SparseConv c = gossamer::conv_of(s, quads_out);
    c.starts = starts.data(), c.order = order.data(), c.taps = taps.data(), c.values = values.data();
    c.input = input.data(), c.fill = fill;
    const size_t all = size_t(c.groups * c.rows), results = gossamer::conv_results(c);
    if (input.size() != gossamer::conv_input(c) || out.size() != results ||
        (residual && residual->size() != results) || (scale && scale->size() != all) ||
        (bias && bias->size() != all))
      throw std::invalid_argument("an array has another length than the sizes say");
    c.scale = scale ? scale->data() : nullptr;
    c.bias = bias ? bias->data() : nullptr;
    c.residual = residual ? residual->data() : nullptr;
    c.residual_scale = residual_scale, c.low = low, c.high = high;
    c.out = out.data();
    nb::gil_scoped_release release;
    gossamer::check_conv(c, starts.size(), order.size(), taps.size(), values.size());
    run_.emplace(c);
  }

  bool run() const {
    (*run_)(threads_);
    return true;
  }

 private:
  std::tuple<Array<const int32_t, 1>, Array<const int32_t, 1>, Array<const uint16_t, 1>,
             Array<const uint32_t, 1>, Array<const uint32_t, 1>, std::optional<Array<const float, 1>>,
             std::optional<Array<const float, 1>>, std::optional<Array<const uint32_t, 1>>,
             Array<uint32_t, 1>>
      kept_;
  std::optional<gossamer::ConvRun> run_;
  size_t threads_;
};

}  // namespace

NB_MODULE(sparse_conv, m) {
  m.doc() = "Direct sparse convolution.";
  m.def(
      "dot_products", [] { return gossamer::dot_products(); },
      "Whether four products of bytes and their sum are one instruction here.");
  m.def(
      "tile",
      [](int64_t rows, int64_t kh, int64_t kw, int64_t oh, int64_t ow, int64_t sy, int64_t dy) {
        for (int64_t v : {rows, kh, kw, oh, ow, sy, dy})
          if (v < 1 || v >= int64_t(1) << 31) throw std::invalid_argument("a size is not in [1, 2^31)");
        gossamer::SparseConv c{};
        c.rows = rows, c.kh = kh, c.kw = kw, c.oh = oh, c.ow = ow, c.sy = sy, c.dy = dy;
        const auto [vectors, bytes] = gossamer::conv_tile(c);
        return nb::make_tuple(vectors, bytes);
      },
      nb::arg("rows"), nb::arg("kh"), nb::arg("kw"), nb::arg("oh"), nb::arg("ow"), nb::arg("sy"),
      nb::arg("dy"), "Vectors of a register tile, and bytes of the copies that it reads of one plane.");
  auto convolution =
      nb::class_<Convolution>(m, "Convolution", "A convolution of these arrays, checked and laid out once.")
      .def(nb::init<const std::vector<int64_t>&, Array<const int32_t, 1>, Array<const int32_t, 1>,
                    Array<const uint16_t, 1>, Array<const uint32_t, 1>, Array<const uint32_t, 1>,
                    uint32_t, std::optional<Array<const float, 1>>, std::optional<Array<const float, 1>>,
                    std::optional<Array<const uint32_t, 1>>, float, float, float, bool,
                    Array<uint32_t, 1>, size_t>(),
           nb::arg("sizes"), nb::arg("starts"), nb::arg("order"), nb::arg("taps"), nb::arg("values"),
           nb::arg("input"), nb::arg("fill"), nb::arg("scale").none(), nb::arg("bias").none(),
           nb::arg("residual").none(), nb::arg("residual_scale"), nb::arg("low"), nb::arg("high"),
           nb::arg("quads_out"), nb::arg("out"), nb::arg("threads"),
           "Sizes and layouts: native/sparse_conv.h. The weights must stay as they are.");
  gossamer::define_step(convolution);
}
