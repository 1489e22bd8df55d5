// gossamer._native.exchange: codecs of gradients. Statistics, codes to bytes, bytes to averages and
// exact sums. Bits depend neither on the instruction set nor on the number of threads. Payloads
// come from other machines: all are checked before anything is written, and errors are
// std::invalid_argument, which Python sees as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "forms.h"
#include "parallel.h"
#include "planes.h"

namespace nb = nanobind;
using namespace gossamer;

namespace {

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

size_t groups_of(size_t n) { return (n + 63) / 64; }

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

using Encode = void (*)(const float*, size_t, uint32_t, const Coding&, uint64_t*);
using Mean = void (*)(const uint64_t* const*, const float*, size_t, size_t, float, float*, bool);
template <typename T>
using Sum = void (*)(const uint64_t*, size_t, T*);

template <int P, bool Half>
Encode encode_for(Isa isa) {
#ifdef GOSSAMER_X86
  if (isa == kAvx512) return encode_avx512<P, Half>;
  if (isa == kAvx2) return encode_avx2<P, Half>;
#endif
  (void)isa;
  return encode_portable<P, Half>;
}

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

void check_layout(int planes, bool half, int form) {
  if (planes < (half ? 0 : 1) || planes > kMostPlanes || form < 0 || form > 2 ||
      (form != kPlanes && half) || (form == kBase3 && planes != 1))
    throw std::invalid_argument("no such layout of codes");
}

// ---- statistics ----

template <bool Absolute>
Statistics statistics_all(const float* g, size_t n, size_t threads) {
  const size_t chunks = (n + kStatistics - 1) / kStatistics;
  std::vector<Statistics> part(chunks);
  const Isa level = isa();
  const size_t at_once = 64, items = (chunks + at_once - 1) / at_once;
  parallel(items, n < 2 * kThreaded ? 1 : threads, [&](size_t, size_t item) {
    for (size_t i = item * at_once; i < std::min(chunks, (item + 1) * at_once); i++) {
      const size_t from = i * kStatistics;
      part[i] = statistics_of<Absolute>(level, g + from, std::min(kStatistics, n - from));
    }
  });
  if (part.empty()) return {0, 0, 0};
  for (size_t count = chunks; count > 1; count = (count + 1) / 2)
    for (size_t i = 0; i < (count + 1) / 2; i++) {
      Statistics a = part[2 * i];
      if (2 * i + 1 < count) {
        const Statistics& b = part[2 * i + 1];
        a = {a.sum + b.sum, a.squares + b.squares, std::max(a.largest, b.largest)};
      }
      part[i] = a;
    }
  return part[0];
}

std::tuple<double, double, uint32_t> statistics(In<float> g, bool absolute, size_t threads) {
  Statistics all;
  {
    nb::gil_scoped_release release;
    all = absolute ? statistics_all<true>(g.data(), g.size(), threads)
                   : statistics_all<false>(g.data(), g.size(), threads);
  }
  return {all.sum, all.squares, all.largest};
}

// ---- encode ----

struct Encoder {
  const float* g;
  size_t n;
  int planes;
  bool random;
  Coding coding;
  Encode kernel;
  Isa level;

  void full(const float* from, size_t groups, size_t first, uint64_t* out) const {
    if (coding.inv == 0) {
      std::memset(out, 0, 8 * size_t(planes + 1) * groups);
    } else if (random) {
      kernel(from, groups, uint32_t(first), coding, out);
    } else {
#ifdef GOSSAMER_X86
      if (level == kAvx512) return signs_avx512(from, groups, out);
      if (level == kAvx2) return signs_avx2(from, groups, out);
#endif
      signs_portable(from, groups, out);
    }
  }

  // Planes of `count` groups from `first` on, the last of them perhaps cut.
  void operator()(size_t first, size_t count, uint64_t* out) const {
    const size_t whole = std::min(count, n / 64 - std::min(first, n / 64));
    full(g + 64 * first, whole, first, out);
    if (whole == count) return;
    float last[64] = {};
    const size_t rest = n % 64;
    std::memcpy(last, g + n - rest, 4 * rest);
    uint64_t* word = out + whole * size_t(planes + 1);
    full(last, 1, first + whole, word);
    for (int b = 0; b <= planes; b++) word[b] &= (uint64_t(1) << rest) - 1;
  }
};

size_t encode_planes(const Encoder& code, size_t threads, uint8_t* out) {
  const size_t groups = groups_of(code.n), row = size_t(code.planes) + 1;
  const Parts parts(code.n, threads);
  parallel(parts.count, threads, [&](size_t, size_t part) {
    uint64_t held[kChunk * (kMostPlanes + 1)];
    const size_t end = std::min(groups, (part + 1) * parts.each);
    for (size_t at = part * parts.each; at < end; at += kChunk) {
      const size_t count = std::min(kChunk, end - at);
      code(at, count, held);
      std::memcpy(out + 8 * row * at, held, 8 * row * count);
    }
  });
  return 8 * row * groups;
}

size_t encode_sparse(const Encoder& code, size_t threads, uint8_t* out) {
  const size_t groups = groups_of(code.n), p = size_t(code.planes);
  const Parts parts(code.n, threads);
  uint8_t* signs = out + 8 * p * groups;
  struct Own {
    std::vector<uint8_t> bytes;
    BitWriter writer{nullptr};
    uint64_t bits = 0;
  };
  std::vector<Own> own(parts.count);
  parallel(parts.count, threads, [&](size_t, size_t part) {
    uint64_t held[kChunk * (kMostPlanes + 1)];
    Own& mine = own[part];
    const size_t begin = part * parts.each, end = std::min(groups, begin + parts.each);
    if (part) mine.bytes.resize(8 * (end - begin));
    uint8_t* start = part ? mine.bytes.data() : signs;
    mine.writer.out = start;
    for (size_t at = begin; at < end; at += kChunk) {
      const size_t count = std::min(kChunk, end - at);
      code(at, count, held);
      squeeze(code.level, held, count, code.planes, out + 8 * p * at, mine.writer);
    }
    mine.bits = 8 * uint64_t(mine.writer.out - start) + mine.writer.fill;
    if (part) mine.writer.finish();
  });
  BitWriter all = own[0].writer;
  for (size_t part = 1; part < parts.count; part++)
    for (uint64_t at = 0; at < own[part].bits; at += 64)
      all.put(load_word(own[part].bytes.data() + at / 8),
              unsigned(std::min<uint64_t>(64, own[part].bits - at)));
  return size_t(all.finish() - out);
}

size_t encode_base3(const Encoder& code, size_t threads, uint8_t* out) {
  const size_t groups = groups_of(code.n), blocks = code.n / 320;
  const Parts parts(code.n, threads);
  parallel(parts.count, threads, [&](size_t, size_t part) {
    uint64_t held[kChunk * 2];
    const size_t end = std::min(groups, (part + 1) * parts.each);
    for (size_t at = part * parts.each; at < end; at += kChunk) {
      const size_t count = std::min(kChunk, end - at);
      code(at, count, held);
      for (size_t b = at / 5; 5 * b < at + count; b++) {
        const uint64_t* planes = held + (5 * b - at) * 2;
        if (b < blocks) to_base3(code.level, planes, out + 64 * b);
        else to_base3_tail(planes, code.n % 320, out + 64 * b);
      }
    }
  });
  return (code.n + 4) / 5;
}

size_t encode(In<float> g, float inv, float top, int planes, bool half, bool random,
              std::tuple<uint32_t, uint32_t, uint32_t, uint32_t> key, uint32_t shift, int form,
              Out<uint8_t> out, size_t threads) {
  check_layout(planes, half, form);
  const size_t n = g.size();
  const size_t need = form == kBase3 ? (n + 4) / 5 : 8 * size_t(planes + 1) * groups_of(n);
  if (out.size() < need) throw std::invalid_argument("out is too small");
  Encoder code;
  code.g = g.data();
  code.n = n;
  code.planes = planes;
  code.random = random;
  code.level = isa();
  code.coding = {inv, top, std::get<0>(key), std::get<1>(key), std::get<2>(key),
                 std::get<3>(key), shift};
  code.kernel = by_layout(planes, half, [&](auto p, auto h) {
    return encode_for<decltype(p)::value, decltype(h)::value>(code.level);
  });
  uint8_t* to = out.data();
  nb::gil_scoped_release release;
  if (n == 0) return 0;
  if (form == kPlanes) return encode_planes(code, threads, to);
  if (form == kSparse) return encode_sparse(code, threads, to);
  return encode_base3(code, threads, to);
}

// ---- payloads ----

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

std::vector<Payload> payloads_of(const std::vector<In<uint8_t>>& data,
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

// Aligned stores past the cache, whatever the alignment of the target.
#ifdef GOSSAMER_X86
void stream_copy(const float* from, size_t n, float* to) {
  size_t e = 0;
  for (; e < n && reinterpret_cast<uintptr_t>(to + e) % 16; e++) to[e] = from[e];
  for (; e + 4 <= n; e += 4) _mm_stream_ps(to + e, _mm_loadu_ps(from + e));
  for (; e < n; e++) to[e] = from[e];
}
#else
void stream_copy(const float* from, size_t n, float* to) { std::memcpy(to, from, 4 * n); }
#endif

void decode_mean(std::vector<In<uint8_t>> data, std::vector<int> forms, In<float> units, int planes,
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

void sum_codes(std::vector<In<uint8_t>> data, std::vector<int> forms, int planes, bool half,
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

// ---- sums ----

template <typename T>
void split(Isa level, const T* v, int bits, uint64_t* out) {
#ifdef GOSSAMER_X86
  if (level == kAvx512) return split_avx512(v, bits, out);
  if (level == kAvx2) return split_avx2(v, bits, out);
#endif
  (void)level;
  split_portable(v, bits, out);
}

void join(Isa level, const uint64_t* word, int bits, int32_t top, uint64_t neg, float factor,
          float* out) {
#ifdef GOSSAMER_X86
  if (level == kAvx512) return join_avx512(word, bits, top, neg, factor, out);
  if (level == kAvx2) return join_avx2(word, bits, top, neg, factor, out);
#endif
  (void)level;
  join_portable(word, bits, top, neg, factor, out);
}

void check_bits(int bits) {
  if (bits < 1 || bits > 31) throw std::invalid_argument("bits must be 1 to 31");
}

size_t padded_head(size_t groups) { return (groups + 7) / 8 * 8; }

template <typename T>
size_t pack_all(const T* sums, size_t n, int bits, bool sparse, uint8_t* out) {
  const size_t groups = groups_of(n);
  const Isa level = isa();
  uint8_t* at = out;
  std::vector<uint8_t> signs(sparse ? 8 * groups : 0);
  BitWriter writer{signs.data()};
  if (sparse) {
    at += padded_head(groups);
    std::memset(out, 0, padded_head(groups));
  }
  for (size_t i = 0; i < groups; i++) {
    T v[64] = {};
    std::memcpy(v, sums + 64 * i, sizeof(T) * std::min<size_t>(64, n - 64 * i));
    uint64_t word[32], planes[2];
    if (!sparse) {
      split(level, v, bits, word);
      std::memcpy(at, word, 8 * size_t(bits));
      at += 8 * bits;
      continue;
    }
    // magnitudes bit by bit: where negative, all bits turned, plus one
    split(level, v, bits, word);
    const uint64_t neg = word[bits - 1];
    uint64_t carry = neg;
    planes[0] = 0;
    planes[1] = neg;
    int need = 0;
    for (int b = 0; b < bits; b++) {
      const uint64_t turned = word[b] ^ neg;
      word[b] = turned ^ carry;
      carry &= turned;
      planes[0] |= word[b];
      if (word[b]) need = b + 1;
    }
    out[i] = uint8_t(need);
    std::memcpy(at, word, 8 * size_t(need));
    at += 8 * need;
    uint8_t where[8];
    squeeze(level, planes, 1, 1, where, writer);
  }
  if (sparse) {
    const size_t size = size_t(writer.finish() - signs.data());
    if (size) std::memcpy(at, signs.data(), size);
    at += size;
  }
  return size_t(at - out);
}

size_t pack_sums(AnyIn sums, int bits, bool sparse, Out<uint8_t> out) {
  check_bits(bits);
  const size_t n = sums.size(), groups = groups_of(n);
  const size_t need = sparse ? padded_head(groups) + 8 * size_t(bits + 1) * groups
                             : 8 * size_t(bits) * groups;
  if (out.size() < need) throw std::invalid_argument("out is too small");
  return by_type(sums, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    nb::gil_scoped_release release;
    return pack_all((const T*)sums.data(), n, bits, sparse, out.data());
  });
}

// Where a part of packed sums starts.
struct Place {
  size_t words = 0;
  uint64_t bit = 0;
};

std::vector<Place> places(const uint8_t* data, size_t size, size_t n, int bits, bool sparse,
                          const Parts& parts, size_t& signs) {
  const size_t groups = groups_of(n);
  std::vector<Place> all;
  if (!sparse) {
    if (size != 8 * size_t(bits) * groups) throw std::invalid_argument("sums of the wrong length");
    if (n % 64)
      for (int b = 0; b < bits; b++)
        if (load_word(data + size - 8 * size_t(bits) + 8 * size_t(b)) >> n % 64)
          throw std::invalid_argument("bits of sums are set past the last element");
    for (size_t part = 0; part < parts.count; part++)
      all.push_back({part * parts.each * size_t(bits), 0});
    return all;
  }
  const size_t head = padded_head(groups);
  if (size < head || size % 8) throw std::invalid_argument("sums of the wrong length");
  size_t total = 0;
  for (size_t i = 0; i < groups; i++) {
    if (data[i] > bits) throw std::invalid_argument("a group of sums of too many bits");
    total += data[i];
  }
  for (size_t i = groups; i < head; i++)
    if (data[i]) throw std::invalid_argument("bits of the head are set past the last group");
  if (total > (size - head) / 8) throw std::invalid_argument("sums of the wrong length");
  Place at;
  for (size_t i = 0; i < groups; i++) {
    if (i % parts.each == 0) all.push_back(at);
    const int need = data[i];
    const uint8_t* words = data + head + 8 * at.words;
    const uint64_t where = need ? any_of(words, need) : 0;
    if (i == groups - 1 && n % 64 && where >> n % 64)
      throw std::invalid_argument("bits of sums are set past the last element");
    at.words += size_t(need);
    at.bit += uint64_t(__builtin_popcountll(where));
  }
  if (all.empty()) all.push_back(at);
  signs = head + 8 * total;
  if (size - signs != (at.bit + 63) / 64 * 8)
    throw std::invalid_argument("sign bits are not as many as non-zero sums");
  if (at.bit % 64 && load_word(data + size - 8) >> at.bit % 64)
    throw std::invalid_argument("sign bits are set past the last sum");
  return all;
}

void decode_sums(In<uint8_t> packed, int bits, bool sparse, float factor, Out<float> out,
                 size_t threads) {
  check_bits(bits);
  const size_t n = out.size(), groups = groups_of(n), size = packed.size();
  const uint8_t* const data = packed.data();
  float* const to = out.data();
  nb::gil_scoped_release release;
  const Parts parts(n, threads);
  size_t signs = 0;
  const std::vector<Place> start = places(data, size, n, bits, sparse, parts, signs);
  if (!std::isfinite(factor)) {
    std::fill(to, to + n, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const Isa level = isa();
  const bool streamed = n >= kStreamed;
  parallel(parts.count, threads, [&](size_t, size_t part) {
    alignas(64) float held[kChunk * 64];
    Place at = start[part];
    const size_t end = std::min(groups, (part + 1) * parts.each);
    const uint8_t* words = data + (sparse ? padded_head(groups) : 0) + 8 * at.words;
    for (size_t from = part * parts.each; from < end; from += kChunk) {
      const size_t count = std::min(kChunk, end - from);
      for (size_t i = from; i < from + count; i++) {
        uint64_t word[32], neg = 0;
        const int need = sparse ? data[i] : bits;
        std::memcpy(word, words, 8 * size_t(need));
        if (sparse && need) {
          uint64_t planes[2];
          const uint64_t where = any_of(words, need);
          at.bit = spread(level, reinterpret_cast<const uint8_t*>(&where), 1, 1, data + signs,
                          (size - signs) / 8, at.bit, planes);
          neg = planes[1];
        }
        words += 8 * need;
        const int32_t high = need ? int32_t(1) << (need - 1) : 0;
        join(level, word, need, sparse ? high : -high, neg, factor, held + 64 * (i - from));
      }
      const size_t values = std::min(64 * count, n - 64 * from);
      if (streamed) stream_copy(held, values, to + 64 * from);
      else std::memcpy(to + 64 * from, held, 4 * values);
    }
#ifdef GOSSAMER_X86
    _mm_sfence();
#endif
  });
}

}  // namespace

NB_MODULE(exchange, m) {
  m.doc() = "Codecs of gradients.";
  m.def("statistics", &statistics, nb::arg("g"), nb::arg("absolute"), nb::arg("threads"),
        "(sum, sum of squares, bits of the largest magnitude)");
  m.def("encode", &encode, nb::arg("g"), nb::arg("inv"), nb::arg("top"), nb::arg("planes"),
        nb::arg("half"), nb::arg("random"), nb::arg("key"), nb::arg("shift"), nb::arg("form"),
        nb::arg("out"), nb::arg("threads"), "Write codes into out; the bytes written.");
  m.def("decode_mean", &decode_mean, nb::arg("payloads"), nb::arg("forms"), nb::arg("units"),
        nb::arg("planes"), nb::arg("half"), nb::arg("out"), nb::arg("factor"), nb::arg("threads"),
        "out = (sum of unit * code) * factor.");
  m.def("sum_codes", &sum_codes, nb::arg("payloads"), nb::arg("forms"), nb::arg("planes"),
        nb::arg("half"), nb::arg("out"), nb::arg("threads"), "out = sum of codes.");
  m.def("pack_sums", &pack_sums, nb::arg("sums"), nb::arg("bits"), nb::arg("sparse"),
        nb::arg("out"), "Write sums into out; the bytes written.");
  m.def("decode_sums", &decode_sums, nb::arg("packed"), nb::arg("bits"), nb::arg("sparse"),
        nb::arg("factor"), nb::arg("out"), nb::arg("threads"), "out = sum * factor.");
}
