// LSTM and GRU a step at a time, and values that are the same everywhere; included behind each_isa.h.
#pragma once
#include "layers.h"

namespace gossamer::c {

inline Step fill(const Binding& b) {
  b.fits(b.out.dtype == GOSSAMER_FLOAT32, "its type");
  const float value = float(b.setting("value").real());
  return [value, to = b.out.floats(), n = b.out.count()](size_t) { std::fill(to, to + n, value); };
}

// x: the inputs' part of every step, (steps, batch, gates * units); w: (gates * units, units).
// y: every step's state, and of an LSTM the final cell in the last row.
inline Step recurrent(const Binding& b) {
  const bool lstm = b.node.op == "lstm";
  const int64_t gates = lstm ? 4 : 3;
  const Operand &x = b.floats(0), &w = b.floats(1), &y = b.out;
  const Operand &first = b.in[lstm ? 2 : 3], &cell = b.in[3], &bias = b.in[2];
  b.fits(x.rank() == 3 && y.rank() == 3 && w.rank() == 2, "steps of rows");
  const int64_t steps = x.shape[0], batch = x.shape[1], wide = x.shape[2], units = w.shape[1];
  b.fits(w.shape[0] == wide && wide == gates * units, "its matrix");
  b.fits(y.shape == Shape{steps + (lstm ? 1 : 0), batch, units}, "its result");
  const auto state = [&](const Operand& s) {
    b.fits(!s || (s.dtype == GOSSAMER_FLOAT32 && s.shape == Shape{batch, units}), "its first state");
  };
  state(first);
  if (lstm) state(cell);
  b.fits(lstm || !bias || (bias.dtype == GOSSAMER_FLOAT32 && bias.count() == units), "its bias");
  const bool back = b.setting("reverse").truth();
  const PackedRows& p = std::get<PackedRows>(b.packed);
  if (!p.starts.empty())
    check_rows(p.starts.data(), wide, p.columns.data(), p.columns.size(), size_t(units));
  struct Own {  // a block's: state, cell, and the state's part of the gates
    std::vector<float> h, c, g;
  };
  auto own = std::make_shared<Own>();
  own->h.resize(size_t(batch * units)), own->c.resize(own->h.size());
  own->g.resize(size_t(batch * wide));
  return [=, &p, matrix = w.floats(), from = x.floats(), h0 = first.floats(),
          c0 = lstm ? cell.floats() : nullptr, shift = lstm ? nullptr : bias.floats(),
          to = y.floats()](size_t threads) {
    const Isa level = isa();
    const auto dense = GOSSAMER_PICK(level, dense_rows);
    const auto sparse = GOSSAMER_PICK(level, float_rows);
    const auto of_lstm = GOSSAMER_PICK(level, lstm);
    const auto of_gru = GOSSAMER_PICK(level, gru);
    float *h = own->h.data(), *c = own->c.data(), *g = own->g.data();
    const auto begin = [&](float* now, const float* at_first) {
      if (at_first) std::copy(at_first, at_first + batch * units, now);
      else std::fill(now, now + batch * units, 0.0f);
    };
    begin(h, h0);
    begin(c, c0);
    for (int64_t step = 0; step < steps; step++) {
      const int64_t t = back ? steps - 1 - step : step;
      parallel(size_t((wide + 255) / 256), threads, [&](size_t, size_t item) {
        const int64_t low = int64_t(item) * 256, high = std::min(low + 256, wide);
        if (p.starts.empty()) return dense(matrix, units, h, batch, low, high, g, wide);
        for (int64_t n = 0; n < batch; n++)
          sparse(p.starts.data(), p.columns.data(), p.values.data(), h + n * units, low, high,
                 g + n * wide);
      });
      for (int64_t n = 0; n < batch; n++) {
        const float* now = from + (t * batch + n) * wide;
        float* out = to + (t * batch + n) * units;
        if (lstm) of_lstm(now, g + n * wide, units, c + n * units, h + n * units, out);
        else of_gru(now, g + n * wide, shift, units, h + n * units, out);
      }
    }
    if (lstm) std::copy(c, c + batch * units, to + steps * batch * units);
  };
}

}  // namespace gossamer::c
