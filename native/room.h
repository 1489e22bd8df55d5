// Memory at multiples of 64 bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace gossamer {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Room for `count` elements at a multiple of 64 bytes.
inline std::unique_ptr<uint32_t[], Free> room(int64_t count) {
  void* p = std::aligned_alloc(64, (size_t(count) * 4 + 127) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<uint32_t[], Free>(static_cast<uint32_t*>(p));
}

}  // namespace gossamer
