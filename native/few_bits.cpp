// Dense matrices of few bits times a small batch: 2-bit ternary codes, 4-bit codes of a book.
//
// Ternary codes are stored as weight + 1, so that they multiply signed bytes as unsigned ones; the
// sum of the activations is taken off at the end. Book codes look their signed bytes up and multiply
// activations of seven unsigned bits. Rows lie by fours, chunk after chunk, so that memory is read in
// order; the codes of 32 rows stay in cache for all samples.
//
// Rows with a book of their own hold 4 or 16 values each in 2 or 4 bits: looked up as floats for
// float32 activations, as signed bytes for those of seven bits.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "few_bits.h"
#include "gemv.h"
#include "parallel.h"
#include "step.h"

#define GOSSAMER_BODY "few_bits_body.h"
#include "each_isa.h"

namespace nb = nanobind;

namespace {

using gossamer::FewBits;
using gossamer::GemvEnd;

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kShare = 32;  // rows that a thread takes at a time

// x: bytes, (samples, chunks * 256 or 128). zero: of a sample, what row_sums are multiplied with.
class Coded {
 public:
  Coded(Array<const uint8_t, 1> codes, std::optional<Array<const int8_t, 1>> book,
        Array<const uint8_t, 2> x, Array<const float, 1> sample_scale,
        Array<const int32_t, 1> sample_zero, Array<const float, 1> scale,
        Array<const int32_t, 1> row_sums, std::optional<Array<const float, 1>> bias, float low,
        float high, Array<float, 2> out, size_t threads)
      : codes_(codes), row_sums_(row_sums), zero_(sample_zero), book_(book), x_(x), step_(sample_scale),
        scale_(scale), bias_(bias), out_(out), low_(low), high_(high), threads_(threads) {
    const int64_t rows = int64_t(scale.size()), samples = int64_t(x.shape(0));
    const int64_t columns = int64_t(x.shape(1)), chunk = book ? 128 : 256;
    chunks_ = columns / chunk;
    if (columns % chunk || int64_t(codes.size()) != (rows + 3) / 4 * 4 * chunks_ * 64 ||
        int64_t(row_sums.size()) != rows || (bias && int64_t(bias->size()) != rows) ||
        int64_t(sample_scale.size()) != samples || int64_t(sample_zero.size()) != samples ||
        int64_t(out.shape(0)) != samples || int64_t(out.shape(1)) != rows || (book && book->size() != 16))
      throw std::invalid_argument("an array has another length than the sizes say");
  }

  bool run() const {
    const int64_t rows = int64_t(scale_.size()), samples = int64_t(x_.shape(0));
    const int64_t columns = int64_t(x_.shape(1));
    const FewBits f{chunks_, codes_.data(), book_ ? book_->data() : nullptr};
    const GemvEnd end{scale_.data(), bias_ ? bias_->data() : nullptr, row_sums_.data(), low_, high_};
    const uint8_t* bytes = x_.data();
    const float* step = step_.data();
    const int32_t* zero = zero_.data();
    float* y = out_.data();
    const auto any_rows = GOSSAMER_PICK(gossamer::isa(), any_rows);
    gossamer::parallel(size_t((rows + kShare - 1) / kShare), threads_, [&](size_t, size_t item) {
      const int64_t from = int64_t(item) * kShare, to = std::min(from + kShare, rows);
      int32_t sums[kShare];
      for (int64_t n = 0; n < samples; n++) {
        any_rows(f, from, to, bytes + n * columns, sums);
        for (int64_t r = from; r < to; r++)
          y[n * rows + r] = gemv_end(end, r, sums[r - from], zero[n], step[n]);
      }
    });
    return true;
  }

 private:
  Array<const uint8_t, 1> codes_;
  Array<const int32_t, 1> row_sums_, zero_;
  std::optional<Array<const int8_t, 1>> book_;
  Array<const uint8_t, 2> x_;
  Array<const float, 1> step_, scale_;
  std::optional<Array<const float, 1>> bias_;
  Array<float, 2> out_;
  float low_, high_;
  int64_t chunks_ = 0;
  size_t threads_;
};

// How the parts of rows with books fit: `inputs` columns, `entries` values in all books.
template <class X>
int64_t row_books(int bits, const Array<const uint8_t, 1>& codes, size_t entries, const X& x,
                  int64_t rows, std::optional<Array<const float, 1>> bias,
                  const Array<float, 2>& out) {
  const int64_t fours = (rows + 3) / 4 * 4, chunk = 512 / (bits == 2 ? 2 : 4);
  const int64_t chunks = (int64_t(x.shape(1)) + chunk - 1) / chunk;
  if ((bits != 2 && bits != 4) || int64_t(codes.size()) != fours * chunks * 64 ||
      int64_t(entries) != fours << bits || out.shape(0) != x.shape(0) ||
      (bias && int64_t(bias->size()) != rows))
    throw std::invalid_argument("an array has another length than the sizes say");
  return chunks;
}

// y = clamp(W x + bias) in float32.
class BookFloats {
 public:
  BookFloats(int bits, Array<const uint8_t, 1> codes, Array<const float, 1> book,
             Array<const float, 2> x, std::optional<Array<const float, 1>> bias, float low, float high,
             Array<float, 2> out, size_t threads)
      : codes_(codes), book_(book), x_(x), bias_(bias), out_(out), low_(low), high_(high), bits_(bits),
        threads_(threads) {
    chunks_ = row_books(bits, codes, book.size(), x, int64_t(out.shape(1)), bias, out);
  }

  bool run() const {
    const int64_t rows = int64_t(out_.shape(1)), samples = int64_t(x_.shape(0));
    const int64_t inputs = int64_t(x_.shape(1)), columns = chunks_ * (512 / bits_);
    const gossamer::RowBooks f{chunks_, codes_.data(), book_.data()};
    const float *given = x_.data(), *b = bias_ ? bias_->data() : nullptr;
    float* y = out_.data();
    const auto level = gossamer::isa();
    const auto reorder =
        bits_ == 2 ? GOSSAMER_PICK(level, reorder<2>) : GOSSAMER_PICK(level, reorder<4>);
    const auto valued_rows =
        bits_ == 2 ? GOSSAMER_PICK(level, valued_rows<2>) : GOSSAMER_PICK(level, valued_rows<4>);
    std::vector<float> turned(size_t(samples * columns));
    for (int64_t n = 0; n < samples; n++)
      reorder(given + n * inputs, inputs, chunks_, turned.data() + n * columns);
    gossamer::parallel(size_t((rows + kShare - 1) / kShare), threads_, [&](size_t, size_t item) {
      const int64_t from = int64_t(item) * kShare, to = std::min(from + kShare, rows);
      valued_rows(f, from, to, turned.data(), samples, y, rows);
      for (int64_t n = 0; n < samples; n++)
        for (int64_t r = from; r < to; r++) {
          float v = y[n * rows + r] + (b ? b[r] : 0.0f);
          v = v < low_ ? low_ : v;
          y[n * rows + r] = v > high_ ? high_ : v;
        }
    });
    return true;
  }

 private:
  Array<const uint8_t, 1> codes_;
  Array<const float, 1> book_;
  Array<const float, 2> x_;
  std::optional<Array<const float, 1>> bias_;
  Array<float, 2> out_;
  float low_, high_;
  int bits_;
  int64_t chunks_ = 0;
  size_t threads_;
};

// y = clamp(sum * factor + shift) of codes of seven bits, (samples, whole chunks).
class BookBytes {
 public:
  BookBytes(int bits, Array<const uint8_t, 1> codes, Array<const int8_t, 1> book,
            Array<const uint8_t, 2> x, Array<const float, 1> factor, Array<const float, 1> shift,
            float low, float high, Array<float, 2> out, size_t threads)
      : codes_(codes), x_(x), book_(book), factor_(factor), shift_(shift), out_(out), low_(low),
        high_(high), bits_(bits), threads_(threads) {
    const int64_t rows = int64_t(out.shape(1));
    chunks_ = row_books(bits, codes, book.size(), x, rows, shift, out);
    if (int64_t(factor.size()) != rows || int64_t(x.shape(1)) != chunks_ * (512 / bits))
      throw std::invalid_argument("an array has another length than the sizes say");
  }

  bool run() const {
    const int64_t rows = int64_t(out_.shape(1)), samples = int64_t(x_.shape(0));
    const int64_t columns = int64_t(x_.shape(1));
    const gossamer::RowBooks f{chunks_, codes_.data(), book_.data()};
    const GemvEnd end{factor_.data(), shift_.data(), nullptr, low_, high_};
    const uint8_t* bytes = x_.data();
    float* y = out_.data();
    const auto level = gossamer::isa();
    const auto coded_rows =
        bits_ == 2 ? GOSSAMER_PICK(level, coded_rows<2>) : GOSSAMER_PICK(level, coded_rows<4>);
    gossamer::parallel(size_t((rows + kShare - 1) / kShare), threads_, [&](size_t, size_t item) {
      const int64_t from = int64_t(item) * kShare, to = std::min(from + kShare, rows);
      int32_t sums[kShare];
      for (int64_t n = 0; n < samples; n++) {
        coded_rows(f, from, to, bytes + n * columns, sums);
        for (int64_t r = from; r < to; r++)
          y[n * rows + r] = gemv_end(end, r, sums[r - from], 0, 1.0f);
      }
    });
    return true;
  }

 private:
  Array<const uint8_t, 1> codes_;
  Array<const uint8_t, 2> x_;
  Array<const int8_t, 1> book_;
  Array<const float, 1> factor_, shift_;
  Array<float, 2> out_;
  float low_, high_;
  int bits_;
  int64_t chunks_ = 0;
  size_t threads_;
};

void signed_bytes(Array<const float, 2> x, Array<int8_t, 2> codes, Array<float, 1> scale,
                  Array<int32_t, 1> sum) {
  const size_t n = x.shape(0), k = x.shape(1), wide = codes.shape(1);
  if (codes.shape(0) != n || wide < k || scale.size() != n || sum.size() != n)
    throw std::invalid_argument("an array has another length than x says");
  bool good = true;
  {
    nb::gil_scoped_release release;
    const auto one = GOSSAMER_PICK(gossamer::isa(), signed_bytes);
    for (size_t i = 0; i < n; i++) {
      int8_t* to = codes.data() + i * wide;
      good &= one(x.data() + i * k, int64_t(k), to, scale.data() + i, sum.data() + i);
      std::memset(to + k, 0, wide - k);
    }
  }
  if (!good) throw std::invalid_argument("x has entries that are NaN or infinite");
}

}  // namespace

NB_MODULE(few_bits, m) {
  m.doc() = "Dense matrices of few bits times a small batch.";
  auto coded =
      nb::class_<Coded>(m, "Coded", "Ternary codes, or of a book; `out` (samples, rows) is written.")
          .def(nb::init<Array<const uint8_t, 1>, std::optional<Array<const int8_t, 1>>,
                        Array<const uint8_t, 2>, Array<const float, 1>, Array<const int32_t, 1>,
                        Array<const float, 1>, Array<const int32_t, 1>,
                        std::optional<Array<const float, 1>>, float, float, Array<float, 2>, size_t>(),
               nb::arg("codes"), nb::arg("book").none(), nb::arg("x"), nb::arg("sample_scale"),
               nb::arg("sample_zero"), nb::arg("scale"), nb::arg("row_sums"), nb::arg("bias").none(),
               nb::arg("low"), nb::arg("high"), nb::arg("out"), nb::arg("threads"));
  auto floats =
      nb::class_<BookFloats>(m, "BookFloats", "Rows with books of floats times float32 samples.")
          .def(nb::init<int, Array<const uint8_t, 1>, Array<const float, 1>, Array<const float, 2>,
                        std::optional<Array<const float, 1>>, float, float, Array<float, 2>, size_t>(),
               nb::arg("bits"), nb::arg("codes"), nb::arg("book"), nb::arg("x"),
               nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("out"),
               nb::arg("threads"));
  auto bytes =
      nb::class_<BookBytes>(m, "BookBytes", "Rows with books of bytes times samples of seven bits.")
          .def(nb::init<int, Array<const uint8_t, 1>, Array<const int8_t, 1>, Array<const uint8_t, 2>,
                        Array<const float, 1>, Array<const float, 1>, float, float, Array<float, 2>,
                        size_t>(),
               nb::arg("bits"), nb::arg("codes"), nb::arg("book"), nb::arg("x"), nb::arg("factor"),
               nb::arg("shift"), nb::arg("low"), nb::arg("high"), nb::arg("out"), nb::arg("threads"));
  gossamer::define_step(coded);
  gossamer::define_step(floats);
  gossamer::define_step(bytes);
  m.def("signed_bytes", &signed_bytes, nb::arg("x"), nb::arg("codes"), nb::arg("scale"),
        nb::arg("sum"), "Signed bytes of each row, from its largest absolute value, and their sums.");
}
