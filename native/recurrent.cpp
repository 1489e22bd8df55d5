// What follows the products of a recurrent step: gates, the cell, the new state (recurrent_body.h).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#define GOSSAMER_BODY "recurrent_body.h"
#include "each_isa.h"

namespace nb = nanobind;

namespace {

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// How many units; throws where an array is not that of step t of (steps, batch, gates * units).
int64_t units(const Array<const float, 3>& x, int64_t t, int64_t gates,
              const Array<const float, 2>& g, const Array<float, 2>& h, const Array<float, 3>& y) {
  const int64_t batch = int64_t(x.shape(1)), size = int64_t(h.shape(1));
  if (t < 0 || t >= int64_t(x.shape(0)) || t >= int64_t(y.shape(0)) ||
      int64_t(x.shape(2)) != gates * size || int64_t(g.shape(0)) != batch ||
      g.shape(1) != x.shape(2) || int64_t(h.shape(0)) != batch ||
      int64_t(y.shape(1)) != batch || int64_t(y.shape(2)) != size)
    throw std::invalid_argument("an array has another shape than the step's");
  return size;
}

void lstm(Array<const float, 3> x, int64_t t, Array<const float, 2> g, Array<float, 2> c,
          Array<float, 2> h, Array<float, 3> y) {
  const int64_t size = units(x, t, 4, g, h, y), batch = int64_t(h.shape(0));
  if (c.shape(0) != h.shape(0) || c.shape(1) != h.shape(1))
    throw std::invalid_argument("an array has another shape than the step's");
  const float* from = x.data() + t * batch * 4 * size;
  float* to = y.data() + t * batch * size;
  nb::gil_scoped_release release;
  const auto one = GOSSAMER_PICK(gossamer::isa(), lstm);
  for (int64_t n = 0; n < batch; n++)
    one(from + n * 4 * size, g.data() + n * 4 * size, size, c.data() + n * size,
        h.data() + n * size, to + n * size);
}

void gru(Array<const float, 3> x, int64_t t, Array<const float, 2> g,
         std::optional<Array<const float, 1>> bias, Array<float, 2> h, Array<float, 3> y) {
  const int64_t size = units(x, t, 3, g, h, y), batch = int64_t(h.shape(0));
  if (bias && int64_t(bias->size()) != size)
    throw std::invalid_argument("an array has another shape than the step's");
  const float* from = x.data() + t * batch * 3 * size;
  float* to = y.data() + t * batch * size;
  nb::gil_scoped_release release;
  const auto one = GOSSAMER_PICK(gossamer::isa(), gru);
  for (int64_t n = 0; n < batch; n++)
    one(from + n * 3 * size, g.data() + n * 3 * size, bias ? bias->data() : nullptr, size,
        h.data() + n * size, to + n * size);
}

}  // namespace

NB_MODULE(recurrent, m) {
  m.doc() = "Gates of recurrent steps: x holds the inputs' part of all steps, g the state's of one.";
  m.def("lstm", &lstm, nb::arg("x"), nb::arg("t"), nb::arg("g"), nb::arg("c"), nb::arg("h"),
        nb::arg("y"), "Gates i, f, g, o; c and h are replaced, h is written to y[t] as well.");
  m.def("gru", &gru, nb::arg("x"), nb::arg("t"), nb::arg("g"), nb::arg("bias").none(),
        nb::arg("h"), nb::arg("y"), "Gates r, z, n; h is replaced and written to y[t] as well.");
}
