// Weights as the kernels read them, made once when a plan is loaded. The layouts, and the rules for
// sizes of blocks, are those of gossamer.runtime.kernels (conv, conv_int8, gemv, gemv_int8).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "../../sparse_conv_run.h"
#include "plan.h"

namespace gossamer::c {

struct Window {  // of a convolution over a map
  int64_t kh = 1, kw = 1, sy = 1, sx = 1, top = 0, left = 0, bottom = 0, right = 0, dy = 1, dx = 1;
  int64_t h = 0, w = 0;  // of the input; 0 where they are not known

  // Output size; 0 where the window does not fit.
  static int64_t places(int64_t size, int64_t before, int64_t after, int64_t k, int64_t d,
                        int64_t s) {
    const int64_t left = size + before + after - d * (k - 1) - 1;
    return left < 0 ? 0 : left / s + 1;
  }
  int64_t high(int64_t h) const { return places(h, top, bottom, kh, dy, sy); }
  int64_t wide(int64_t w) const { return places(w, left, right, kw, dx, sx); }
};

struct PackedConv {
  Element element = Element::kFloat;
  Window window;
  int64_t groups = 1, rows = 0, planes = 0, channels = 0;  // channels: of a group, in elements
  int64_t block = 1, blocks = 1;
  std::vector<int32_t> starts, order;
  std::vector<uint16_t> taps;
  std::vector<uint32_t> values;
};

constexpr int64_t kChunk = 128;  // rows that are ordered by their number of taps

// values: bits of (groups * rows, planes, kh, kw); zeros are left out.
inline void pack_taps(PackedConv& p, const std::vector<uint32_t>& values) {
  const int64_t kernel = p.window.kh * p.window.kw, panel = p.planes * kernel;
  const size_t live = values.size() - size_t(std::count(values.begin(), values.end(), 0u));
  const double density = double(live) / double(std::max<size_t>(values.size(), 1));
  const bool full = density > 0.8;  // rows of the same taps share what they load
  const size_t taken = full ? values.size() : live;
  p.taps.reserve(taken + 1), p.values.reserve(taken + 1);
  // Copies for a register tile about stay in the first-level cache; few taps take more.
  double vectors = 14, copies = 14 * 48 * 1.3 * double(p.window.kw);
  if (const int64_t oh = p.window.high(p.window.h), ow = p.window.wide(p.window.w); oh && ow) {
    SparseConv c{};
    c.rows = p.rows, c.kh = p.window.kh, c.kw = p.window.kw, c.oh = oh, c.ow = ow;
    c.sy = p.window.sy, c.dy = p.window.dy;
    if (kernel == 1 && c.sy * p.window.sx == 1 && oh == p.window.h && ow == p.window.w)
      c.oh = 1, c.ow = oh * ow;  // one long row
    const auto [v, bytes] = conv_tile(c);
    vectors = double(v), copies = double(bytes);
  }
  const double fit = double(36 << 10) / copies;
  const double wanted = (6 + 60 / vectors) / std::max(density * double(kernel), 1e-9);
  const double block = std::nearbyint(std::min(std::max(fit, wanted), 4 * fit));
  p.block = std::max<int64_t>(1, std::min({p.planes, int64_t(block), 65536 / kernel}));
  p.blocks = (p.planes + p.block - 1) / p.block;
  std::vector<std::pair<int64_t, int64_t>> by(static_cast<size_t>(p.rows));  // taps, row
  for (int64_t g = 0; g < p.groups; g++)
    for (int64_t b = 0; b < p.blocks; b++) {
      const int64_t first = b * p.block * kernel;
      const int64_t count = std::min(p.block * kernel, panel - first);
      for (int64_t r = 0; r < p.rows; r++) {
        const uint32_t* v = values.data() + (g * p.rows + r) * panel + first;
        by[size_t(r)] = {full ? count : count - std::count(v, v + count, 0u), r};
      }
      for (int64_t r = 0; r < p.rows; r += kChunk)
        std::stable_sort(by.begin() + r, by.begin() + std::min(r + kChunk, p.rows),
                         [](const auto& x, const auto& y) { return x.first < y.first; });
      p.starts.push_back(int32_t(p.taps.size()));
      for (const auto& [taps, r] : by) {
        const uint32_t* v = values.data() + (g * p.rows + r) * panel + first;
        size_t at = p.taps.size();
        p.taps.resize(at + size_t(taps) + 1), p.values.resize(at + size_t(taps) + 1);
        for (int64_t i = 0; i < count; i++) {  // without a branch: where zeros lie is not foreseen
          p.taps[at] = uint16_t(i), p.values[at] = v[i];
          at += full || v[i] != 0;
        }
        p.taps.resize(at), p.values.resize(at);
        if (at >= size_t(1) << 31) throw Unsupported("a weight of 2^31 entries");
        p.order.push_back(int32_t(r)), p.starts.push_back(int32_t(p.taps.size()));
      }
    }
}

// A float32 weight, (groups * rows, channels of a group, kh, kw).
inline PackedConv pack_conv(const float* w, int64_t outputs, int64_t channels, int64_t groups,
                            const Window& window) {
  PackedConv p;
  p.window = window, p.groups = groups, p.rows = outputs / groups;
  p.planes = p.channels = channels;
  std::vector<uint32_t> bits(size_t(outputs * channels * window.kh * window.kw));
  std::memcpy(bits.data(), w, bits.size() * 4);
  for (uint32_t& b : bits) b = b == 0x80000000u ? 0 : b;  // a negative zero is one
  pack_taps(p, bits);
  return p;
}

// A weight of bytes, in fours of channels, or in twos of 16 bits where that is less work.
inline PackedConv pack_codes(const int8_t* w, int64_t outputs, int64_t channels, int64_t groups,
                             const Window& window, bool dot_products) {
  PackedConv p;
  const int64_t kernel = window.kh * window.kw, each = outputs / groups;
  // Groups that do not come in fours are one group with zeros between.
  const bool apart = groups > 1 && (channels % 4 || each % 4);
  const int64_t inputs = apart ? groups * channels : channels, quads = (inputs + 3) / 4;
  if (double(outputs) * double(quads) * 4 * double(kernel) > double(kMostElements))
    throw Unsupported("a convolution of many groups that do not come in fours");
  std::vector<int8_t> fours(size_t(outputs * quads * kernel * 4));
  for (int64_t m = 0; m < outputs; m++)
    for (int64_t c = 0; c < channels; c++)
      for (int64_t k = 0; k < kernel; k++) {
        const int64_t at = c + (apart ? m / each * channels : 0);
        fours[size_t(((m * quads + at / 4) * kernel + k) * 4 + at % 4)] =
            w[(m * channels + c) * kernel + k];
      }
  std::vector<uint32_t> bits(fours.size() / 4);
  std::memcpy(bits.data(), fours.data(), fours.size());
  size_t live = 0, twos = 0;  // quads and pairs that are not zero
  for (size_t i = 0; i < fours.size(); i += 4) {
    const bool one = fours[i] || fours[i + 1], two = fours[i + 2] || fours[i + 3];
    live += one || two, twos += size_t(one) + size_t(two);
  }
  p.window = window, p.groups = apart ? 1 : groups, p.rows = outputs / p.groups;
  p.channels = quads;
  if (dot_products || 1.45 * double(live) <= double(twos)) {
    p.element = Element::kQuad, p.planes = quads;
    pack_taps(p, bits);
    return p;
  }
  p.element = Element::kPair, p.planes = (inputs + 1) / 2;
  std::vector<uint32_t> pairs(size_t(outputs * p.planes * kernel));
  for (int64_t m = 0; m < outputs; m++)
    for (int64_t q = 0; q < p.planes; q++)
      for (int64_t k = 0; k < kernel; k++) {
        const int8_t* at = fours.data() + ((m * quads + q / 2) * kernel + k) * 4 + q % 2 * 2;
        const int16_t wide[2] = {at[0], at[1]};
        std::memcpy(&pairs[size_t((m * p.planes + q) * kernel + k)], wide, 4);
      }
  pack_taps(p, pairs);
  return p;
}

struct PackedBytes {  // of sparse_gemv: 16 rows side by side, steps of four weights of each
  int64_t width = 0, blocks = 0, groups = 0;
  std::vector<int32_t> starts, order;
  std::vector<uint8_t> data;
};

inline PackedBytes pack_bytes(const int8_t* w, int64_t outputs, int64_t inputs, bool dot_products) {
  PackedBytes p;
  std::vector<int64_t> live(static_cast<size_t>(outputs));
  int64_t all = 0;
  for (int64_t r = 0; r < outputs; r++)
    all += live[size_t(r)] = inputs - std::count(w + r * inputs, w + (r + 1) * inputs, 0);
  const double density = double(all) / double(outputs * inputs);
  p.width = dot_products || density < 0.15 ? 128 : density < 0.35 ? 64 : 32;
  p.groups = (outputs + 15) / 16, p.blocks = (inputs + p.width - 1) / p.width;
  p.order.resize(size_t(outputs));
  std::iota(p.order.begin(), p.order.end(), 0);
  std::stable_sort(p.order.begin(), p.order.end(),
                   [&](int32_t a, int32_t b) { return live[size_t(a)] > live[size_t(b)]; });
  p.order.resize(size_t(p.groups * 16), -1);
  p.starts.push_back(0);
  for (int64_t b = 0; b < p.blocks; b++)
    for (int64_t g = 0; g < p.groups; g++) {
      const int64_t first = b * p.width, count = std::min(p.width, inputs - first);
      const auto row = [&](int64_t lane) -> const int8_t* {
        const int32_t r = p.order[size_t(g * 16 + lane)];
        return r < 0 ? nullptr : w + r * inputs + first;
      };
      int64_t most = 0;
      for (int64_t lane = 0; lane < 16; lane++)
        if (const int8_t* v = row(lane))
          most = std::max<int64_t>(most, count - std::count(v, v + count, 0));
      const int64_t steps = (most + 3) / 4;
      const size_t at = p.data.size();
      p.data.resize(at + size_t(steps) * 128);
      p.starts.push_back(p.starts.back() + int32_t(steps));
      for (int64_t lane = 0; lane < 16; lane++) {
        const int8_t* v = row(lane);
        int64_t k = 0;
        for (int64_t i = 0; v && i < count; i++)
          if (v[i]) {
            uint8_t* step = p.data.data() + at + k / 4 * 128 + 4 * lane + k % 4;
            step[0] = uint8_t(i), step[64] = uint8_t(v[i]);
            k++;
          }
      }
    }
  return p;
}

struct PackedRows {  // of float32, compressed; or none where the matrix is dense
  std::vector<int32_t> starts;
  std::vector<uint16_t> columns;
  std::vector<float> values;
};

inline PackedRows pack_rows(const float* w, int64_t outputs, int64_t inputs) {
  PackedRows p;
  const int64_t all = outputs * inputs, live = all - std::count(w, w + all, 0.0f);
  if (2 * live > all || inputs > 65536) return p;
  p.starts.push_back(0);
  for (int64_t r = 0; r < outputs; r++) {
    for (int64_t i = 0; i < inputs; i++)
      if (const float v = w[r * inputs + i]; v != 0)
        p.columns.push_back(uint16_t(i)), p.values.push_back(v);
    p.starts.push_back(int32_t(p.values.size()));
  }
  return p;
}

}  // namespace gossamer::c
