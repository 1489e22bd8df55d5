// What a sparse convolution is told: sizes, weights in blocks of input channels, and how sums end.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gossamer {

// An element is 32 bits: a float, four channels of seven unsigned bits, or a pair of 16 bits.
enum class Element { kFloat = 0, kQuad = 1, kPair = 2 };

struct SparseConv {
  Element element;
  // Input: `images` x `groups` x `channels` (of quads for kQuad and kPair) x h x w; `planes` is the
  // number of channels of weights in a group: pairs are two to a quad.
  int64_t images, groups, channels, planes, h, w;
  int64_t rows, kh, kw, oh, ow;  // output rows (channels) of a group, kernel, output map
  int64_t sy, sx, top, left, dy, dx;
  // Weights. Position p of block b of group g holds the taps starts[q] .. starts[q + 1] of row
  // order[q'], with q = (g * blocks + b) * (rows + 1) + p and q' = (g * blocks + b) * rows + p; rows
  // are ordered by their number of taps inside chunks of `chunk` rows. A tap is
  // (plane in the block * kh + y) * kw + x.
  int64_t block, blocks, chunk;
  bool full;  // every row has every tap: zeros are among the values
  const int32_t* starts;
  const int32_t* order;
  const uint16_t* taps;
  const uint32_t* values;
  const uint32_t* input;
  uint32_t fill;  // of the padding
  // The end: value = sum * scale + bias (scale null: 1), + residual * residual_scale (null: none),
  // clamped to [low, high]; floats, or rounded and stored in quads.
  const float* scale;
  const float* bias;
  const void* residual;
  float residual_scale, low, high;
  bool quads_out;
  void* out;
  int64_t first, pitch;  // of `pitch` columns of the result, ow are computed, from `first` on
};

// How the map is cut: register tiles of `tile_lines` x `vectors`, `tiles` of them below each other
// share copies of the input. A line is a row of the map, or `fold` rows of a narrow map side by side
// in one vector. `flat`: rows follow each other without a gap, and vectors run on from one to the next.
struct Tiling {
  int64_t vectors, tile_lines, tiles, columns, regions, fold;
  bool flat;
  double cost;  // of a tap
};

// What is computed at once: `rows` rows of the map in `lines` lines, `columns` of them, each `width`
// from the one before; a copy has `base_lines`.
struct Region {
  int64_t image, group, y0, rows, lines, x0, columns, width, base_lines;
};

}  // namespace gossamer
