// Every kernel body at once, and the lanes they are written over.
#include "../../native/c/parts/bodies.h"
#include "../../native/few_bits_body.h"
#include "../../native/floats_body.h"
#include "../../native/small_body.h"

// One vector of 16 lanes, or several smaller ones, through each operation on lanes.
[[maybe_unused]] static void each_lane(const int32_t* acc, const int32_t* x, const int32_t* w,
                                       const int8_t* book, int32_t* four, int32_t* two,
                                       int32_t* byte) {
  for (int i = 0; i < 16; i += kLanes) {
    store(four + i, dot4(load<I>(acc + i), load<I>(x + i), load<I>(w + i)));
    store(two + i, dot2(load<I>(acc + i), load<I>(w + i), load<I>(x + i)));
    store(byte + i, look_up(book, load<I>(w + i)));
  }
}
