// Checks and runs a sparse matrix times vectors: included behind each_isa.h with sparse_gemv_body.h.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "gemv.h"
#include "parallel.h"
#include "sparse_gemv.h"

namespace gossamer {

constexpr int64_t kShare = 8;  // groups that a thread takes at a time

// Nothing outside the arrays can be reached, whatever they hold; `order`: of `padded` places.
inline void check_bytes(const SparseGemv& g, size_t starts, size_t data, const int32_t* order,
                        int64_t padded, int64_t rows) {
  if (int64_t(starts) != g.blocks * g.groups + 1)
    throw std::invalid_argument("an array has another length than the sizes say");
  const int64_t steps = int64_t(data) / (g.book ? 96 : 128);
  bool good = g.starts[0] == 0 && g.starts[starts - 1] == steps;
  for (size_t i = 1; i < starts; i++) {
    const int32_t n = g.starts[i] - g.starts[i - 1];
    good &= n >= 0 && !(g.book && n % 2);
  }
  for (int64_t i = 0; i < padded; i++) good &= order[i] < rows;
  if (!good) throw std::invalid_argument("starts do not ascend inside data, or order names no row");
}

struct Samples {  // codes (samples, blocks * width), and what they mean
  int64_t count;
  const uint8_t* codes;
  const float* scale;
  const int32_t* zero;
};

// y: (samples, rows).
inline void run_bytes(const SparseGemv& g, const int32_t* order, int64_t rows, const Samples& x,
                      const GemvEnd& end, float* y, size_t threads) {
  const auto any_groups = GOSSAMER_PICK(isa(), any_groups);
  // One thread: all groups at once, so that tables are loaded once.
  const int64_t share = threads > 1 ? kShare : g.groups;
  if (!share || !x.count) return;
  const int64_t shares = (g.groups + share - 1) / share;
  const size_t workers = std::min(std::max<size_t>(threads, 1), size_t(shares));
  std::vector<std::vector<int32_t>> sums(workers, std::vector<int32_t>(size_t(share) * 16));
  parallel(size_t(shares), workers, [&](size_t worker, size_t item) {
    const int64_t from = int64_t(item) * share, to = std::min(from + share, g.groups);
    int32_t* own = sums[worker].data();
    for (int64_t n = 0; n < x.count; n++) {
      if (g.blocks) any_groups(g, from, to, x.codes + n * g.blocks * g.width, own);
      for (int64_t i = from * 16; i < to * 16; i++)
        if (order[i] >= 0)
          y[n * rows + order[i]] = gemv_end(end, order[i], own[i - from * 16], x.zero[n], x.scale[n]);
    }
  });
}

// Columns lie inside x, starts inside values.
inline void check_rows(const int32_t* starts, int64_t rows, const uint16_t* columns, size_t count,
                       size_t inputs) {
  bool good = starts[0] >= 0 && starts[rows] <= int64_t(count);
  for (int64_t r = 0; r < rows; r++) good &= starts[r] <= starts[r + 1];
  const uint16_t most = GOSSAMER_PICK(isa(), greatest)(columns, int64_t(count));
  if (!good || (count && most >= inputs))
    throw std::invalid_argument("starts do not ascend inside values, or a column lies outside x");
}

// y: (rows); bias may be null.
inline void run_rows(const int32_t* starts, int64_t rows, const uint16_t* columns,
                     const float* values, const float* x, const float* bias, float low, float high,
                     float* y, size_t threads) {
  const auto float_rows = GOSSAMER_PICK(isa(), float_rows);
  const int64_t share = threads > 1 ? 128 : std::max<int64_t>(rows, 1);
  parallel(size_t((rows + share - 1) / share), threads, [&](size_t, size_t item) {
    const int64_t from = int64_t(item) * share, to = std::min(from + share, rows);
    float_rows(starts, columns, values, x, from, to, y);
    for (int64_t r = from; r < to; r++) {
      float v = y[r] + (bias ? bias[r] : 0.0f);
      v = v < low ? low : v;
      y[r] = v > high ? high : v;
    }
  });
}

}  // namespace gossamer
