// Dense matrices of few bits times a small batch: 2-bit ternary codes, 4-bit codes of a book.
//
// Ternary codes are stored as weight + 1, so that they multiply signed bytes as unsigned ones; the
// sum of the activations is taken off at the end. Book codes look their signed bytes up and multiply
// activations of seven unsigned bits. Rows lie by fours, chunk after chunk, so that memory is read in
// order; the codes of 32 rows stay in cache for all samples.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

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
  m.def("signed_bytes", &signed_bytes, nb::arg("x"), nb::arg("codes"), nb::arg("scale"),
        nb::arg("sum"), "Signed bytes of each row, from its largest absolute value, and their sums.");
}
