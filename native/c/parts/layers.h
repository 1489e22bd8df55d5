// Convolutions and linear layers, by the sparse kernels; included behind each_isa.h.
#pragma once
#include "../../sparse_conv_run.h"
#include "../../sparse_gemv_run.h"
#include "bind.h"

namespace gossamer::c {

inline Window window_of(const Binding& b, const Shape& weight) {
  const size_t rank = weight.size() - 2;
  const auto stride = b.each("stride", rank, 1), dilation = b.each("dilation", rank, 1);
  const auto padding = b.pairs("padding", rank);
  const size_t x = rank - 1;  // the last dimension is across, the one before it down
  Window w;
  w.kw = weight.back(), w.sx = stride[x], w.dx = dilation[x];
  w.left = padding[2 * x], w.right = padding[2 * x + 1];
  if (rank == 2) {
    w.kh = weight[2], w.sy = stride[0], w.dy = dilation[0];
    w.top = padding[0], w.bottom = padding[1];
  }
  b.fits(std::max(w.dy * (w.kh - 1), w.dx * (w.kw - 1)) <= 65536 && w.kh * w.kw <= 65536,
         "a window larger than 65536");
  return w;
}

inline int64_t groups_of(const Binding& b, const Shape& weight) {
  const int64_t groups = b.setting("groups").whole();
  b.fits(groups >= 1 && groups <= weight[0] && weight[0] % groups == 0, "groups");
  return groups;
}

// What a layer's weight is packed to; before anything is bound.
inline Packed pack(const Binding& b) {
  const std::string& op = b.node.op;
  const bool codes = op == "conv_int8" || op == "linear_int8";
  const bool steps = op == "lstm" || op == "gru";
  if (!codes && !steps && op != "conv" && op != "linear") return {};
  const Operand& w = b.in[1];
  b.fits(bool(w) && w.count() > 0, "no constant weight, or an empty one");
  if (w.dtype != (codes ? GOSSAMER_INT8 : GOSSAMER_FLOAT32))
    throw Unsupported(op + " with a weight of another type");
  const auto* bytes = reinterpret_cast<const int8_t*>(w.data);
  if (codes && w.count() / w.shape[0] > 65536) throw Unsupported("a row of more than 65536 codes");
  if (op == "linear" || op == "linear_int8" || steps) {
    b.fits(w.rank() == 2, "a weight of other dimensions");
    if (codes) return pack_bytes(bytes, w.shape[0], w.shape[1], dot_products());
    return pack_rows(w.floats(), w.shape[0], w.shape[1]);
  }
  if (w.rank() == 5) throw Unsupported("a convolution of three dimensions");
  b.fits(w.rank() == 4 || (w.rank() == 3 && !codes), "a weight of other dimensions");
  Window window = window_of(b, w.shape);
  if (const Shape& map = b.in[0].shape; w.rank() == 4 && map.size() >= 4)
    window.h = map[2], window.w = map[3];
  const int64_t groups = groups_of(b, w.shape);
  if (codes) return pack_codes(bytes, w.shape[0], w.shape[1], groups, window, dot_products());
  return pack_conv(w.floats(), w.shape[0], w.shape[1], groups, window);
}

// The sizes of a packed convolution of maps, and its weight; the kernel's own checks follow.
inline SparseConv convolution(const Binding& b, int64_t n, int64_t h, int64_t w, int64_t oh,
                              int64_t ow, bool quads) {
  const PackedConv& p = std::get<PackedConv>(b.packed);
  const Window& v = p.window;
  b.fits(oh == v.high(h) && ow == v.wide(w), "a map of another size");
  SparseConv c = conv_of({int64_t(p.element), n, p.groups, p.channels, p.planes, h, w, p.rows, v.kh,
                          v.kw, oh, ow, v.sy, v.sx, v.top, v.left, v.dy, v.dx, p.block, kChunk},
                         quads);
  c.starts = p.starts.data(), c.order = p.order.data(), c.taps = p.taps.data();
  c.values = p.values.data();
  check_conv(c, p.starts.size(), p.order.size(), p.taps.size(), p.values.size());
  if (conv_scratch(c) > double(b.limit)) throw std::bad_alloc();
  return c;
}

inline Step conv(const Binding& b) {
  const Operand &x = b.floats(0), &w = b.in[1], &bias = b.in[2], &more = b.in[3], &y = b.out;
  const Activation end(b);
  const size_t rank = w.rank();
  b.fits(x.rank() == rank && y.rank() == rank && y.shape[0] == x.shape[0], "maps of its rank");
  b.fits(x.shape[1] == w.shape[1] * groups_of(b, w.shape) && y.shape[1] == w.shape[0], "channels");
  b.fits(!bias || (bias.dtype == GOSSAMER_FLOAT32 && bias.count() == w.shape[0]), "its bias");
  if (more && (more.shape != y.shape || more.dtype != GOSSAMER_FLOAT32))
    throw Unsupported("an added value of another shape than a convolution's");
  const bool flat = rank == 3;  // of one dimension: a map of one row
  SparseConv c = convolution(b, x.shape[0], flat ? 1 : x.shape[2], x.shape[rank - 1],
                             flat ? 1 : y.shape[2], y.shape[rank - 1], false);
  c.input = reinterpret_cast<const uint32_t*>(x.data), c.out = y.data;
  c.bias = bias.floats(), c.residual = more.data, c.residual_scale = 1;
  c.low = end.low(), c.high = end.high();
  return [run = ConvRun(c), end, to = y.floats(), count = y.count()](size_t threads) {
    run(threads);
    if (end.more()) end.apply(to, count);
  };
}

inline Step linear(const Binding& b) {
  const Operand &x = b.floats(0), &w = b.in[1], &bias = b.in[2], &more = b.in[3], &y = b.out;
  const Activation end(b);
  const int64_t outputs = w.shape[0], inputs = w.shape[1];
  b.fits(x.rank() >= 1 && x.rank() == y.rank() && x.shape.back() == inputs &&
             y.shape.back() == outputs &&
             std::equal(x.shape.begin(), x.shape.end() - 1, y.shape.begin()), "rows");
  b.fits(!bias || (bias.dtype == GOSSAMER_FLOAT32 && bias.count() == outputs), "its bias");
  if (more && (more.shape != y.shape || more.dtype != GOSSAMER_FLOAT32))
    throw Unsupported("an added value of another shape than a linear layer's");
  const PackedRows& p = std::get<PackedRows>(b.packed);
  const int64_t samples = y.count() / outputs, share = 64;
  if (!p.starts.empty())
    check_rows(p.starts.data(), outputs, p.columns.data(), p.columns.size(), size_t(inputs));
  const float *from = x.floats(), *matrix = w.floats(), *shift = bias.floats(), *added = more.floats();
  float* to = y.floats();
  return [=, &p](size_t threads) {
    const Isa level = isa();
    const auto dense = GOSSAMER_PICK(level, dense_rows);
    const auto sparse = GOSSAMER_PICK(level, float_rows);
    parallel(size_t((outputs + share - 1) / share), threads, [&](size_t, size_t item) {
      const int64_t first = int64_t(item) * share, last = std::min(first + share, outputs);
      if (p.starts.empty()) dense(matrix, inputs, from, samples, first, last, to, outputs);
      for (int64_t n = 0; n < samples; n++) {
        float* row = to + n * outputs;
        if (!p.starts.empty())
          sparse(p.starts.data(), p.columns.data(), p.values.data(), from + n * inputs, first, last,
                 row);
        for (int64_t r = first; r < last; r++) {
          if (shift) row[r] += shift[r];
          if (added) row[r] += added[n * outputs + r];
        }
        end.apply(row + first, last - first);
      }
    });
  };
}

inline float finite(const Binding& b, const char* name) {
  const double result = b.setting(name).real();
  b.fits(std::isfinite(float(result)), name);
  return float(result);
}

// The zero point of codes.
inline int64_t zero_of(const Binding& b) {
  const int64_t zero = b.setting("zero").whole();
  b.fits(zero >= 0 && zero <= 127, "a zero point");
  return zero;
}

// The ends of a result: codes are of 0 to 127.
struct Ends {
  float low, high;

  explicit Ends(const Binding& b) : low(finite(b, "low")), high(finite(b, "high")) {
    b.fits(low <= high && (b.out.dtype != GOSSAMER_UINT8 || (low >= 0 && high <= 127)), "its ends");
  }
};

inline Step conv_int8(const Binding& b) {
  const Operand &x = b.in[0], &w = b.in[1], &factor = b.in[2], &shift = b.in[3], &more = b.in[4];
  const Operand& y = b.out;
  const bool codes = y.dtype == GOSSAMER_UINT8;
  const int64_t outputs = w.shape[0], inputs = w.shape[1] * groups_of(b, w.shape);
  b.fits(x.rank() == 5 && x.shape[4] == 4 && x.shape[1] == (inputs + 3) / 4, "codes in fours");
  b.fits(codes ? y.rank() == 5 && y.shape[4] == 4 && y.shape[1] == (outputs + 3) / 4
               : y.dtype == GOSSAMER_FLOAT32 && y.rank() == 4 && y.shape[1] == outputs, "its result");
  b.fits(y.shape[0] == x.shape[0], "the batch");
  b.fits(factor.count() == outputs && shift.count() == outputs, "factor and shift");
  b.fits(!more || (more.shape == y.shape && more.dtype == y.dtype), "the added value");
  SparseConv c = convolution(b, x.shape[0], x.shape[2], x.shape[3], y.shape[2], y.shape[3], codes);
  c.input = reinterpret_cast<const uint32_t*>(x.data), c.out = y.data;
  c.fill = uint32_t(zero_of(b)) * 0x01010101u;
  c.scale = factor.floats(), c.bias = shift.floats(), c.residual = more.data;
  c.residual_scale = finite(b, "step");
  const Ends ends(b);
  c.low = ends.low, c.high = ends.high;
  return ConvRun(c);
}

inline Step linear_int8(const Binding& b) {
  const Operand &x = b.in[0], &w = b.in[1], &factor = b.in[2], &shift = b.in[3], &y = b.out;
  const PackedBytes& p = std::get<PackedBytes>(b.packed);
  const int64_t outputs = w.shape[0], inputs = w.shape[1];
  const bool codes = y.dtype == GOSSAMER_UINT8;
  b.fits(codes || y.dtype == GOSSAMER_FLOAT32, "its result");
  b.fits(x.rank() == 2 && y.rank() == 2 && x.shape[0] == y.shape[0] && x.shape[1] == inputs &&
             y.shape[1] == outputs, "rows");
  b.fits(factor.count() == outputs && shift.count() == outputs, "factor and shift");
  const SparseGemv g{p.width, p.blocks, p.groups, p.starts.data(), p.data.data(), nullptr};
  check_bytes(g, p.starts.size(), p.data.size(), p.order.data(), int64_t(p.order.size()), outputs);
  const Ends ends(b);
  const GemvEnd end{factor.floats(), shift.floats(), nullptr, ends.low, ends.high};
  const int64_t n = x.shape[0], columns = p.blocks * p.width;
  // A block's own: rows filled up to whole blocks, floats that become codes.
  struct Own {
    std::vector<uint8_t> wide;
    std::vector<float> floats, scale;
    std::vector<int32_t> zero;
  };
  auto own = std::make_shared<Own>();
  if (columns != inputs) own->wide.resize(size_t(n * columns));
  if (codes) own->floats.resize(size_t(n * outputs));
  own->scale.assign(size_t(n), 1.0f), own->zero.assign(size_t(n), 0);
  const uint8_t* from = x.data;
  uint8_t* to = y.data;
  return [=, &p](size_t threads) {
    if (columns != inputs)
      for (int64_t i = 0; i < n; i++)
        std::memcpy(own->wide.data() + i * columns, from + i * inputs, size_t(inputs));
    const Samples samples{n, columns != inputs ? own->wide.data() : from, own->scale.data(),
                          own->zero.data()};
    float* results = codes ? own->floats.data() : reinterpret_cast<float*>(to);
    run_bytes(g, p.order.data(), outputs, samples, end, results, threads);
    if (codes)
      for (int64_t i = 0; i < n * outputs; i++) to[i] = uint8_t(std::nearbyint(results[i]));
  };
}

}  // namespace gossamer::c
