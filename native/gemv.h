// How integer sums of a linear layer become floats.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gossamer {

struct GemvEnd {
  const float* scale;    // of a row
  const float* bias;     // of a row, or null
  const int32_t* zeros;  // what a row's weights sum to, times each sample's zero point; or null
  float low, high;
};

// (sum - zero * weights) * (row's scale * sample's scale) + bias, clamped; NaN cannot come up.
inline float gemv_end(const GemvEnd& e, int64_t row, int32_t sum, int32_t zero, float sample) {
  if (e.zeros) sum -= zero * e.zeros[row];
  float v = float(sum) * (e.scale[row] * sample);
  if (e.bias) v += e.bias[row];
  v = v < e.low ? e.low : v;
  return v > e.high ? e.high : v;
}

}  // namespace gossamer
