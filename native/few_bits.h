// What a dense matrix of few bits is told.
#pragma once
#include <cstdint>

namespace gossamer {

struct FewBits {
  int64_t chunks;  // of 64 bytes in a row
  const uint8_t* codes;  // (rows / 4, chunks, 4, 64)
  const int8_t* book;  // or null: ternary
};

}  // namespace gossamer
