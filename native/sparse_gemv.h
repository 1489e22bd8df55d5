// What a matrix of bytes is told: 16 rows side by side, blocks of columns, steps of four weights.
#pragma once
#include <cstdint>

namespace gossamer {

struct SparseGemv {
  int64_t width, blocks, groups;
  const int32_t* starts;  // of block b, group g: steps starts[b * groups + g] .. [.. + 1]
  const uint8_t* data;    // a step: 64 indexes, 64 weights; of a book two: 128 indexes, 64 bytes
  const int8_t* book;     // or null
};

}  // namespace gossamer
