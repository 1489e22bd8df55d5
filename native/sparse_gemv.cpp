// Sparse matrix times vector: float32 in compressed rows, and bytes by permutes.
//
// Bytes: 16 rows lie side by side in the 32-bit lanes, and in each lane four weights of one row with
// the indexes of their columns in a block of 32, 64 or 128. The block's activations stay in registers:
// one permute picks the 64 that a step needs. Rows are ordered by their number of weights, so that the
// 16 of a group fill up to nearly the same length. Optionally the weights are 4-bit codes of a book.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "sparse_gemv.h"

#define GOSSAMER_BODY "sparse_gemv_body.h"
#include "each_isa.h"
#include "sparse_gemv_run.h"

namespace nb = nanobind;

namespace {

using gossamer::GemvEnd;
using gossamer::SparseGemv;

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void run(int64_t width, Array<const int32_t, 1> starts, Array<const uint8_t, 1> data,
         std::optional<Array<const int8_t, 1>> book, Array<const int32_t, 1> order,
         Array<const uint8_t, 2> codes, Array<const float, 1> sample_scale,
         Array<const int32_t, 1> sample_zero, Array<const float, 1> scale,
         Array<const int32_t, 1> row_sums, std::optional<Array<const float, 1>> bias, float low,
         float high, Array<float, 2> out, size_t threads) {
  if (width != 32 && width != 64 && width != 128) throw std::invalid_argument("width is not 32, 64 or 128");
  const int64_t samples = int64_t(codes.shape(0)), rows = int64_t(scale.size());
  const int64_t padded = int64_t(order.size()), columns = int64_t(codes.shape(1));
  SparseGemv g{width, columns / width, padded / 16, starts.data(), data.data(),
               book ? book->data() : nullptr};
  if (columns % width || padded % 16 || padded < rows || int64_t(out.shape(0)) != samples ||
      int64_t(out.shape(1)) != rows || int64_t(row_sums.size()) != rows ||
      (bias && int64_t(bias->size()) != rows) || int64_t(sample_scale.size()) != samples ||
      int64_t(sample_zero.size()) != samples || (book && book->size() != 16))
    throw std::invalid_argument("an array has another length than the sizes say");
  gossamer::check_bytes(g, starts.size(), data.size(), order.data(), padded, rows);
  const GemvEnd end{scale.data(), bias ? bias->data() : nullptr, row_sums.data(), low, high};
  nb::gil_scoped_release release;
  gossamer::run_bytes(g, order.data(), rows,
                      {samples, codes.data(), sample_scale.data(), sample_zero.data()}, end,
                      out.data(), threads);
}

void run_float(Array<const int32_t, 1> starts, Array<const uint16_t, 1> columns,
               Array<const float, 1> values, Array<const float, 1> x,
               std::optional<Array<const float, 1>> bias, float low, float high,
               Array<float, 1> out, size_t threads) {
  const int64_t rows = int64_t(out.size());
  if (int64_t(starts.size()) != rows + 1 || columns.size() != values.size() ||
      (bias && int64_t(bias->size()) != rows))
    throw std::invalid_argument("an array has another length than the sizes say");
  gossamer::check_rows(starts.data(), rows, columns.data(), columns.size(), x.size());
  nb::gil_scoped_release release;
  gossamer::run_rows(starts.data(), rows, columns.data(), values.data(), x.data(),
                     bias ? bias->data() : nullptr, low, high, out.data(), threads);
}

void seven_bits(Array<const float, 2> x, Array<uint8_t, 2> codes, Array<float, 1> scale,
                Array<int32_t, 1> zero) {
  const size_t n = x.shape(0), k = x.shape(1), wide = codes.shape(1);
  if (codes.shape(0) != n || wide < k || scale.size() != n || zero.size() != n)
    throw std::invalid_argument("an array has another length than x says");
  bool good = true;
  {
    nb::gil_scoped_release release;
    const auto one = GOSSAMER_PICK(gossamer::isa(), seven_bits);
    for (size_t i = 0; i < n; i++) {
      uint8_t* to = codes.data() + i * wide;
      good &= one(x.data() + i * k, int64_t(k), to, scale.data() + i, zero.data() + i);
      std::memset(to + k, 0, wide - k);
    }
  }
  if (!good) throw std::invalid_argument("x has entries that are NaN or infinite");
}

}  // namespace

NB_MODULE(sparse_gemv, m) {
  m.doc() = "Sparse matrix times vector.";
  m.def("run", &run, nb::arg("width"), nb::arg("starts"), nb::arg("data"), nb::arg("book").none(),
        nb::arg("order"), nb::arg("codes"), nb::arg("sample_scale"), nb::arg("sample_zero"),
        nb::arg("scale"), nb::arg("row_sums"), nb::arg("bias").none(), nb::arg("low"),
        nb::arg("high"), nb::arg("out"), nb::arg("threads"),
        "Bytes by permutes; `out` (samples, rows) is written.");
  m.def("run_float", &run_float, nb::arg("starts"), nb::arg("columns"), nb::arg("values"),
        nb::arg("x"), nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("out"),
        nb::arg("threads"), "Compressed rows of float32 times one vector.");
  m.def("seven_bits", &seven_bits, nb::arg("x"), nb::arg("codes"), nb::arg("scale"),
        nb::arg("zero"), "Codes of seven bits for each row, from its extremes.");
}
