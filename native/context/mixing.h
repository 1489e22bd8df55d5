// What the context-mixing coder counts with: curves, adaptive probabilities, mixers and their first
// weights. Names as in src/gossamer/pack/coders/context_reference.py.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "range_coder.h"

namespace gossamer::context {

constexpr i32 kEdge = 3071;
constexpr i32 kPositions = 64;
constexpr i64 kRows = 1024;
constexpr size_t kLooks = 256;
constexpr i32 kHeavy = 1 << 28;  // mixing weights stay within +-kHeavy
constexpr i64 kLargest = 1 << 20;
constexpr int kBuckets = 77;  // of magnitudes up to kLargest

// What was tuned; the reference's Preset.
constexpr i32 kZeroRate = 12, kZeroBoost = 117, kZeroFirst = 6;
constexpr i32 kRowPrior = 20, kColPrior = 24, kChannelPrior = 1, kPositionPrior = 257;
constexpr i32 kCurrentPrior = 3, kNearPrior = 36;
constexpr i32 kRowWeight = 23, kColWeight = 11, kChannelWeight = 10, kPositionWeight = 18;
constexpr i32 kCurrentWeight = 5, kNearWeight = 3, kZeroCell = 5, kGuessWeight = 48;
constexpr i32 kSignRate = 14, kSignBoost = 667, kSignFirst = 3, kSignCell = 4;
constexpr i32 kOwnFlat = 180, kOwnSlope = 139, kNearFlat = 37, kNearSlope = 249;
constexpr i32 kSizeRate = 122, kSizeBoost = 364, kSizeFirst = 8, kSizeCell = 4;
constexpr i32 kMeanWeight = 20, kMeanPrior = 1, kAgreePrior = 20, kAgreeScale = 4;

struct Curves {
  std::array<i32, 65536> stretch;          // by probability
  std::array<i32, 2 * kEdge + 1> squash;   // by stretched value + kEdge
  std::array<i32, 1024> trust;             // by how often a cell was seen
  Curves() {
    constexpr std::uint64_t one = std::uint64_t{1} << 31;
    std::uint64_t e = one;
    for (i32 x = 0; x <= kEdge; ++x) {
      const i32 p = static_cast<i32>(std::min<std::uint64_t>((one << 16) / (one + e), 65535));
      squash[kEdge + x] = p;
      squash[kEdge - x] = std::max(65536 - p, 1);
      e = (e * 2139111403u + (one >> 1)) >> 31;
    }
    i32 filled = 0;
    for (i32 x = -kEdge; x <= kEdge; ++x)
      while (filled <= squash[kEdge + x]) stretch[filled++] = x;
    while (filled < 65536) stretch[filled++] = kEdge;
    for (i32 n = 0; n < 1024; ++n) trust[n] = 512 * n / (2 * n + 3);
  }
};

inline const Curves& curves() {
  static const Curves made;
  return made;
}

// 0..7 each alone, then four buckets an octave.
inline i32 bucket(u32 m) {
  if (m < 8) return static_cast<i32>(m);
  const i32 e = 31 - __builtin_clz(m);
  return 8 + (e - 3) * 4 + static_cast<i32>(m >> (e - 2) & 3);
}

template <class T>
inline T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

inline i32 band(i32 x, int shift, i32 half) { return clamp((x >> shift) + half, 0, 2 * half - 1); }

inline i32 share(i64 count, i64 of, i64 prior, i64 p) {
  return static_cast<i32>(clamp<i64>((count * 65536 + prior * p) / (of + prior), 1, 65535));
}

inline i32 sign3(i32 v) { return v == 0 ? 0 : v < 0 ? 1 : 2; }

// An adaptive probability: 22 bits, and how many bits it saw.
struct Cell {
  i32 p = 0;
  i32 seen = 0;
};

// Two sets of weights, one for all decisions and one by context, their outputs averaged.
template <int N>
struct Mixer {
  using Weights = std::array<i32, N>;
  Weights all;
  std::vector<Weights> by;
  Mixer(size_t sets, Weights first) {
    for (i32& w : first) w *= 1024;
    all = first;
    by.assign(sets, first);
  }
};

constexpr int kNear = 13, kZeroCells = 7, kSignCells = 7, kSizeCells = 10;
constexpr int kZeroN = 9 + kZeroCells, kSignN = kNear + 3 + kSignCells, kSizeN = 6 + kSizeCells;
// Cells of one bucket: by row, channel, column, recent, current, row and column, position, left
// and above, kernel, guess.
constexpr int kSizeAt[kSizeCells] = {0, 8, 16, 24, 32, 40, 104, 168, 184, 200};
constexpr int kSizeSpan = 216;

inline Mixer<kZeroN>::Weights zero_weights(bool conv) {
  Mixer<kZeroN>::Weights w = {kRowWeight,
                              kColWeight,
                              kChannelWeight,
                              conv ? kPositionWeight : 0,
                              conv ? kCurrentWeight : 0,
                              kNearWeight,
                              0,
                              kGuessWeight,
                              0};
  std::fill(w.begin() + 9, w.end(), kZeroCell);
  return w;
}

inline Mixer<kSignN>::Weights sign_weights() {
  Mixer<kSignN>::Weights w = {};
  std::fill(w.begin() + kNear + 3, w.end(), kSignCell);
  return w;
}

inline Mixer<kSizeN>::Weights size_weights() {
  Mixer<kSizeN>::Weights w = {kMeanWeight, kMeanWeight, kMeanWeight};
  std::fill(w.begin() + 6, w.end(), kSizeCell);
  return w;
}

}  // namespace gossamer::context
