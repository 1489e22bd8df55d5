// Direct sparse convolution over shifted copies: see sparse_conv.cpp. Compiled for each instruction
// set (each_isa.h).

struct FloatOp {
  typedef F Sum;
  GOSSAMER_INLINE F weight(uint32_t bits) {
    float w;
    __builtin_memcpy(&w, &bits, 4);
    return splat(w);
  }
  GOSSAMER_INLINE F step(F sum, const I& x, F w) { return madd(sum, w, (F)x); }
  GOSSAMER_INLINE I spread(const I& v, int64_t) { return v; }
  GOSSAMER_INLINE F real(F v, F scale) { return v * scale; }
};
struct QuadOp {
  typedef I Sum;
  GOSSAMER_INLINE I weight(uint32_t bits) { return splat(int32_t(bits)); }
  GOSSAMER_INLINE I step(I sum, const I& x, I w) { return dot4(sum, x, w); }
  GOSSAMER_INLINE I spread(const I& v, int64_t) { return v; }
  GOSSAMER_INLINE F real(I v, F scale) { return to_float(v) * scale; }
};
struct PairOp {
  typedef I Sum;
  GOSSAMER_INLINE I weight(uint32_t bits) { return splat(int32_t(bits)); }
  GOSSAMER_INLINE I step(I sum, const I& x, I w) { return dot2(sum, x, w); }
  // Bytes 0 and 1, or 2 and 3, to 16 bits each.
  GOSSAMER_INLINE I spread(const I& quad, int64_t half) {
    const I v = half ? (I)((U)quad >> 16) : quad & 0xffff;
    return (v & 255) | (v & 0xff00) << 8;
  }
  GOSSAMER_INLINE F real(I v, F scale) { return to_float(v) * scale; }
};

constexpr int kMost = 14;  // sums in registers
// Where rows have the same taps, a loaded vector serves four of them.
constexpr int kFullRows = 4;
constexpr int kFullMost = kLanes == 16 ? 6 : kLanes == 4 ? 4 : 2;  // vectors of each, of 32 or 16 registers

struct Panel {  // the rows of one block for one register tile
  const int32_t* starts;
  const int32_t* order;
  int64_t from, to, base;  // positions, and the row that sums begin with
  const uint32_t* places;  // of each tap's copy, in elements
  const uint32_t* values;
  const uint32_t* copies;
  uint32_t* sums;
  int64_t pitch;  // of a row of sums
};

template <class Op, int N, bool First>
static void accumulate(const Panel p) {
  typedef typename Op::Sum Sum;
  const uint32_t* copies = p.copies;
  for (int64_t r = p.from; r < p.to; r++) {
    const uint32_t *tap = p.places + p.starts[r], *end = p.places + p.starts[r + 1];
    const uint32_t* value = p.values + p.starts[r];
    uint32_t* sums = p.sums + (p.order[r] - p.base) * p.pitch;
    Sum s[N];
    if (!First && tap == end) continue;
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) s[j] = First ? Sum{} : load<Sum>(sums + j * kLanes);
    for (; tap != end; tap++, value++) {
      const uint32_t* x = copies + *tap;
      const Sum w = Op::weight(*value);
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) s[j] = Op::step(s[j], load<I>(x + j * kLanes), w);
    }
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) store(sums + j * kLanes, s[j]);
  }
}

// As accumulate, where every row has the taps of the first.
template <class Op, int N, bool First>
static void accumulate_full(const Panel p) {
  typedef typename Op::Sum Sum;
  const uint32_t* copies = p.copies;
  int64_t r = p.from;
  for (; r + kFullRows <= p.to; r += kFullRows) {
    const int64_t begin = p.starts[r], count = p.starts[r + 1] - begin;
    const uint32_t* tap = p.places + begin;
    const uint32_t* value = p.values + begin;
    uint32_t* sums[kFullRows];
    Sum s[kFullRows][N];
#pragma GCC unroll 4
    for (int k = 0; k < kFullRows; k++) {
      sums[k] = p.sums + (p.order[r + k] - p.base) * p.pitch;
#pragma GCC unroll 6
      for (int j = 0; j < N; j++) s[k][j] = First ? Sum{} : load<Sum>(sums[k] + j * kLanes);
    }
    for (int64_t i = 0; i < count; i++) {
      const uint32_t* x = copies + tap[i];
      I v[N];
#pragma GCC unroll 6
      for (int j = 0; j < N; j++) v[j] = load<I>(x + j * kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < kFullRows; k++) {
        const Sum w = Op::weight(value[i + k * count]);
#pragma GCC unroll 6
        for (int j = 0; j < N; j++) s[k][j] = Op::step(s[k][j], v[j], w);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kFullRows; k++)
#pragma GCC unroll 6
      for (int j = 0; j < N; j++) store(sums[k] + j * kLanes, s[k][j]);
  }
  Panel rest = p;
  rest.from = r;
  accumulate<Op, N, First>(rest);
}

template <class Op, bool First>
static void accumulate_any(int64_t n, bool full, const Panel& p) {
  static void (*const of_full[])(Panel) = {
      accumulate_full<Op, 1, First>, accumulate_full<Op, 2, First>, accumulate_full<Op, 3, First>,
      accumulate_full<Op, 4, First>, accumulate_full<Op, 5, First>, accumulate_full<Op, 6, First>};
  if (full && n <= kFullMost) return of_full[n - 1](p);
  static void (*const all[])(Panel) = {
      accumulate<Op, 1, First>,  accumulate<Op, 2, First>,  accumulate<Op, 3, First>,
      accumulate<Op, 4, First>,  accumulate<Op, 5, First>,  accumulate<Op, 6, First>,
      accumulate<Op, 7, First>,  accumulate<Op, 8, First>,  accumulate<Op, 9, First>,
      accumulate<Op, 10, First>, accumulate<Op, 11, First>, accumulate<Op, 12, First>,
      accumulate<Op, 13, First>, accumulate<Op, 14, First>};
  all[n - 1](p);
}

constexpr int64_t kFirstLevel = 32 << 10;  // bytes of copies that about stay in the first-level cache

// Tiles with the least work: a tap costs its vectors and about one and a half for the broadcast, and
// every vector beyond the map is lost. Where the copies of one plane already leave the first-level
// cache, a vector costs nearly twice as much. `sums_bytes`: what the sums of a region may take.
static Tiling tiling(const SparseConv& c, int64_t sums_bytes) {
  int64_t fold = 1;
  while (fold < c.oh && 2 * fold * c.ow <= kLanes) fold *= 2;
  const int64_t across = (c.ow + kLanes - 1) / kLanes, down = (c.oh + fold - 1) / fold;
  const int64_t largest = c.full ? kFullMost : kMost;
  const int64_t kinds = (c.kh < c.sy ? c.kh : c.sy) * fold, halo = c.dy * (c.kh - 1) / c.sy / fold;
  Tiling best{};
  double least = 0;
  for (int64_t v = 1; v <= across && v <= largest; v++) {
    const int64_t columns = (across + v - 1) / v;
    for (int64_t lines = 1; lines * v <= largest && lines <= down; lines++) {
      const int64_t copies = c.kw * kinds * (lines + halo) * v * kLanes * 4;
      const double each = copies > kFirstLevel ? 1.8 : 1.0;
      const auto tile = [&](int64_t n) { return each * double(n * v) + 1.5; };
      const int64_t whole = down / lines, rest = down % lines;
      const double cost =
          double(columns) * (double(whole) * tile(lines) + (rest ? tile(rest) : 0));
      if (!best.vectors || cost <= least) least = cost, best = {v, lines, 1, columns, 0, fold, false, cost};
    }
  }
  // Vectors that cross lines of the cache take twice as long to load: for dense rows alone, which
  // share what they load.
  if (c.full && fold == 1 && c.oh > 1 && across * kLanes * 16 >= c.ow * 17)
    best = {across, 1, 1, 1, 0, 1, true, least};
  const int64_t tile_bytes = c.rows * best.vectors * best.tile_lines * kLanes * 4;
  const int64_t most = (down + best.tile_lines - 1) / best.tile_lines;
  best.tiles = tile_bytes < sums_bytes ? sums_bytes / tile_bytes : 1;
  best.tiles = best.tiles > most ? most : best.tiles;
  best.regions = (most + best.tiles - 1) / best.tiles;
  return best;
}

static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
static int64_t between(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}

// Columns (x0 + x) * sx + shift of a row of the input, for 0 <= x < width; `fill` outside of it.
GOSSAMER_INLINE void take_line(const SparseConv& c, const uint32_t* from, int64_t x0, int64_t shift,
                               int64_t width, uint32_t* to) {
  if (c.sx == 2 && from) {
    const I fill = splat(int32_t(c.fill));
    for (int64_t x = 0; x < width; x += kLanes) {
      const int64_t at = (x0 + x) * 2 + shift, more = at + kLanes;
      store(to + x, even_lanes(load_part(from + at, -at, c.w - at, fill),
                               load_part(from + more, -more, c.w - more, fill)));
    }
    return;
  }
  const int64_t first = from ? between(-floor_div(shift, c.sx) - x0, 0, width) : width;
  const int64_t end = between(floor_div(c.w - 1 - shift, c.sx) + 1 - x0, first, width);
  for (int64_t x = 0; x < first; x++) to[x] = c.fill;
  for (int64_t x = first; x < end; x++) to[x] = from[(x0 + x) * c.sx + shift];
  for (int64_t x = end; x < width; x++) to[x] = c.fill;
}

// Row q of a phase, columns x and on, into the copies it belongs to. `to`: of a kernel column and a
// phase; `used`: the first rows of a line that a tap needs.
template <int Fold>
GOSSAMER_INLINE void put(const Region& r, const char* used, int64_t q, int64_t x, I v, uint32_t* to) {
  if (Fold == 1) return store_first(to + q * r.width + x, v, int(r.width - x));
  constexpr int64_t part = kLanes / Fold;
#pragma GCC unroll 16
  for (int64_t first = 0; first < Fold && first <= q; first++) {
    const int64_t line = (q - first) / Fold;
    if (used[first] && line < r.base_lines)
      __builtin_memcpy(to + (first * r.base_lines + line) * kLanes + (q - first) % Fold * part, &v,
                       sizeof v / Fold);
  }
}

// Copies of `count` planes of a block, one for each kernel column; rows of one phase of the vertical
// stride lie together, so that a step down is a row wherever a tap begins. Where `Fold` rows share a
// vector, a copy for each row that a line can begin with: then a step down is a line of one of them.
// `used`: phase * Fold + first row, of those that a tap needs.
template <class Op, int Fold>
static void make_copies(const SparseConv c, const Region r, int64_t plane, int64_t count,
                        const char* used, uint32_t* line, uint32_t* copies) {
  const int64_t per = c.element == Element::kPair ? 2 : 1, size = c.h * c.w;
  const int64_t reach = (r.width + c.dx * (c.kw - 1) / c.sx + kLanes - 1) / kLanes * kLanes;
  const int64_t phased = Fold * r.base_lines * r.width, column = c.sy * phased;
  const int64_t rows = Fold * (r.base_lines + 1) - 1;
  for (int64_t p = 0; p < count; p++, copies += c.kw * column) {
    const int64_t channel = (r.image * c.groups + r.group) * c.channels + (plane + p) / per;
    const int64_t half = (plane + p) % per;
    const uint32_t* map = c.input + channel * size;
    const I fill = splat(int32_t(c.fill)), outside = Op::spread(fill, half);
    for (int64_t phase = 0; phase < c.sy; phase++) {
      const char* of_phase = used + phase * Fold;
      bool any = false;
      for (int64_t first = 0; first < Fold; first++) any |= of_phase[first] != 0;
      if (!any) continue;
      const int64_t y = r.y0 * c.sy - c.top + phase;  // of row 0
      const int64_t begin = between(-floor_div(y, c.sy), 0, rows);
      const int64_t end = between(floor_div(c.h - 1 - y, c.sy) + 1, begin, rows);
      uint32_t* to = copies + phase * phased;
      if (c.sx == 1) {
        for (int64_t kx = 0; kx < c.kw; kx++, to += column)
          for (int64_t x = 0; x < r.width; x += kLanes) {
            const int64_t at = r.x0 + x + kx * c.dx - c.left;
            const int low = inside(-at), high = inside(c.w - at);
            const Lanes lanes = lanes_between(low, high > low ? high : low);
            const uint32_t* from = map + ((y + begin * c.sy) * c.w + at);
            for (int64_t q = 0; q < begin; q++) put<Fold>(r, of_phase, q, x, outside, to);
            for (int64_t q = begin; q < end; q++, from += c.sy * c.w)
              put<Fold>(r, of_phase, q, x, Op::spread(load_lanes(from, lanes, fill), half), to);
            for (int64_t q = end; q < rows; q++) put<Fold>(r, of_phase, q, x, outside, to);
          }
        continue;
      }
      for (int64_t q = 0; q < rows; q++)
        for (int64_t k = 0; k < c.sx; k++) {  // phases of the horizontal stride share a line
          bool taken = false;
          for (int64_t kx = 0; kx < c.kw; kx++) {
            if (kx * c.dx % c.sx != k) continue;
            if (!taken) {
              const bool inside_map = q >= begin && q < end;
              take_line(c, inside_map ? map + (y + q * c.sy) * c.w : nullptr, r.x0, k - c.left,
                        reach, line);
            }
            taken = true;
            for (int64_t x = 0; x < r.width; x += kLanes)
              put<Fold>(r, of_phase, q, x,
                        Op::spread(load<I>(line + kx * c.dx / c.sx + x), half), to + kx * column);
          }
        }
    }
  }
}

typedef void (*Copier)(SparseConv, Region, int64_t, int64_t, const char*, uint32_t*, uint32_t*);

// Structs go by value to what stores vectors: a store may alias what a reference names, and all its
// fields would be read again.
template <class Op>
static Copier copier(int64_t fold) {
  if constexpr (kLanes == 16) {
    if (fold == 16) return make_copies<Op, 16>;
    if (fold == 8) return make_copies<Op, 8>;
  }
  if constexpr (kLanes == 8) {
    if (fold == 8) return make_copies<Op, 8>;
  }
  return fold == 4 ? make_copies<Op, 4> : fold == 2 ? make_copies<Op, 2> : make_copies<Op, 1>;
}

// Where the sums of a row of the map begin; there is a vector of room behind the last.
GOSSAMER_INLINE int64_t place_of(const Region& r, int64_t fold, int64_t m, int64_t y) {
  return (m * r.lines + y / fold) * r.width + y % fold * (kLanes / fold);
}

template <class Op>
static void finish_floats(const SparseConv c, const Region r, int64_t fold, int64_t from,
                          int64_t to, const uint32_t* sums) {
  const F low = splat(c.low), high = splat(c.high);
  for (int64_t m = from; m < to; m++) {
    const int64_t channel = r.group * c.rows + m;
    const F scale = splat(c.scale ? c.scale[channel] : 1.0f), bias = splat(c.bias ? c.bias[channel] : 0.0f);
    const int64_t at = (r.image * c.groups * c.rows + channel) * c.oh * c.pitch;
    for (int64_t y = 0; y < r.rows; y++) {
      const uint32_t* s = sums + place_of(r, fold, m - from, y);
      for (int64_t x = 0; x < r.columns; x += kLanes) {
        const int64_t place = at + (r.y0 + y) * c.pitch + r.x0 + x;
        const int left = int(r.columns - x);
        F v = Op::real(load<typename Op::Sum>(s + x), scale) + bias;
        if (c.residual)
          v += (F)load_part((const float*)c.residual + place, 0, left, I{}) * c.residual_scale;
        store_first((float*)c.out + place, clamp(v, low, high), left);
      }
    }
  }
}

// Four rows at a time to quads; rows that do not exist are zero.
template <class Op, bool Added>
static void finish_quads(const SparseConv c, const Region r, int64_t fold, int64_t from,
                         int64_t to, const uint32_t* sums) {
  typedef typename Op::Sum Sum;
  const F high = splat(c.high), step = splat(c.residual_scale);
  const I low = to_nearest(splat(c.low)) * 0x01010101;
  const int64_t quads = (c.groups * c.rows + 3) / 4, pitch = r.lines * r.width;
  for (int64_t m = from; m < to; m += 4) {
    const int64_t channel = r.group * c.rows + m;
    const int count = to - m < 4 ? int(to - m) : 4;
    const I there = splat(count == 4 ? -1 : int32_t((1u << (8 * count)) - 1));
    F scale[4], bias[4];
    for (int k = 0; k < 4; k++) {
      scale[k] = splat(k < count && c.scale ? c.scale[channel + k] : 1.0f);
      bias[k] = splat(k < count && c.bias ? c.bias[channel + k] : 0.0f);
    }
    const int64_t next = count > 1 ? pitch : 0, third = count > 2 ? 2 * pitch : 0;
    const int64_t last = count > 3 ? 3 * pitch : 0;
    const int64_t at = (r.image * quads + channel / 4) * c.oh * c.pitch;
    for (int64_t y = 0; y < r.rows; y++)
      for (int64_t x = 0; x < r.columns; x += kLanes) {
        const int64_t place = at + (r.y0 + y) * c.pitch + r.x0 + x;
        const int left = int(r.columns - x);
        const uint32_t* s = sums + place_of(r, fold, m - from, y) + x;
        F v[4] = {Op::real(load<Sum>(s), scale[0]), Op::real(load<Sum>(s + next), scale[1]),
                  Op::real(load<Sum>(s + third), scale[2]), Op::real(load<Sum>(s + last), scale[3])};
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) v[k] += bias[k];
        if (Added) {
          const I more = load_part((const uint32_t*)c.residual + place, 0, left, I{});
#pragma GCC unroll 4
          for (int k = 0; k < 4; k++) v[k] += to_float((I)((U)more >> (8 * k)) & 255) * step;
        }
        const I quad = greater_bytes(to_quads(v[0], v[1], v[2], v[3], high), low);
        store_first((uint32_t*)c.out + place, quad & there, left);
      }
  }
}

// Rows row0 .. row1 of the weight over one region.
template <class Op>
static void region(const SparseConv& c, const Tiling& t, const Region& r, int64_t row0,
                   int64_t row1, const uint32_t* places, const char* used, uint32_t* line,
                   uint32_t* copies, uint32_t* sums) {
  const Copier copy = copier<Op>(t.fold);
  const int64_t vectors = (r.lines * r.width + kLanes - 1) / kLanes, whole = t.tile_lines * t.vectors;
  const int64_t tile = t.flat ? kFullMost : whole;
  Region sum = r;  // as sums lie: of a flat map in one line
  if (t.flat) sum.rows = sum.lines = 1, sum.columns = r.rows * r.width, sum.width = vectors * kLanes;
  for (int64_t b = 0; b < c.blocks; b++) {
    const int64_t plane = b * c.block, q = r.group * c.blocks + b;
    const int64_t count = c.planes - plane < c.block ? c.planes - plane : c.block;
    copy(c, r, plane, count, used, line, copies);
    for (int64_t v = 0; v < vectors; v += tile) {
      const int64_t some = vectors - v < tile ? vectors - v : tile;
      const Panel panel{c.starts + q * (c.rows + 1), c.order + q * c.rows, row0, row1, row0, places,
                        c.values, copies + v * kLanes, sums + v * kLanes,
                        sum.lines * sum.width};
      if (b) accumulate_any<Op, false>(some, c.full, panel);
      else accumulate_any<Op, true>(some, c.full, panel);
    }
  }
  if (c.quads_out && c.residual) finish_quads<Op, true>(c, sum, t.fold, row0, row1, sums);
  else if (c.quads_out) finish_quads<Op, false>(c, sum, t.fold, row0, row1, sums);
  else finish_floats<Op>(c, sum, t.fold, row0, row1, sums);
}

static void any_region(const SparseConv& c, const Tiling& t, const Region& r, int64_t row0,
                       int64_t row1, const uint32_t* places, const char* used, uint32_t* line,
                       uint32_t* copies, uint32_t* sums) {
  if (c.element == Element::kFloat)
    region<FloatOp>(c, t, r, row0, row1, places, used, line, copies, sums);
  else if (c.element == Element::kQuad)
    region<QuadOp>(c, t, r, row0, row1, places, used, line, copies, sums);
  else
    region<PairOp>(c, t, r, row0, row1, places, used, line, copies, sums);
}

static int64_t lanes() { return kLanes; }
