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
void run(Array<const uint8_t, 1> codes, std::optional<Array<const int8_t, 1>> book,
         Array<const uint8_t, 2> x, Array<const float, 1> sample_scale,
         Array<const int32_t, 1> sample_zero, Array<const float, 1> scale,
         Array<const int32_t, 1> row_sums, std::optional<Array<const float, 1>> bias, float low,
         float high, Array<float, 2> out, size_t threads) {
  const int64_t rows = int64_t(scale.size()), samples = int64_t(x.shape(0));
  const int64_t columns = int64_t(x.shape(1)), chunk = book ? 128 : 256;
  const FewBits f{columns / chunk, codes.data(), book ? book->data() : nullptr};
  if (columns % chunk || int64_t(codes.size()) != (rows + 3) / 4 * 4 * f.chunks * 64 || int64_t(row_sums.size()) != rows ||
      (bias && int64_t(bias->size()) != rows) || int64_t(sample_scale.size()) != samples ||
      int64_t(sample_zero.size()) != samples || int64_t(out.shape(0)) != samples ||
      int64_t(out.shape(1)) != rows || (book && book->size() != 16))
    throw std::invalid_argument("an array has another length than the sizes say");
  const GemvEnd end{scale.data(), bias ? bias->data() : nullptr, row_sums.data(), low, high};
  const uint8_t* bytes = x.data();
  const float* step = sample_scale.data();
  const int32_t* zero = sample_zero.data();
  float* y = out.data();
  nb::gil_scoped_release release;
  const auto any_rows = GOSSAMER_PICK(gossamer::isa(), any_rows);
  gossamer::parallel(size_t((rows + kShare - 1) / kShare), threads, [&](size_t, size_t item) {
    const int64_t from = int64_t(item) * kShare, to = std::min(from + kShare, rows);
    int32_t sums[kShare];
    for (int64_t n = 0; n < samples; n++) {
      any_rows(f, from, to, bytes + n * columns, sums);
      for (int64_t r = from; r < to; r++)
        y[n * rows + r] = gemv_end(end, r, sums[r - from], zero[n], step[n]);
    }
  });
}

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
void run_float(int bits, Array<const uint8_t, 1> codes, Array<const float, 1> book,
               Array<const float, 2> x, std::optional<Array<const float, 1>> bias, float low,
               float high, Array<float, 2> out, size_t threads) {
  const int64_t rows = int64_t(out.shape(1)), samples = int64_t(x.shape(0));
  const int64_t inputs = int64_t(x.shape(1));
  const int64_t chunks = row_books(bits, codes, book.size(), x, rows, bias, out);
  const gossamer::RowBooks f{chunks, codes.data(), book.data()};
  const float *given = x.data(), *b = bias ? bias->data() : nullptr;
  float* y = out.data();
  nb::gil_scoped_release release;
  const auto level = gossamer::isa();
  const auto reorder = bits == 2 ? GOSSAMER_PICK(level, reorder<2>) : GOSSAMER_PICK(level, reorder<4>);
  const auto valued_rows =
      bits == 2 ? GOSSAMER_PICK(level, valued_rows<2>) : GOSSAMER_PICK(level, valued_rows<4>);
  const int64_t columns = chunks * (512 / bits);
  std::vector<float> turned(size_t(samples * columns));
  for (int64_t n = 0; n < samples; n++)
    reorder(given + n * inputs, inputs, chunks, turned.data() + n * columns);
  gossamer::parallel(size_t((rows + kShare - 1) / kShare), threads, [&](size_t, size_t item) {
    const int64_t from = int64_t(item) * kShare, to = std::min(from + kShare, rows);
    valued_rows(f, from, to, turned.data(), samples, y, rows);
    for (int64_t n = 0; n < samples; n++)
      for (int64_t r = from; r < to; r++) {
        float v = y[n * rows + r] + (b ? b[r] : 0.0f);
        v = v < low ? low : v;
        y[n * rows + r] = v > high ? high : v;
      }
  });
}

// y = clamp(sum * factor + shift) of codes of seven bits, (samples, whole chunks).
void run_bytes(int bits, Array<const uint8_t, 1> codes, Array<const int8_t, 1> book,
               Array<const uint8_t, 2> x, Array<const float, 1> factor,
               Array<const float, 1> shift, float low, float high, Array<float, 2> out,
               size_t threads) {
  const int64_t rows = int64_t(out.shape(1)), samples = int64_t(x.shape(0));
  const int64_t columns = int64_t(x.shape(1));
  const int64_t chunks = row_books(bits, codes, book.size(), x, rows, shift, out);
  if (int64_t(factor.size()) != rows || columns != chunks * (512 / bits))
    throw std::invalid_argument("an array has another length than the sizes say");
  const gossamer::RowBooks f{chunks, codes.data(), book.data()};
  const GemvEnd end{factor.data(), shift.data(), nullptr, low, high};
  const uint8_t* bytes = x.data();
  float* y = out.data();
  nb::gil_scoped_release release;
  const auto level = gossamer::isa();
  const auto coded_rows =
      bits == 2 ? GOSSAMER_PICK(level, coded_rows<2>) : GOSSAMER_PICK(level, coded_rows<4>);
  gossamer::parallel(size_t((rows + kShare - 1) / kShare), threads, [&](size_t, size_t item) {
    const int64_t from = int64_t(item) * kShare, to = std::min(from + kShare, rows);
    int32_t sums[kShare];
    for (int64_t n = 0; n < samples; n++) {
      coded_rows(f, from, to, bytes + n * columns, sums);
      for (int64_t r = from; r < to; r++)
        y[n * rows + r] = gemv_end(end, r, sums[r - from], 0, 1.0f);
    }
  });
}

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
  m.def("run", &run, nb::arg("codes"), nb::arg("book").none(), nb::arg("x"),
        nb::arg("sample_scale"), nb::arg("sample_zero"), nb::arg("scale"), nb::arg("row_sums"),
        nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("out"),
        nb::arg("threads"), "`out` (samples, rows) is written.");
  m.def("run_float", &run_float, nb::arg("bits"), nb::arg("codes"), nb::arg("book"), nb::arg("x"),
        nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("out"),
        nb::arg("threads"), "Rows with books of floats times float32 samples.");
  m.def("run_bytes", &run_bytes, nb::arg("bits"), nb::arg("codes"), nb::arg("book"), nb::arg("x"),
        nb::arg("factor"), nb::arg("shift"), nb::arg("low"), nb::arg("high"), nb::arg("out"),
        nb::arg("threads"), "Rows with books of bytes times samples of seven bits.");
  m.def("signed_bytes", &signed_bytes, nb::arg("x"), nb::arg("codes"), nb::arg("scale"),
        nb::arg("sum"), "Signed bytes of each row, from its largest absolute value, and their sums.");
}
