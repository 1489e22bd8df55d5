// Codes of several workers to their mean or their exact sum. Payloads come from other machines: all
// are checked before anything is written.
#pragma once
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../parallel.h"
#include "forms.h"
#include "planes.h"
#include "shared.h"

namespace gossamer {

using Mean = void (*)(const uint64_t* const*, const float*, size_t, size_t, float, float*, bool);
template <typename T>
using Sum = void (*)(const uint64_t*, size_t, T*);

template <int P, bool Half>
Mean mean_for(Isa isa) {
#ifdef GOSSAMER_X86
  if (isa == kAvx512) return mean_avx512<P, Half>;
  if (isa == kAvx2) return mean_avx2<P, Half>;
#endif
  (void)isa;
  return mean_portable<P, Half>;
}

template <int P, bool Half, typename T>
Sum<T> sum_for(Isa isa) {
#ifdef GOSSAMER_X86
  if (isa == kAvx512) return sum_avx512<P, Half, T>;
  if (isa == kAvx2) return sum_avx2<P, Half, T>;
#endif
  (void)isa;
  return sum_portable<P, Half, T>;
}

struct Payload {
  const uint8_t* data;
  size_t size, n;
  int form, planes;
  Isa level;
  std::vector<uint64_t> start;  // sparse: the first sign bit of each part

  size_t magnitudes() const { return 8 * size_t(planes) * groups_of(n); }

  void check(const Parts& parts) {
    const size_t groups = groups_of(n), row = 8 * size_t(planes + 1);
    if (form == kBase3) {
      if (size != (n + 4) / 5) throw std::invalid_argument("a payload of the wrong length");
      uint8_t most = 0;
      for (size_t i = 0; i < size; i++) most = std::max(most, data[i]);
      if (most > 242) throw std::invalid_argument("a base-3 byte above 242");
      uint64_t held[10];
      if (n % 320 && !from_base3_tail(data + n / 320 * 64, n % 320, held))
        throw std::invalid_argument("base-3 digits are set past the last element");
      return;
    }
    if (form == kPlanes ? size != row * groups
                        : size < magnitudes() || size > row * groups || size % 8)
      throw std::invalid_argument("a payload of the wrong length");
    if (n % 64) {
      const int words = form == kPlanes ? planes + 1 : planes;
      const uint8_t* last = data + (groups - 1) * 8 * size_t(words);
      for (int b = 0; b < words; b++)
        if (load_word(last + 8 * b) >> n % 64)
          throw std::invalid_argument("bits are set past the last element");
    }
    if (form != kSparse) return;
    start.assign(1, 0);
    for (size_t part = 0; part < parts.count; part++) {
      const size_t from = part * parts.each, count = std::min(parts.each, groups - from);
      start.push_back(start.back() + count_nonzero(level, data + 8 * size_t(planes) * from, count,
                                                   planes));
    }
    const uint64_t bits = start.back();
    if (size - magnitudes() != (bits + 63) / 64 * 8)
      throw std::invalid_argument("sign bits are not as many as non-zero elements");
    if (bits % 64 && load_word(data + size - 8) >> bits % 64)
      throw std::invalid_argument("sign bits are set past the last element");
  }

  // The planes of `count` groups from `from` on: in place where they lie so, else in `held`.
  const uint64_t* read(size_t from, size_t count, uint64_t& bit, uint64_t* held) const {
    const size_t row = 8 * size_t(planes + 1);
    if (form == kPlanes) {
      const uint8_t* at = data + row * from;
      if (reinterpret_cast<uintptr_t>(at) % 8 == 0) return reinterpret_cast<const uint64_t*>(at);
      std::memcpy(held, at, row * count);
    } else if (form == kSparse) {
      const size_t magnitude = magnitudes();
      bit = spread(level, data + 8 * size_t(planes) * from, count, planes, data + magnitude,
                   (size - magnitude) / 8, bit, held);
    } else {
      for (size_t b = from / 5; 5 * b < from + count; b++) {
        uint64_t* planes_at = held + (5 * b - from) * 2;
        if (320 * (b + 1) <= n) from_base3(level, data + 64 * b, planes_at);
        else from_base3_tail(data + 64 * b, n % 320, planes_at);
      }
    }
    return held;
  }
};

inline std::vector<Payload> payloads_of(const std::vector<In<uint8_t>>& data,
                                 const std::vector<int>& forms, size_t n, int planes, bool half) {
  if (data.size() != forms.size() || data.empty())
    throw std::invalid_argument("one form a payload, and one payload or more");
  std::vector<Payload> all;
  for (size_t i = 0; i < data.size(); i++) {
    check_layout(planes, half, forms[i]);
    all.push_back({data[i].data(), data[i].size(), n, forms[i], planes, isa(), {}});
  }
  return all;
}

// f(first group, groups, planes of each payload) for every chunk of a part.
template <class F>
void each_chunk(const std::vector<Payload>& all, size_t n, const Parts& parts, size_t part, F f) {
  const size_t groups = groups_of(n), end = std::min(groups, (part + 1) * parts.each);
  const size_t row = size_t(all[0].planes) + 1;
  std::vector<uint64_t> held(all.size() * kChunk * row), bit(all.size(), 0);
  std::vector<const uint64_t*> planes(all.size());
  for (size_t i = 0; i < all.size(); i++)
    if (all[i].form == kSparse) bit[i] = all[i].start[part];
  for (size_t at = part * parts.each; at < end; at += kChunk) {
    const size_t count = std::min(kChunk, end - at);
    for (size_t i = 0; i < all.size(); i++)
      planes[i] = all[i].read(at, count, bit[i], held.data() + i * kChunk * row);
    f(at, count, planes.data());
  }
}

inline void decode_mean(std::vector<In<uint8_t>> data, std::vector<int> forms, In<float> units, int planes,
                 bool half, Out<float> out, float factor, size_t threads) {
  const size_t n = out.size();
  float* const to = out.data();
  std::vector<Payload> all = payloads_of(data, forms, n, planes, half);
  if (units.size() != all.size()) throw std::invalid_argument("one unit a payload");
  nb::gil_scoped_release release;
  const Parts parts(n, threads);
  for (Payload& payload : all) payload.check(parts);
  bool finite = true;
  for (size_t i = 0; i < all.size(); i++) finite = finite && std::isfinite(units.data()[i]);
  if (!finite) {
    std::fill(to, to + n, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const Mean mean = by_layout(planes, half, [&](auto p, auto h) {
    return mean_for<decltype(p)::value, decltype(h)::value>(all[0].level);
  });
  const bool streamed = n >= kStreamed, aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0;
  parallel(parts.count, threads, [&](size_t, size_t part) {
    alignas(64) float held[kChunk * 64];
    each_chunk(all, n, parts, part, [&](size_t at, size_t count, const uint64_t* const* planes_at) {
      float* const here = to + 64 * at;
      const size_t size = std::min(64 * count, n - 64 * at);
      if (size == 64 * count && (aligned || !streamed)) {
        mean(planes_at, units.data(), all.size(), count, factor, here, streamed);
        return;
      }
      mean(planes_at, units.data(), all.size(), count, factor, held, false);
      if (streamed) stream_copy(held, size, here);
      else std::memcpy(here, held, 4 * size);
    });
#ifdef GOSSAMER_X86
    _mm_sfence();
#endif
  });
}

inline void sum_codes(std::vector<In<uint8_t>> data, std::vector<int> forms, int planes, bool half,
               AnyOut out, size_t threads) {
  const size_t n = out.size();
  std::vector<Payload> all = payloads_of(data, forms, n, planes, half);
  by_type(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const to = (T*)out.data();
    const Sum<T> sum = by_layout(planes, half, [&](auto p, auto h) {
      return sum_for<decltype(p)::value, decltype(h)::value, T>(all[0].level);
    });
    nb::gil_scoped_release release;
    const Parts parts(n, threads);
    for (Payload& payload : all) payload.check(parts);
    parallel(parts.count, threads, [&](size_t, size_t part) {
      alignas(64) T held[kChunk * 64];
      each_chunk(all, n, parts, part,
                 [&](size_t at, size_t count, const uint64_t* const* planes_at) {
                   std::fill(held, held + 64 * count, T(0));
                   for (size_t i = 0; i < all.size(); i++) sum(planes_at[i], count, held);
                   std::memcpy(to + 64 * at, held, sizeof(T) * std::min(64 * count, n - 64 * at));
                 });
    });
  });
}

}  // namespace gossamer
