// What small.cpp computes in vectors: compiled for each instruction set (each_isa.h).

// Whether every one of `count` floats is finite.
static bool all_finite(const float* x, int64_t count) {
  const I infinite = splat(0x7f800000);
  I bad[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int k = 0; k < 4; k++)
      bad[k] |= (I)((load<I>(x + i + k * kLanes) & infinite) == infinite);
  for (; i + kLanes <= count; i += kLanes)
    bad[0] |= (I)((load<I>(x + i) & infinite) == infinite);
  int32_t any = 0;
  for (; i < count; i++) any |= !(x[i] - x[i] == 0);
  for (int k = 0; k < 4; k++)
    for (int j = 0; j < kLanes; j++) any |= bad[k][j];
  return !any;
}
