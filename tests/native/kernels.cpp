// Each kernel beside a slow oracle, over random shapes, on every instruction set of this processor.
// No framework: prints what differs, and how much was compared. Built for the processor of the
// machine by tests/native/test_kernels.py, for aarch64 by native/aarch64.sh.
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../native/few_bits.h"
#include "../../native/floats.h"
#include "../../native/quads.h"
#include "../../native/sparse_conv.h"
#include "../../native/sparse_gemv.h"

#define GOSSAMER_BODY "../tests/native/bodies.h"
#include "../../native/each_isa.h"
#include "../../native/c/parts/pack.h"
#include "../../native/quads_run.h"
#include "../../native/sparse_conv_run.h"
#include "../../native/sparse_gemv_run.h"

using namespace gossamer;
using c::Window;

namespace {

std::mt19937 engine(1);
int faults = 0;
int64_t compared = 0;
std::string level;

int64_t draw(int64_t low, int64_t high) {  // both ends are possible
  return low + int64_t(engine() % uint32_t(high - low + 1));
}
float real() { return float(draw(-1000, 1000)) / 500; }

template <class T>
std::vector<T> codes(int64_t n, int64_t low, int64_t high, double density = 1) {
  std::vector<T> all(static_cast<size_t>(n));
  for (T& v : all) v = double(draw(0, 999)) < density * 1000 ? T(draw(low, high)) : T(0);
  return all;
}
std::vector<float> reals(int64_t n, double density = 1) {
  std::vector<float> all(static_cast<size_t>(n));
  for (float& v : all) v = double(draw(0, 999)) < density * 1000 ? real() : 0;
  return all;
}

void expect(const char* what, int64_t at, double got, double wanted, double allowed) {
  compared++;
  if (std::fabs(got - wanted) <= allowed || faults++ > 20) return;
  std::printf("%s, %s: %" PRId64 " is %.9g, not %.9g\n", level.c_str(), what, at, got, wanted);
}

// dot4, dot2 and look_up at the ends of what they take.
void lanes_by_hand() {
  for (int k = 0; k < 50; k++) {
    const auto acc = codes<int32_t>(16, -100000, 100000), none = codes<int32_t>(16, 0, 0);
    std::vector<uint8_t> x(64);
    std::vector<int8_t> w(64), book = codes<int8_t>(16, -128, 127);
    for (auto& v : x) v = uint8_t(k < 4 ? (k & 1) * 127 : draw(0, 127));
    for (auto& v : w) v = int8_t(k < 4 ? (k & 2 ? 127 : -128) : draw(-128, 127));
    int32_t four[16], two[16], byte[16];
    GOSSAMER_PICK(isa(), each_lane)(acc.data(), reinterpret_cast<int32_t*>(x.data()),
                                    reinterpret_cast<int32_t*>(w.data()), book.data(), four, two, byte);
    for (int i = 0; i < 16; i++) {
      int32_t sum = acc[size_t(i)], pair = acc[size_t(i)];
      for (int j = 0; j < 4; j++) sum += x[size_t(4 * i + j)] * w[size_t(4 * i + j)];
      for (int j = 0; j < 2; j++) {
        int16_t a, b;
        std::memcpy(&a, x.data() + 4 * i + 2 * j, 2);
        std::memcpy(&b, w.data() + 4 * i + 2 * j, 2);
        pair += a * b;
      }
      expect("dot4", i, four[i], sum, 0);
      expect("dot2", i, two[i], pair, 0);
      for (int j = 0; j < 4; j++)
        expect("look_up", i, int8_t(uint32_t(byte[i]) >> 8 * j), book[size_t(w[size_t(4 * i + j)] & 15)], 0);
    }
  }
}

// A convolution in all its forms: floats, quads, pairs; to floats, to quads.
void convolution(int seed) {
  const bool floats = seed % 3 == 0, quads = !floats && seed % 2;
  Window v;
  v.kh = draw(1, 4), v.kw = draw(1, 4), v.sy = draw(1, 3), v.sx = draw(1, 3);
  v.top = draw(0, 3), v.left = draw(0, 3), v.bottom = draw(0, 2), v.right = draw(0, 2);
  v.dy = draw(1, 2), v.dx = draw(1, 2);
  const int64_t groups = draw(1, 3) == 3 ? 3 : 1, channels = draw(1, 9), each = draw(1, 18);
  const int64_t n = draw(1, 2), h = draw(8, 20), w = seed % 5 ? draw(8, 30) : draw(60, 80);
  const int64_t oh = v.high(h), ow = v.wide(w), m = groups * each, all = groups * channels;
  const double density = double(draw(1, 9)) / 10;
  const int64_t weights = m * channels * v.kh * v.kw, zero = floats ? 0 : draw(0, 127);
  const auto real_weight = reals(weights, density);
  const auto byte_weight = codes<int8_t>(weights, -127, 127, density);
  const auto real_x = reals(n * all * h * w);
  const auto byte_x = codes<uint8_t>(n * all * h * w, 0, 127);
  const auto bias = reals(m);
  auto scale = reals(m);
  for (float& s : scale) s = floats ? 1 : std::fabs(s) / 500;
  const float step = 0.5f, low = quads ? 0.0f : -1.5f, high = quads ? 100.0f : 30.0f;
  // The kernel's element is chosen: with dot products fours, else what is less work; both are tried.
  const c::PackedConv p =
      floats ? c::pack_conv(real_weight.data(), m, channels, groups, v)
             : c::pack_codes(byte_weight.data(), m, channels, groups, v, seed % 4 == 1);
  SparseConv k = conv_of({int64_t(p.element), n, p.groups, p.channels, p.planes, h, w, p.rows, v.kh,
                          v.kw, oh, ow, v.sy, v.sx, v.top, v.left, v.dy, v.dx, p.block, c::kChunk}, quads);
  k.starts = p.starts.data(), k.order = p.order.data(), k.taps = p.taps.data();
  k.values = p.values.data(), k.fill = uint32_t(zero) * 0x01010101u;
  check_conv(k, p.starts.size(), p.order.size(), p.taps.size(), p.values.size());
  // Codes in fours of channels of a group, or of all where groups were put together.
  const int64_t fours = p.channels * p.groups, per = floats ? 1 : 4;
  std::vector<uint8_t> input(size_t(n * fours * h * w * 4), uint8_t(0));
  for (int64_t i = 0; i < n * all * h * w; i++) {
    const int64_t place = i % (h * w), channel = i / (h * w) % all, image = i / (h * w * all);
    if (floats) {
      std::memcpy(input.data() + 4 * i, &real_x[size_t(i)], 4);
    } else {  // groups that stay have channels in fours
      const int64_t at = ((image * fours + channel / per) * h * w + place) * 4 + channel % per;
      input[size_t(at)] = byte_x[size_t(i)];
    }
  }
  const int64_t written = quads ? (m + 3) / 4 : m;
  const auto more = reals(n * written * oh * ow);
  std::vector<uint8_t> bytes = codes<uint8_t>(n * written * oh * ow * 4, 0, 127);
  std::vector<uint32_t> out(size_t(n * written * oh * ow), 0xffffffffu);
  const bool added = seed % 7 < 3;
  k.input = reinterpret_cast<const uint32_t*>(input.data()), k.out = out.data();
  k.scale = floats ? nullptr : scale.data(), k.bias = bias.data();
  k.residual = !added ? nullptr : quads ? static_cast<const void*>(bytes.data()) : more.data();
  k.residual_scale = step, k.low = low, k.high = high;
  ConvRun{k}(size_t(1 + seed % 2));
  int64_t at = 0;
  for (int64_t image = 0; image < n; image++)
    for (int64_t o = 0; o < m; o++)
      for (int64_t y = 0; y < oh; y++)
        for (int64_t x = 0; x < ow; x++, at++) {
          double sum = 0, size = 0;
          for (int64_t q = 0; q < channels; q++)
            for (int64_t i = 0; i < v.kh; i++)
              for (int64_t j = 0; j < v.kw; j++) {
                const int64_t row = y * v.sy - v.top + i * v.dy, column = x * v.sx - v.left + j * v.dx;
                const bool inside = row >= 0 && column >= 0 && row < h && column < w;
                const int64_t from = ((image * all + o / each * channels + q) * h + row) * w + column;
                const size_t tap = size_t(((o * channels + q) * v.kh + i) * v.kw + j);
                const double product =
                    floats ? double(real_weight[tap]) * (inside ? double(real_x[size_t(from)]) : 0)
                           : double(byte_weight[tap]) * (inside ? byte_x[size_t(from)] : double(zero));
                sum += product, size += std::fabs(product);
              }
          const int64_t quad = (((image * written + o / 4) * oh + y) * ow + x) * 4 + o % 4;
          const float extra = !added ? 0 : quads ? float(bytes[size_t(quad)]) : more[size_t(at)];
          float wanted = float(sum) * scale[size_t(o)] + bias[size_t(o)];
          wanted = added ? wanted + extra * step : wanted;
          wanted = std::min(std::max(wanted, low), high);
          const auto* result = reinterpret_cast<const uint8_t*>(out.data());
          if (quads) {
            expect("conv to codes", at, result[quad], std::nearbyint(wanted), 0);
          } else {
            float got;
            std::memcpy(&got, result + 4 * at, 4);
            // of integers the same bits, where the compiler contracts nothing
            expect(floats ? "conv of floats" : "conv to floats", at, got, wanted,
                   floats ? 1e-6 * size + 1e-6 : 0);
          }
        }
}

void matrices(int seed) {
  const int64_t rows = draw(1, 70), inputs = draw(1, 300), samples = draw(1, 3);
  const double density = double(draw(0, 10)) / 10;
  // Bytes by permutes, of every width.
  const auto w = codes<int8_t>(rows * inputs, -128, 127, density);
  c::PackedBytes p = c::pack_bytes(w.data(), rows, inputs, seed % 3 == 0);
  const int64_t columns = p.blocks * p.width;
  const auto x = codes<uint8_t>(samples * inputs, 0, 127);
  std::vector<uint8_t> wide(size_t(samples * columns));
  for (int64_t i = 0; i < samples * inputs; i++)
    wide[size_t(i / inputs * columns + i % inputs)] = x[size_t(i)];
  const auto scale = reals(rows), step = reals(samples), bias = reals(rows);
  const auto zero = codes<int32_t>(samples, 0, 127);
  std::vector<int32_t> weights(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows * inputs; i++) weights[size_t(i / inputs)] += w[size_t(i)];
  const SparseGemv g{p.width, p.blocks, p.groups, p.starts.data(), p.data.data(), nullptr};
  check_bytes(g, p.starts.size(), p.data.size(), p.order.data(), int64_t(p.order.size()), rows);
  std::vector<float> y(size_t(samples * rows));
  const GemvEnd end{scale.data(), bias.data(), weights.data(), -900, 900};
  run_bytes(g, p.order.data(), rows, {samples, wide.data(), step.data(), zero.data()}, end, y.data(), 2);
  for (int64_t i = 0; i < samples * rows; i++) {
    const int64_t n = i / rows, r = i % rows;
    int32_t sum = 0;
    for (int64_t j = 0; j < inputs; j++) sum += w[size_t(r * inputs + j)] * x[size_t(n * inputs + j)];
    expect("bytes", i, y[size_t(i)], gemv_end(end, r, sum, zero[size_t(n)], step[size_t(n)]), 0);
  }
  // float32: compressed rows, dense rows.
  const auto f = reals(rows * inputs, density / 2), v = reals(samples * inputs);
  const c::PackedRows s = c::pack_rows(f.data(), rows, inputs);
  std::vector<float> dense(y.size()), sparse(y.size());
  GOSSAMER_PICK(isa(), dense_rows)(f.data(), inputs, v.data(), samples, 0, rows, dense.data(), rows);
  for (int64_t n = 0; n < samples && !s.starts.empty(); n++)
    run_rows(s.starts.data(), rows, s.columns.data(), s.values.data(), v.data() + n * inputs, nullptr,
             -900, 900, sparse.data() + n * rows, 1);
  for (int64_t i = 0; i < samples * rows; i++) {
    double sum = 0, size = 0;
    for (int64_t j = 0; j < inputs; j++) {
      const double product =
          double(f[size_t(i % rows * inputs + j)]) * double(v[size_t(i / rows * inputs + j)]);
      sum += product, size += std::fabs(product);
    }
    expect("dense rows", i, dense[size_t(i)], sum, 1e-6 * size);
    if (!s.starts.empty()) expect("compressed rows", i, sparse[size_t(i)], sum, 1e-6 * size);
  }
}

// 2-bit ternary codes and 4-bit codes of a book, as few_bits.cpp says they lie; and a book's steps.
void few_bits(int) {
  const int64_t rows = draw(1, 5) * 4, chunks = draw(1, 3);
  const auto packed = codes<uint8_t>(rows * chunks * 64, 0, 255);
  const auto book = codes<int8_t>(16, -128, 127);
  std::vector<uint8_t> ternary = packed;  // fields of 0 to 2
  for (uint8_t& b : ternary)
    for (int k = 0; k < 8; k += 2)
      if ((b >> k & 3) == 3) b = uint8_t(b ^ 1 << k);
  const auto small = codes<int8_t>(chunks * 256, -127, 127);
  const auto seven = codes<uint8_t>(chunks * 128, 0, 127);
  std::vector<int32_t> y(static_cast<size_t>(rows)), z(y);
  const auto any = GOSSAMER_PICK(isa(), any_rows);
  any({chunks, ternary.data(), nullptr}, 0, rows, small.data(), y.data());
  any({chunks, packed.data(), book.data()}, 0, rows, seven.data(), z.data());
  for (int64_t r = 0; r < rows; r++) {
    int32_t one = 0, other = 0;
    for (int64_t i = 0; i < chunks * 64; i++) {
      const size_t at = size_t(((r / 4 * chunks + i / 64) * 4 + r % 4) * 64 + i % 64);
      for (int k = 0; k < 4; k++)
        one += (ternary[at] >> 2 * k & 3) * small[size_t(i / 64 * 256 + 64 * k + i % 64)];
      for (int k = 0; k < 2; k++)
        other += book[size_t(packed[at] >> 4 * k & 15)] * seven[size_t(i / 64 * 128 + 64 * k + i % 64)];
    }
    expect("ternary", r, y[size_t(r)], one, 0);
    expect("book", r, z[size_t(r)], other, 0);
  }
  // Bytes by permutes of a book: two steps are 128 indexes and 64 bytes of two codes.
  for (const int64_t width : {32, 64, 128}) {
    const int64_t steps = 2 * draw(0, 3);
    std::vector<uint8_t> data;
    for (int64_t s = 0; s < steps; s += 2) {
      const auto index = codes<uint8_t>(128, 0, width - 1), code = codes<uint8_t>(64, 0, 255);
      data.insert(data.end(), index.begin(), index.end());
      data.insert(data.end(), code.begin(), code.end());
    }
    const int32_t starts[2] = {0, int32_t(steps)};
    const auto x = codes<uint8_t>(width, 0, 127);
    int32_t sums[16];
    data.resize(data.size() + 1);  // so that it is somewhere
    GOSSAMER_PICK(isa(), any_groups)({width, 1, 1, starts, data.data(), book.data()}, 0, 1, x.data(), sums);
    for (int lane = 0; lane < 16; lane++) {
      int32_t wanted = 0;
      for (int64_t s = 0; s < steps; s++)
        for (int j = 0; j < 4; j++) {
          const uint8_t* at = data.data() + s / 2 * 192 + 4 * lane + j;
          wanted += x[at[s % 2 * 64]] * book[size_t(at[128] >> (s % 2 * 4) & 15)];
        }
      expect("book by permutes", lane, sums[lane], wanted, 0);
    }
  }
}

// Codes of a row from its extremes, signed and of seven bits.
void rows_to_codes(int seed) {
  const int64_t n = draw(1, 40);
  auto x = reals(n, 0.8);
  std::vector<int8_t> bytes(static_cast<size_t>(n));
  std::vector<uint8_t> seven(static_cast<size_t>(n));
  float scale = 0, step = 0;
  int32_t sum = 0, zero = 0;
  const auto one = GOSSAMER_PICK(isa(), signed_bytes);
  const auto other = GOSSAMER_PICK(isa(), seven_bits);
  expect("signed bytes", 0, one(x.data(), n, bytes.data(), &scale, &sum), 1, 0);
  expect("seven bits", 0, other(x.data(), n, seven.data(), &step, &zero), 1, 0);
  for (int64_t i = 0; i < n; i++) {  // no value is further from its code than half a step
    expect("signed bytes", i, double(bytes[size_t(i)]) * scale, x[size_t(i)], 0.501 * scale);
    expect("seven bits", i, double(seven[size_t(i)] - zero) * step, x[size_t(i)], 1.001 * step);
    sum -= bytes[size_t(i)];
  }
  expect("sum of signed bytes", seed, sum, 0, 0);
  x[size_t(draw(0, n - 1))] = seed % 2 ? INFINITY : NAN;
  expect("signed bytes", 1, one(x.data(), n, bytes.data(), &scale, &sum), 0, 0);
  expect("seven bits", 1, other(x.data(), n, seven.data(), &step, &zero), 0, 0);
}

// Maps to codes in fours and back, and pools over codes.
void quads(int seed) {
  const int64_t images = draw(1, 2), channels = draw(1, 9), fours = (channels + 3) / 4;
  const int64_t h = draw(1, 9), w = draw(1, 40), size = h * w;
  auto x = reals(images * channels * size);
  std::vector<uint32_t> out(size_t(images * fours * size), 0xffffffffu);
  const auto* bytes = reinterpret_cast<const uint8_t*>(out.data());
  const float factor = 90, shift = 60;  // beyond both ends
  const bool finite = quantize_quads(x.data(), images, channels, size, factor, shift, out.data(), 2);
  expect("finite", 0, finite, 1, 0);
  std::vector<float> back(x.size());
  dequantize_quads(out.data(), images, channels, size, 0.5f, -3, back.data(), 2);
  for (int64_t n = 0; n < images; n++)
    for (int64_t c = 0; c < 4 * fours; c++)
      for (int64_t i = 0; i < size; i++) {
        const uint8_t got = bytes[((n * fours + c / 4) * size + i) * 4 + c % 4];
        const int64_t at = (n * channels + c) * size + i;
        if (c >= channels) {
          expect("a channel that fills up", i, got, 0, 0);
          continue;
        }
        const float code = std::nearbyint(x[size_t(at)] * factor + shift);
        expect("codes", at, got, std::min(127.0f, std::max(0.0f, code)), 0);
        expect("floats of codes", at, back[size_t(at)], float(got) * 0.5f - 3, 0);
      }
  const int64_t kh = draw(1, 3), kw = draw(1, 3), sy = draw(1, 3), sx = draw(1, 3);
  const int64_t dy = draw(1, 2), dx = draw(1, 2), top = draw(0, 1), left = draw(0, 1);
  const int64_t oh = (h + 2 * top - dy * (kh - 1) - 1) / sy + 1;
  const int64_t ow = (w + 2 * left - dx * (kw - 1) - 1) / sx + 1;
  if (h + 2 * top > dy * (kh - 1) && w + 2 * left > dx * (kw - 1)) {
    const QuadPool p{h, w, oh, ow, kh, kw, sy, sx, top, left, dy, dx};
    check_pool(p);
    std::vector<uint32_t> pooled(size_t(images * fours * oh * ow));
    max_pool_quads(p, images * fours, out.data(), pooled.data(), 2);
    const auto* result = reinterpret_cast<const uint8_t*>(pooled.data());
    for (int64_t i = 0; i < int64_t(pooled.size()) * 4; i++) {
      const int64_t k = i % 4, ox = i / 4 % ow, oy = i / 4 / ow % oh, plane = i / 4 / ow / oh;
      int most = 0;
      for (int64_t a = 0; a < kh; a++)
        for (int64_t b = 0; b < kw; b++) {
          const int64_t y = oy * sy - top + a * dy, at = ox * sx - left + b * dx;
          if (y >= 0 && y < h && at >= 0 && at < w)
            most = std::max(most, int(bytes[((plane * h + y) * w + at) * 4 + k]));
        }
      expect("greatest codes", i, result[i], most, 0);
    }
  }
  x[size_t(draw(0, int64_t(x.size()) - 1))] = seed % 2 ? INFINITY : NAN;
  expect("finite", 1, quantize_quads(x.data(), images, channels, size, factor, shift, out.data(), 1), 0, 0);
}

// Gates of LSTM and GRU, one step of each.
void gates(int seed) {
  const int64_t n = draw(1, 40);
  const auto x = reals(4 * n), g = reals(4 * n), bias = reals(n), c0 = reals(n), h0 = reals(n);
  std::vector<float> c = c0, h = h0, y(static_cast<size_t>(n)), state = h0, z = y;
  GOSSAMER_PICK(isa(), lstm)(x.data(), g.data(), n, c.data(), h.data(), y.data());
  const float* more = seed % 2 ? bias.data() : nullptr;
  GOSSAMER_PICK(isa(), gru)(x.data(), g.data(), more, n, state.data(), z.data());
  const auto s = [](double v) { return 1 / (1 + std::exp(-v)); };
  for (int64_t i = 0; i < n; i++) {
    const size_t at = size_t(i);
    const auto sum = [&](int64_t gate) {
      return double(x[size_t(gate * n + i)]) + double(g[size_t(gate * n + i)]);
    };
    const double cell = s(sum(1)) * c0[at] + s(sum(0)) * std::tanh(sum(2));
    expect("cell of an LSTM", i, c[at], cell, 1e-6);
    expect("state of an LSTM", i, h[at], s(sum(3)) * std::tanh(cell), 1e-6);
    expect("result of an LSTM", i, y[at], h[at], 0);
    const double own = double(g[size_t(2 * n + i)]) + (more ? double(bias[at]) : 0);
    const double fresh = std::tanh(double(x[size_t(2 * n + i)]) + s(sum(0)) * own);
    expect("state of a GRU", i, state[at], (1 - s(sum(1))) * fresh + s(sum(1)) * h0[at], 1e-6);
    expect("result of a GRU", i, z[at], state[at], 0);
  }
}

}  // namespace

#include "small.h"

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  std::vector<Isa> seen;
  for (const char* name : {"scalar", "wide", "avx2", "neon", "best"}) {
    setenv("GOSSAMER_ISA", name, 1);
    bool again = false;
    for (Isa one : seen) again |= one == isa();
    if (again) continue;
    seen.push_back(isa());
    level = "level " + std::to_string(int(isa()));
    engine.seed(1);
    lanes_by_hand();
    for (int i = 0; i < rounds; i++)
      convolution(i), matrices(i), few_bits(i), rows_to_codes(i), quads(i), gates(i), functions(), joins(),
          rows_of_floats(), pooled();
    std::printf("%s: %" PRId64 " results compared\n", level.c_str(), compared);
  }
  std::printf("%d faults\n", faults);
  return faults != 0;
}
