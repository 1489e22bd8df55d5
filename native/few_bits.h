// What a dense matrix of few bits is told.
#pragma once
#include <cstdint>

namespace gossamer {

struct FewBits {
  int64_t chunks;  // of 64 bytes in a row
  const uint8_t* codes;  // (rows / 4, chunks, 4, 64)
  const int8_t* book;  // or null: ternary
};
struct RowBooks {
  int64_t chunks;
  const uint8_t* codes;  // as above
  const void* book;  // (rows, 4 or 16): each row's values, float or int8
};

}  // namespace gossamer
