// What the codecs of gradients share: arrays, parts of them for threads, layouts of codes.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../intrinsics.h"

namespace gossamer {

namespace nb = nanobind;

template <class T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyIn = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyOut = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;

enum Form { kPlanes = 0, kSparse = 1, kBase3 = 2 };

constexpr size_t kChunk = 40;                    // groups that stay in the first-level cache
constexpr size_t kThreaded = size_t(1) << 17;    // elements that a thread must have
constexpr size_t kStreamed = size_t(1) << 21;    // elements from which stores pass by the cache
constexpr int kMostPlanes = 8;

inline size_t groups_of(size_t n) { return (n + 63) / 64; }

template <class Array, class F>
auto by_type(const Array& array, F f) {
  if (array.dtype() == nb::dtype<int8_t>()) return f((int8_t*)nullptr);
  if (array.dtype() == nb::dtype<int16_t>()) return f((int16_t*)nullptr);
  if (array.dtype() == nb::dtype<int32_t>()) return f((int32_t*)nullptr);
  throw std::invalid_argument("sums must be int8, int16 or int32");
}

// Ranges of groups, one a thread, in whole chunks.
struct Parts {
  size_t count, each;
  Parts(size_t n, size_t threads) {
    const size_t chunks = (groups_of(n) + kChunk - 1) / kChunk;
    const size_t most = std::max<size_t>(1, std::min(threads, n / kThreaded));
    each = std::max<size_t>(1, (chunks + most - 1) / most) * kChunk;
    count = std::max<size_t>(1, (groups_of(n) + each - 1) / each);
  }
};

// f(integral_constant planes, bool_constant half)
template <class F>
auto by_layout(int planes, bool half, F f) {
#define CASE(P)                                                                           \
  case P:                                                                                 \
    return half ? f(std::integral_constant<int, P>(), std::true_type())                   \
                : f(std::integral_constant<int, P ? P : 1>(), std::false_type());
  switch (planes) {
    CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
  }
#undef CASE
  throw std::invalid_argument("planes must be 0 to 8");
}

inline void check_layout(int planes, bool half, int form) {
  if (planes < (half ? 0 : 1) || planes > kMostPlanes || form < 0 || form > 2 ||
      (form != kPlanes && half) || (form == kBase3 && planes != 1))
    throw std::invalid_argument("no such layout of codes");
}

// Aligned stores past the cache, whatever the alignment of the target.
#ifdef GOSSAMER_X86
inline void stream_copy(const float* from, size_t n, float* to) {
  size_t e = 0;
  for (; e < n && reinterpret_cast<uintptr_t>(to + e) % 16; e++) to[e] = from[e];
  for (; e + 4 <= n; e += 4) _mm_stream_ps(to + e, _mm_loadu_ps(from + e));
  for (; e < n; e++) to[e] = from[e];
}
#else
inline void stream_copy(const float* from, size_t n, float* to) { std::memcpy(to, from, 4 * n); }
#endif

}  // namespace gossamer
