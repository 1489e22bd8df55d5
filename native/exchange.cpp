// gossamer._native.exchange: codecs of gradients. Statistics, codes to bytes, bytes to averages and
// exact sums. Bits depend neither on the instruction set nor on the number of threads. Payloads
// come from other machines: all are checked before anything is written, and errors are
// std::invalid_argument, which Python sees as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "exchange/coding.h"
#include "exchange/forms.h"
#include "exchange/payloads.h"
#include "exchange/shared.h"
#include "exchange/statistics.h"
#include "exchange/sums.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace gossamer;

namespace {

using Encode = void (*)(const float*, size_t, uint32_t, const Coding&, uint64_t*);

template <int P, bool Half>
Encode encode_for(Isa isa) {
#ifdef GOSSAMER_X86
  if (isa == kAvx512) return encode_avx512<P, Half>;
  if (isa == kAvx2) return encode_avx2<P, Half>;
#endif
  (void)isa;
  return encode_portable<P, Half>;
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
