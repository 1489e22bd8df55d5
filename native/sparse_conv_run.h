// Checks and runs a direct sparse convolution: included behind each_isa.h with sparse_conv_body.h.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.h"
#include "room.h"
#include "sparse_conv.h"

namespace gossamer {

constexpr int64_t kSumsBytes = 192 << 10;  // of one worker, or those of one tile where they are more

// Nothing outside the arrays can be reached, whatever they hold.
inline void check_conv(const SparseConv& c, size_t starts, size_t order, size_t taps, size_t values) {
  const int64_t panels = c.groups * c.blocks;
  if (int64_t(starts) != panels * (c.rows + 1) || int64_t(order) != panels * c.rows)
    throw std::invalid_argument("starts or order has another length than groups, blocks and rows say");
  if (taps != values) throw std::invalid_argument("taps and values differ in length");
  const int64_t kernel = c.kh * c.kw;
  const auto greatest = GOSSAMER_PICK(isa(), greatest);
  for (int64_t q = 0; q < panels; q++) {
    const int32_t* s = c.starts + q * (c.rows + 1);
    const int32_t* o = c.order + q * c.rows;
    bool good = s[0] >= 0 && s[c.rows] <= int64_t(taps);
    for (int64_t p = 0; p < c.rows; p++) {
      const int64_t low = p / c.chunk * c.chunk, high = std::min(low + c.chunk, c.rows);
      good &= s[p] <= s[p + 1] && o[p] >= low && o[p] < high;
    }
    if (!good) throw std::invalid_argument("starts do not ascend inside taps, or order leaves its chunk");
    const int64_t planes = std::min(c.block, c.planes - q % c.blocks * c.block);
    const uint16_t most = greatest(c.taps + s[0], s[c.rows] - s[0]);
    if (s[c.rows] > s[0] && most >= planes * kernel)
      throw std::invalid_argument("a tap lies outside its block of channels");
  }
}

struct ConvSizes {  // as Python gives them, in this order
  int64_t element, images, groups, channels, planes, h, w, rows, kh, kw, oh, ow, sy, sx, top, left, dy,
      dx, block, chunk;
};

// The sizes as a convolution, without any array yet.
inline SparseConv conv_of(const ConvSizes& s, bool quads_out) {
  int64_t all[sizeof s / 8];
  std::memcpy(all, &s, sizeof s);
  for (int64_t v : all)
    if (v < 0 || v >= int64_t(1) << 31) throw std::invalid_argument("a size is not in [0, 2^31)");
  SparseConv c{};
  c.element = Element(s.element);
  c.images = s.images, c.groups = s.groups, c.channels = s.channels, c.planes = s.planes;
  c.h = s.h, c.w = s.w, c.rows = s.rows, c.kh = s.kh, c.kw = s.kw, c.oh = s.oh, c.ow = s.ow;
  c.sy = s.sy, c.sx = s.sx, c.top = s.top, c.left = s.left, c.dy = s.dy, c.dx = s.dx;
  c.block = s.block, c.chunk = s.chunk;
  if (s.element > 2 || !c.groups || !c.planes || !c.rows || !c.kh || !c.kw || !c.sy || !c.sx || !c.dy ||
      !c.dx || !c.block || !c.chunk)
    throw std::invalid_argument("a size that must be positive is zero");
  const int64_t per = c.element == Element::kPair ? 2 : 1;
  if (c.planes > c.channels * per) throw std::invalid_argument("there are more planes than channels");
  if (c.chunk % 4 || (quads_out && c.groups > 1 && c.rows % 4))
    throw std::invalid_argument("chunks, and groups that end in quads, need multiples of four rows");
  if (c.block * c.kh * c.kw > 65536) throw std::invalid_argument("a block has more than 65536 taps");
  c.blocks = (c.planes + c.block - 1) / c.block;
  c.quads_out = quads_out;
  return c;
}

// How many elements its input and its result have.
inline size_t conv_input(const SparseConv& c) {
  return size_t(c.images * c.groups * c.channels * c.h * c.w);
}
inline size_t conv_results(const SparseConv& c) {
  const int64_t all = c.groups * c.rows, written = c.quads_out ? (all + 3) / 4 : all;
  return size_t(c.images * written * c.oh * c.ow);
}

// Lines of a copy for `lines` lines of the map.
inline int64_t base_lines(const SparseConv& c, const Tiling& t, int64_t lines) {
  return lines + c.dy * (c.kh - 1) / c.sy / t.fold;
}

// Of phases of the vertical stride and first rows of a line, those that a tap needs.
inline std::vector<char> used_kinds(const SparseConv& c, const Tiling& t) {
  std::vector<char> used(size_t(c.sy * t.fold), 0);
  for (int64_t y = 0; y < c.kh; y++)
    used[size_t(c.dy * y % c.sy * t.fold + c.dy * y / c.sy % t.fold)] = 1;
  return used;
}

// Elements of a block's copies for `lines` lines of the map.
inline int64_t conv_copies(const SparseConv& c, const Tiling& t, int64_t lines, int64_t width) {
  return c.block * c.kw * c.sy * t.fold * base_lines(c, t, lines) * width;
}

// Bytes that a worker takes for itself, about.
inline double conv_scratch(const SparseConv& c) {
  if (!conv_results(c)) return 0;
  const Tiling t = GOSSAMER_PICK(isa(), tiling)(c, kSumsBytes);
  const int64_t width = t.vectors * GOSSAMER_PICK(isa(), lanes)();
  const int64_t lines = std::min((c.oh + t.fold - 1) / t.fold, t.tiles * t.tile_lines);
  return 4 * (double(conv_copies(c, t, lines, width)) + double(c.rows * lines * width));
}

// Whether each row has all taps, in their order: so that one reading of the input serves several rows.
inline bool full_rows(const SparseConv& c) {
  const int64_t kernel = c.kh * c.kw;
  for (int64_t q = 0; q < c.groups * c.blocks; q++) {
    const int64_t count = std::min(c.block, c.planes - q % c.blocks * c.block) * kernel;
    const int32_t* s = c.starts + q * (c.rows + 1);
    for (int64_t p = 0; p < c.rows; p++)
      if (s[p + 1] - s[p] != count) return false;
    for (int64_t i = 0; i < count; i++)  // the same tap may be there twice
      if (c.taps[s[0] + i] != i) return false;
    for (int64_t p = 1; p < c.rows; p++)
      if (std::memcmp(c.taps + s[0], c.taps + s[p], size_t(count) * 2)) return false;
  }
  return true;
}

// Vectors of a register tile, and bytes of the copies that it reads of one plane.
inline std::pair<int64_t, int64_t> conv_tile(const SparseConv& c) {
  const Tiling t = GOSSAMER_PICK(isa(), tiling)(c, kSumsBytes);
  const int64_t width = t.vectors * GOSSAMER_PICK(isa(), lanes)();
  const std::vector<char> used = used_kinds(c, t);
  const int64_t kinds = std::count(used.begin(), used.end(), 1);
  return {t.vectors * t.tile_lines, c.kw * kinds * base_lines(c, t, t.tile_lines) * width * 4};
}

// A convolution ready to run: what does not depend on the numbers in its arrays is found once. All
// arrays are there, as long as the sizes say, checked, and stay as they are.
class ConvRun {
 public:
  explicit ConvRun(const SparseConv& conv) : c(conv), level(isa()) {
    if (!conv_results(c)) return;
    c.full = full_rows(c);
    if (c.kh * c.kw == 1 && c.sy * c.sx == 1 && c.oh == c.h && c.ow == c.w && !c.top && !c.left) {
      c.w = c.ow = c.h * c.w;  // one long row
      c.h = c.oh = 1;
    }
    c.first = 0, c.pitch = c.ow;
    lanes = GOSSAMER_PICK(level, lanes)();
    t = GOSSAMER_PICK(level, tiling)(c, kSumsBytes);
    const int64_t over = c.ow % lanes;  // columns in vectors that they do not fill
    if (over && 2 * over <= lanes && c.ow > lanes && c.oh > 1 && !c.full) split(over);
    lay_out();
  }

  // From several threads at once, if need be, but that `out` is one array.
  void operator()(size_t threads) const {
    if (!conv_results(c)) return;
    columns(threads);
    if (rest) rest->columns(threads);
  }

 private:
  ConvRun(const SparseConv& conv, const Tiling& tiles, Isa isa, int64_t wide)
      : c(conv), level(isa), t(tiles), lanes(wide) {
    lay_out();
  }

  // The last columns on their own, where rows of them side by side in a vector are less work.
  void split(int64_t over) {
    SparseConv whole = c, part = c;
    whole.ow -= over;
    part.ow = over, part.first = whole.ow;
    const Tiling tiles = GOSSAMER_PICK(level, tiling)(whole, kSumsBytes);
    const Tiling few = GOSSAMER_PICK(level, tiling)(part, kSumsBytes);
    if (tiles.cost + few.cost > 0.95 * t.cost) return;
    rest.reset(new ConvRun(part, few, level, lanes));
    c = whole, t = tiles;
  }

  void lay_out() {
    width = t.flat ? c.ow : t.vectors * lanes;
    const int64_t down = (c.oh + t.fold - 1) / t.fold;
    most_lines = std::min(down, t.tiles * t.tile_lines);
    used = used_kinds(c, t);
    places[0] = places_of(most_lines);
    const int64_t last = down - (t.regions - 1) * most_lines;
    if (last != most_lines) places[1] = places_of(last);
  }

  void columns(size_t threads) const {
    const auto any_region = GOSSAMER_PICK(level, any_region);
    // Whole regions, and shares of the rows where there are fewer regions than threads.
    const int64_t chunks = (c.rows + c.chunk - 1) / c.chunk;
    const int64_t regions = c.images * c.groups * t.regions * t.columns;
    const int64_t wanted = int64_t(std::max<size_t>(threads, 1));
    const int64_t shares = regions >= 2 * wanted ? 1 : std::min(chunks, wanted);
    const int64_t per_share = (chunks + shares - 1) / shares * c.chunk;
    const auto up = [](int64_t count, int64_t to) { return (count + to - 1) / to * to; };
    const auto aligned = [&](int64_t count) { return up(count, 16) + 16; };
    const int64_t line = aligned(width + c.dx * c.kw + 2 * lanes);
    const int64_t copies = aligned(conv_copies(c, t, most_lines, width));
    const int64_t sums = aligned(std::min(per_share, c.rows) * up(most_lines * width, lanes));
    const size_t workers = std::min(std::max<size_t>(threads, 1), size_t(regions * shares));
    const int64_t each = line + copies + sums;
    const auto own = room(int64_t(workers) * each);
    if (t.flat)  // the last vector of a tap reads on into a copy that may never be made
      for (size_t worker = 0; worker < workers; worker++)
        std::memset(own.get() + int64_t(worker) * each + line, 0, size_t(copies) * 4);
    parallel(size_t(regions * shares), workers, [&](size_t worker, size_t item) {
      int64_t left = int64_t(item);
      const auto next = [&](int64_t of) {
        const int64_t at = left % of;
        left /= of;
        return at;
      };
      const int64_t share = next(shares), column = next(t.columns), down = next(t.regions);
      const int64_t group = next(c.groups), image = next(c.images);
      const int64_t y0 = down * most_lines * t.fold, rows = std::min(most_lines * t.fold, c.oh - y0);
      const int64_t lines = (rows + t.fold - 1) / t.fold;
      const int64_t row0 = share * per_share, row1 = std::min(row0 + per_share, c.rows);
      if (row0 >= row1) return;
      uint32_t* mine = own.get() + int64_t(worker) * each;
      const int64_t x0 = column * width, some = std::min(width, c.ow - x0);
      const Region region{image,     group, y0,    rows, lines, c.first + x0, some, width,
                          base_lines(c, t, lines)};
      any_region(c, t, region, row0, row1, places[lines != most_lines].data(), used.data(), mine,
                 mine + line, mine + line + copies);
    });
  }

  // Where the copy of each tap begins, for regions of so many lines.
  std::vector<uint32_t> places_of(int64_t lines) const {
    std::vector<uint32_t> made(size_t(c.block * c.kh * c.kw));
    const int64_t base = base_lines(c, t, lines);
    size_t at = 0;
    for (int64_t p = 0; p < c.block; p++)
      for (int64_t y = 0; y < c.kh; y++)
        for (int64_t x = 0; x < c.kw; x++) {
          const int64_t phase = c.dy * y % c.sy, down = c.dy * y / c.sy;
          const int64_t kind = ((p * c.kw + x) * c.sy + phase) * t.fold + down % t.fold;
          made[at++] = uint32_t((kind * base + down / t.fold) * width);
        }
    const int64_t panels = c.groups * c.blocks, all = c.rows + 1;
    std::vector<uint32_t> every(size_t(*std::max_element(c.starts, c.starts + panels * all)));
    for (int64_t q = 0; q < panels; q++)  // what lies between them was not looked at
      for (int32_t i = c.starts[q * all]; i < c.starts[q * all + c.rows]; i++)
        every[size_t(i)] = made[c.taps[i]];
    return every;
  }

  SparseConv c;
  Isa level;
  Tiling t{};
  int64_t lanes = 0, width = 0, most_lines = 0;
  std::shared_ptr<const ConvRun> rest;  // the columns behind these
  std::vector<char> used;
  std::vector<uint32_t> places[2];  // of a whole region, and of the last where it is shorter
};

}  // namespace gossamer
