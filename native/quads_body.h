// Codes of seven bits, four channels to a word: made of floats, floats of them, pools over them.
// Compiled for each instruction set (each_isa.h); run by quads_run.h.

// One quad of `count` channels, each `size` floats behind the last; whether all are finite.
static bool quantize_quad(const float* from, int64_t count, int64_t size, float factor, float shift,
                          uint32_t* to) {
  const F top = splat(127.0f), scale = splat(factor), bias = splat(shift);
  const I there = splat(count == 4 ? -1 : int32_t((1u << (8 * count)) - 1));
  I bad{};
  for (int64_t x = 0; x < size; x += kLanes) {
    const int left = int(size - x < kLanes ? size - x : kLanes);
    F v[4];
    for (int k = 0; k < 4; k++) {
      v[k] = (F)load_part(from + (k < count ? k : 0) * size + x, 0, left, I{});
      bad |= (I)(v[k] - v[k] != 0);  // NaN is not equal to anything
      v[k] = v[k] * scale + bias;
    }
    store_first(to + x, to_quads(v[0], v[1], v[2], v[3], top) & there, left);
  }
  int32_t any = 0;
  for (int i = 0; i < kLanes; i++) any |= bad[i];
  return !any;
}

static void dequantize_quad(const uint32_t* from, int64_t count, int64_t size, float factor,
                            float shift, float* to) {
  for (int64_t x = 0; x < size; x += kLanes) {
    const int left = int(size - x < kLanes ? size - x : kLanes);
    const I quad = load_part(from + x, 0, left, I{});
    for (int64_t k = 0; k < count; k++)
      store_first(to + k * size + x, to_float((I)((U)quad >> int(8 * k)) & 255) * factor + shift,
                  left);
  }
}

GOSSAMER_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One plane of words: the greatest of each byte in each window. Outside of the map is the least code.
// `line`: room for `pool.line()` words, whose ends stay zero.
static void max_pool_plane(const QuadPool p, const uint32_t* x, uint32_t* y, uint32_t* line) {
  const int64_t whole = p.line();
  for (int64_t i = 0; i < whole; i++) line[i] = 0;
  uint32_t* inside = line + p.left;
  for (int64_t row = 0; row < p.oh; row++, y += p.ow) {
    const int64_t first = row * p.sy - p.top;
    for (int64_t at = 0; at < p.w; at += kLanes) {
      const int left = int(least(p.w - at, kLanes));
      I most{};
      for (int64_t k = 0; k < p.kh; k++) {
        const int64_t from = first + k * p.dy;
        if (from >= 0 && from < p.h)
          most = greater_bytes(most, load_part(x + from * p.w + at, 0, left, I{}));
      }
      store_first(inside + at, most, left);
    }
    for (int64_t at = 0; at < p.ow; at += kLanes) {
      I most{};
      for (int64_t k = 0; k < p.kw; k++) {
        const uint32_t* from = line + at * p.sx + k * p.dx;
        I seen;
        if (p.sx == 1) seen = load<I>(from);
        else if (p.sx == 2) seen = even_lanes(load<I>(from), load<I>(from + kLanes));
        else
          for (int i = 0; i < kLanes; i++) seen[i] = int32_t(from[i * p.sx]);
        most = greater_bytes(most, seen);
      }
      store_first(y + at, most, int(least(p.ow - at, kLanes)));
    }
  }
}
