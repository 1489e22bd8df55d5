// What the C library computes with, compiled for each instruction set (each_isa.h).
#include "../../sparse_conv_body.h"
#include "../../quads_body.h"
#include "../../recurrent_body.h"
#include "../../sparse_gemv_body.h"

// y[n * outputs + r] = the product of row r with sample n, rows from .. to of a dense float32 matrix.
static void dense_rows(const float* w, int64_t inputs, const float* x, int64_t samples, int64_t from,
                       int64_t to, float* y, int64_t outputs) {
  constexpr int kRows = 4;
  for (int64_t r = from; r < to; r += kRows) {
    const int64_t live = to - r < kRows ? to - r : kRows;
    const float* row[kRows];  // the last one again where there are fewer
    for (int64_t k = 0; k < kRows; k++) row[k] = w + (r + (k < live ? k : live - 1)) * inputs;
    for (int64_t n = 0; n < samples; n++) {
      const float* sample = x + n * inputs;
      F s[kRows];
#pragma GCC unroll 4
      for (int k = 0; k < kRows; k++) s[k] = F{};
      int64_t i = 0;
      for (; i + kLanes <= inputs; i += kLanes) {
        const F v = load<F>(sample + i);
#pragma GCC unroll 4
        for (int k = 0; k < kRows; k++) s[k] = madd(s[k], load<F>(row[k] + i), v);
      }
      for (int64_t k = 0; k < live; k++) {
        float lanes[kLanes], sum = 0;
        store(lanes, s[k]);
        for (int64_t j = i; j < inputs; j++) sum += row[k][j] * sample[j];
        for (int j = 0; j < kLanes; j++) sum += lanes[j];
        y[n * outputs + r + k] = sum;
      }
    }
  }
}
