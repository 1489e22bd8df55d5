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
#include <tuple>

#include "sparse_gemv.h"
#include "step.h"

#define GOSSAMER_BODY "sparse_gemv_body.h"
#include "each_isa.h"
#include "sparse_gemv_run.h"

namespace nb = nanobind;

namespace {

using gossamer::GemvEnd;
using gossamer::SparseGemv;

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// Bytes by permutes: checked once, run as often as wanted. The arrays stay as they are.
class Bytes {
 public:
  Bytes(int64_t width, Array<const int32_t, 1> starts, Array<const uint8_t, 1> data,
        std::optional<Array<const int8_t, 1>> book, Array<const int32_t, 1> order,
        Array<const uint8_t, 2> codes, Array<const float, 1> sample_scale,
        Array<const int32_t, 1> sample_zero, Array<const float, 1> scale,
        Array<const int32_t, 1> row_sums, std::optional<Array<const float, 1>> bias, float low,
        float high, Array<float, 2> out, size_t threads)
      : kept_(starts, data, book, order, codes, sample_scale, sample_zero, scale, row_sums, bias, out),
        threads_(threads) {
    if (width != 32 && width != 64 && width != 128)
      throw std::invalid_argument("width is not 32, 64 or 128");
    const int64_t samples = int64_t(codes.shape(0)), padded = int64_t(order.size());
    const int64_t columns = int64_t(codes.shape(1));
    rows_ = int64_t(scale.size());
    gemv_ = {width, columns / width, padded / 16, starts.data(), data.data(),
             book ? book->data() : nullptr};
    if (columns % width || padded % 16 || padded < rows_ || int64_t(out.shape(0)) != samples ||
        int64_t(out.shape(1)) != rows_ || int64_t(row_sums.size()) != rows_ ||
        (bias && int64_t(bias->size()) != rows_) || int64_t(sample_scale.size()) != samples ||
        int64_t(sample_zero.size()) != samples || (book && book->size() != 16))
      throw std::invalid_argument("an array has another length than the sizes say");
    gossamer::check_bytes(gemv_, starts.size(), data.size(), order.data(), padded, rows_);
    order_ = order.data(), out_ = out.data();
    given_ = {samples, codes.data(), sample_scale.data(), sample_zero.data()};
    end_ = {scale.data(), bias ? bias->data() : nullptr, row_sums.data(), low, high};
  }

  bool run() const {
    gossamer::run_bytes(gemv_, order_, rows_, given_, end_, out_, threads_);
    return true;
  }

 private:
  std::tuple<Array<const int32_t, 1>, Array<const uint8_t, 1>, std::optional<Array<const int8_t, 1>>,
             Array<const int32_t, 1>, Array<const uint8_t, 2>, Array<const float, 1>,
             Array<const int32_t, 1>, Array<const float, 1>, Array<const int32_t, 1>,
             std::optional<Array<const float, 1>>, Array<float, 2>>
      kept_;
  SparseGemv gemv_{};
  gossamer::Samples given_{};
  GemvEnd end_{};
  const int32_t* order_ = nullptr;
  float* out_ = nullptr;
  int64_t rows_ = 0;
  size_t threads_;
};

// Compressed rows of float32 times one vector: checked once, run as often as wanted.
class Rows {
 public:
  Rows(Array<const int32_t, 1> starts, Array<const uint16_t, 1> columns,
       Array<const float, 1> values, Array<const float, 1> x,
       std::optional<Array<const float, 1>> bias, float low, float high, Array<float, 1> out,
       size_t threads)
      : starts_(starts), columns_(columns), values_(values), x_(x), bias_(bias), out_(out), low_(low),
        high_(high), threads_(threads) {
    const int64_t rows = int64_t(out.size());
    if (int64_t(starts.size()) != rows + 1 || columns.size() != values.size() ||
        (bias && int64_t(bias->size()) != rows))
      throw std::invalid_argument("an array has another length than the sizes say");
    gossamer::check_rows(starts.data(), rows, columns.data(), columns.size(), x.size());
  }

  bool run() const {
    gossamer::run_rows(starts_.data(), int64_t(out_.size()), columns_.data(), values_.data(), x_.data(),
                       bias_ ? bias_->data() : nullptr, low_, high_, out_.data(), threads_);
    return true;
  }

 private:
  Array<const int32_t, 1> starts_;
  Array<const uint16_t, 1> columns_;
  Array<const float, 1> values_, x_;
  std::optional<Array<const float, 1>> bias_;
  Array<float, 1> out_;
  float low_, high_;
  size_t threads_;
};

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
  auto bytes =
      nb::class_<Bytes>(m, "Bytes", "Bytes by permutes; `out` (samples, rows) is written.")
          .def(nb::init<int64_t, Array<const int32_t, 1>, Array<const uint8_t, 1>,
                        std::optional<Array<const int8_t, 1>>, Array<const int32_t, 1>,
                        Array<const uint8_t, 2>, Array<const float, 1>, Array<const int32_t, 1>,
                        Array<const float, 1>, Array<const int32_t, 1>,
                        std::optional<Array<const float, 1>>, float, float, Array<float, 2>, size_t>(),
               nb::arg("width"), nb::arg("starts"), nb::arg("data"), nb::arg("book").none(),
               nb::arg("order"), nb::arg("codes"), nb::arg("sample_scale"), nb::arg("sample_zero"),
               nb::arg("scale"), nb::arg("row_sums"), nb::arg("bias").none(), nb::arg("low"),
               nb::arg("high"), nb::arg("out"), nb::arg("threads"));
  auto rows = nb::class_<Rows>(m, "Rows", "Compressed rows of float32 times one vector.")
                  .def(nb::init<Array<const int32_t, 1>, Array<const uint16_t, 1>,
                                Array<const float, 1>, Array<const float, 1>,
                                std::optional<Array<const float, 1>>, float, float, Array<float, 1>,
                                size_t>(),
                       nb::arg("starts"), nb::arg("columns"), nb::arg("values"), nb::arg("x"),
                       nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("out"),
                       nb::arg("threads"));
  gossamer::define_step(bytes);
  gossamer::define_step(rows);
  m.def("seven_bits", &seven_bits, nb::arg("x"), nb::arg("codes"), nb::arg("scale"),
        nb::arg("zero"), "Codes of seven bits for each row, from its extremes.");
}
