// Sparse matrix times vector: float32 in compressed rows, and bytes by permutes.
//
// Bytes: 16 rows lie side by side in the 32-bit lanes, and in each lane four weights of one row with
// the indexes of their columns in a block of 32, 64 or 128. The block's activations stay in registers:
// one permute picks the 64 that a step needs. Rows are ordered by their number of weights, so that the
// 16 of a group fill up to nearly the same length. Optionally the weights are 4-bit codes of a book.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "gemv.h"
#include "parallel.h"

namespace gossamer {
struct SparseGemv {
  int64_t width, blocks, groups;
  const int32_t* starts;  // of block b, group g: steps starts[b * groups + g] .. [.. + 1]
  const uint8_t* data;    // a step: 64 indexes, 64 weights; of a book two: 128 indexes, 64 bytes
  const int8_t* book;     // or null
};
}  // namespace gossamer

#define GOSSAMER_BODY "sparse_gemv_body.h"
#include "each_isa.h"

namespace nb = nanobind;

namespace {

using gossamer::GemvEnd;
using gossamer::SparseGemv;

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kShare = 8;  // groups that a thread takes at a time

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
      int64_t(sample_zero.size()) != samples || (book && book->size() != 16) ||
      int64_t(starts.size()) != g.blocks * g.groups + 1)
    throw std::invalid_argument("an array has another length than the sizes say");
  const int64_t steps = int64_t(data.size()) / (book ? 96 : 128);
  bool good = starts.data()[0] == 0 && starts.data()[starts.size() - 1] == steps;
  for (size_t i = 1; i < starts.size(); i++) {
    const int32_t n = starts.data()[i] - starts.data()[i - 1];
    good &= n >= 0 && !(book && n % 2);
  }
  for (int64_t i = 0; i < padded; i++) good &= order.data()[i] < rows;
  if (!good) throw std::invalid_argument("starts do not ascend inside data, or order names no row");
  const GemvEnd end{scale.data(), bias ? bias->data() : nullptr, row_sums.data(), low, high};
  const int32_t* at = order.data();
  const uint8_t* x = codes.data();
  const float* step = sample_scale.data();
  const int32_t* zero = sample_zero.data();
  float* y = out.data();
  nb::gil_scoped_release release;
  const auto any_groups = GOSSAMER_PICK(gossamer::isa(), any_groups);
  // One thread: all groups at once, so that tables are loaded once.
  const int64_t share = threads > 1 ? kShare : g.groups;
  if (!share || !samples) return;
  const int64_t shares = (g.groups + share - 1) / share;
  const size_t workers = std::min(std::max<size_t>(threads, 1), size_t(shares));
  std::vector<std::vector<int32_t>> sums(workers, std::vector<int32_t>(size_t(share) * 16));
  gossamer::parallel(size_t(shares), workers, [&](size_t worker, size_t item) {
    const int64_t from = int64_t(item) * share, to = std::min(from + share, g.groups);
    int32_t* own = sums[worker].data();
    for (int64_t n = 0; n < samples; n++) {
      if (g.blocks) any_groups(g, from, to, x + n * columns, own);
      for (int64_t i = from * 16; i < to * 16; i++)
        if (at[i] >= 0)
          y[n * rows + at[i]] = gemv_end(end, at[i], own[i - from * 16], zero[n], step[n]);
    }
  });
}

void run_float(Array<const int32_t, 1> starts, Array<const uint16_t, 1> columns,
               Array<const float, 1> values, Array<const float, 1> x,
               std::optional<Array<const float, 1>> bias, float low, float high,
               Array<float, 1> out, size_t threads) {
  const int64_t rows = int64_t(out.size());
  if (int64_t(starts.size()) != rows + 1 || columns.size() != values.size() ||
      (bias && int64_t(bias->size()) != rows))
    throw std::invalid_argument("an array has another length than the sizes say");
  const int32_t* s = starts.data();
  bool good = s[0] >= 0 && s[rows] <= int64_t(values.size());
  for (int64_t r = 0; r < rows; r++) good &= s[r] <= s[r + 1];
  const uint16_t most =
      GOSSAMER_PICK(gossamer::isa(), greatest)(columns.data(), int64_t(columns.size()));
  if (!good || (columns.size() && most >= x.size()))
    throw std::invalid_argument("starts do not ascend inside values, or a column lies outside x");
  nb::gil_scoped_release release;
  const auto float_rows = GOSSAMER_PICK(gossamer::isa(), float_rows);
  const float* b = bias ? bias->data() : nullptr;
  float* y = out.data();
  const int64_t share = threads > 1 ? 128 : std::max<int64_t>(rows, 1);
  gossamer::parallel(size_t((rows + share - 1) / share), threads, [&](size_t, size_t item) {
    const int64_t from = int64_t(item) * share, to = std::min(from + share, rows);
    float_rows(s, columns.data(), values.data(), x.data(), from, to, y);
    for (int64_t r = from; r < to; r++) {
      float v = y[r] + (b ? b[r] : 0.0f);
      v = v < low ? low : v;
      y[r] = v > high ? high : v;
    }
  });
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
