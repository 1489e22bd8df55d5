// Context-mixing coder of a matrix of signed ranks. Integer arithmetic only, so that every machine
// writes and reads the same bits; src/gossamer/pack/coders/context_reference.py is its specification, and
// explains the names.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "context/mixing.h"
#include "context/range_coder.h"

namespace nb = nanobind;
using namespace gossamer::context;

namespace {

// Rank is the type that ranks are held in: it has room for the largest.
template <class Coder, class Rank>
class Model {
 public:
  Model(Coder& coder, i64 rows, i64 cols, i64 kernel, i64 stride, i64 largest)
      : coder_(coder),
        curves_(curves()),
        rows_(rows),
        cols_(cols),
        kernel_(kernel),
        stride_(stride),
        channels_(cols / kernel),
        largest_(largest),
        last_bucket_(bucket(static_cast<u32>(largest - 1))),
        zero_(kPositions, zero_weights(kernel > 1)),
        sign_(kPositions, sign_weights()),
        size_(last_bucket_ + 1, size_weights()),
        col_count_(cols + 2 * stride),
        col_sum_(cols),
        channel_count_(channels_),
        channel_sum_(channels_),
        position_count_(kernel),
        columns_(cols),
        agree_(rows),
        sign_column_(cols),
        size_cells_((last_bucket_ + 1) * kSizeSpan),
        base_cells_(last_bucket_ + 1),
        low_cells_((last_bucket_ + 1) * 8) {}

  // Code `ranks` (row-major); a decoder overwrites them, reading only what it wrote.
  void run(Rank* ranks) {
    for (y_ = 0; y_ < rows_; ++y_) {
      row_count_ = row_sum_ = row_sign_ = recent_sum_ = recent_count_ = 0;
      gap_ = last_ = 0;
      // No others are read; all of them would make a column of n rows take n^2.
      std::fill(agree_.begin() + std::max<i64>(0, y_ - kRows), agree_.begin() + y_, 0);
      for (i64 x = 0; x < cols_; ++x) entry(ranks + y_ * cols_ + x, x);
    }
  }

 private:
  // A decision: begin, inputs and cells, decide.
  void begin(i32 p) {
    p_ = p;
    base_ = curves_.stretch[p];
    inputs_ = used_ = 0;
  }
  void input(i32 x) { x_[inputs_++] = x; }
  // A counter enters as its difference from the base estimate, and starts there.
  void cell(Cell& c) {
    if (!c.seen) c.p = p_ << 6;
    cells_[used_++] = &c;
    input((curves_.stretch[c.p >> 6] - base_) * curves_.trust[c.seen] >> 8);
  }
  i32 squash(i64 x) const { return curves_.squash[clamp<i64>(x, -kEdge, kEdge) + kEdge]; }

  template <int N>
  static i64 dot(const std::array<i32, N>& w, const i32* x) {
    i64 sum = 0;
    for (int i = 0; i < N; ++i) sum += static_cast<i64>(w[i]) * x[i];
    return sum >> 16;
  }
  template <int N>
  static void learn(std::array<i32, N>& w, const i32* x, i64 error) {
    for (int i = 0; i < N; ++i)
      w[i] = static_cast<i32>(clamp<i64>(w[i] + ((error * x[i] + 524288) >> 20), -kHeavy, kHeavy));
  }
  template <int N>
  int decide(int bit, Mixer<N>& mixer, i64 which, i32 rate, i32 first) {
    const i64 a = base_ + dot<N>(mixer.all, x_), b = base_ + dot<N>(mixer.by[which], x_);
    bit = coder_.code(bit, squash((a + b) >> 1));
    const i64 target = static_cast<i64>(bit) << 16;
    learn<N>(mixer.all, x_, (target - squash(a)) * rate);
    learn<N>(mixer.by[which], x_, (target - squash(b)) * rate);
    for (int i = 0; i < used_; ++i) adapt(bit, first, *cells_[i]);
    return bit;
  }
  static void adapt(int bit, i32 first, Cell& c) {
    const i64 rate = 131072 / (2 * c.seen + first + 2);
    c.p += static_cast<i32>((((bit ? 4194303 : 0) - c.p) * rate) >> 16);
    c.seen = std::min(c.seen + 1, 1023);
  }
  // A neighbour's value, scaled by the mean magnitude; negative values count up.
  i32 pull(i32 v) const {
    if (!v) return 0;
    const i32 z =
        static_cast<i32>(std::min<i64>(768, kNearFlat + std::abs(i64{v}) * kNearSlope / scale_));
    return v < 0 ? z : -z;
  }

  void entry(Rank* at, i64 x) {
    const i64 y = y_, channel = x / kernel_, k = x % kernel_;
    const i32 kq = static_cast<i32>(std::min<i64>(k, kPositions - 1));
    if (k == 0) current_ = current_sum_ = 0;
    const i32 W = x > 0 ? at[-1] : 0, WW = x > 1 ? at[-2] : 0;
    const i32 U = x >= stride_ ? at[-stride_] : 0;
    const i64 back = kernel_ > 1 ? kernel_ : stride_ + 1;
    const i32 C = x >= back ? at[-back] : 0;
    const i32 N = y > 0 ? at[-cols_] : 0;
    const i32 NW = y > 0 && x > 0 ? at[-cols_ - 1] : 0;
    const i32 NE = y > 0 && x + 1 < cols_ ? at[-cols_ + 1] : 0;
    const i32 NN = y > 1 ? at[-2 * cols_] : 0;

    // What the neighbours' signed values, weighted as the sign mixer has learnt, say of this.
    scale_ = sum_ * 2 / (count_ + 1) + 2;
    const i64 s = stride_, reach = kernel_ > 1 ? k : x;
    const i64 offsets[8] = {1, s, s + 1, s - 1, s == 3 ? 8 : 2, 2 * s, 2 * s + 1, 2 * s - 1};
    i32 near[kNear] = {};
    for (int j = 0; j < 8; ++j)
      if (offsets[j] <= reach && (s > 1 || j == 0 || j == 4)) near[j] = pull(at[-offsets[j]]);
    near[8] = pull(kernel_ > 1 ? C : 0);
    near[9] = pull(N);
    near[10] = pull(NW);
    near[11] = pull(NE);
    near[12] = pull(NN);
    i64 hint = 0;
    for (int j = 0; j < kNear; ++j)
      hint += (static_cast<i64>(sign_.all[j]) + sign_.by[kq][j]) * near[j];
    const i32 guess = static_cast<i32>(std::min<i64>(1024, std::abs(hint >> 17)));
    const i32 surprise = guess - (guess_mean_ >> 8);
    guess_mean_ += ((guess << 8) - guess_mean_) >> 7;

    // What earlier rows say that agreed, or disagreed, with this row's signs so far.
    std::vector<u32>& column = columns_[x];
    const size_t looks = std::min(column.size(), kLooks), from = column.size() - looks;
    i64 vote = 0;
    for (size_t i = from; i < column.size(); ++i) {
      const u32 e = column[i];
      if (y - (e >> 1) < kRows) vote += e & 1 ? agree_[e >> 1] : -agree_[e >> 1];
    }
    const i64 size = std::abs(vote) * 256 * kAgreeScale / (row_count_ + kAgreePrior);
    const i32 votes = static_cast<i32>(std::min<i64>(size, 2000));
    const i32 vote_size = std::min(votes, 1000);

    const i64 n = y * cols_ + x;
    const i32 g = static_cast<i32>(clamp<i64>((count_ * 65536 + 32768) / (n + 1), 8, 65535));
    begin(g);
    const i64 around = col_count_[x + s - 1] + col_count_[x + s + 1] + col_count_[x] +
                       col_count_[x + 2 * s];
    const i32 shares[6] = {
        share(row_count_, x, kRowPrior, g),
        share(col_count_[x + s], y, kColPrior, g),
        share(channel_count_[channel], y * kernel_ + k, kChannelPrior, g),
        share(position_count_[k], y * channels_ + channel, kPositionPrior, g),
        share(current_, k, kCurrentPrior, g),
        share(around, 4 * y + 2, kNearPrior, g),
    };
    i32 e[6];
    for (int j = 0; j < 6; ++j) input(e[j] = curves_.stretch[shares[j]] - base_);
    input(64);
    input(surprise);
    input(vote_size);
    const i32 qr = band(e[0], 7, 8), qc = band(e[1], 7, 8), qi = band(e[2], 7, 8);
    const i32 qn = band(e[5], 7, 8);
    const i32 beside = (W != 0) | (WW != 0) << 1 | (N != 0) << 2 | (U != 0) << 3;
    cell(row_column_[qr * 16 + qc]);
    cell(channel_row_[qi * 16 + qr]);
    cell(beside_[kq * 16 + beside]);
    cell(kernel_cell_[(band(e[4], 7, 4) * kPositions + kq) * 16 + qr]);
    cell(gap_cell_[std::min<i64>(gap_, 63)]);
    cell(beside_near_[(beside * 2 + (C != 0)) * 16 + qn]);
    cell(near_column_[qn * 16 + qc]);
    i32 rate = kZeroRate + static_cast<i32>(kZeroBoost * 64 / (64 + (n >> 4)));
    if (!decide<kZeroN>(*at != 0, zero_, kq, rate, kZeroFirst)) {
      *at = 0;
      ++gap_;
      return;
    }

    const i32 left[4] = {W, N, U, C};
    const i64 m = magnitude(std::abs(static_cast<i64>(*at)) - 1, x, channel, kq,
                            {surprise, vote_size, guess}, left);

    begin(32768);
    const i64 own = kOwnFlat + std::min<i64>(1024, kOwnSlope * (m + 1) / scale_);
    const i32 lean =
        static_cast<i32>(std::min<i64>(1024, std::abs(row_sign_) * 512 / (row_count_ + 4)));
    for (i32 v : near) input(static_cast<i32>(v * own >> 7));
    input(row_sign_ < 0 ? lean : -lean);
    input(32);
    input(vote < 0 ? -votes : votes);
    const i32 b = bucket(static_cast<u32>(m));
    cell(sign_left_[sign3(W) * 3 + sign3(WW)]);
    cell(sign_above_[sign3(N) * 9 + sign3(W) * 3 + sign3(NN)]);
    cell(sign_kernel_[sign3(U) * 9 + sign3(C) * 3 + sign3(W)]);
    cell(sign_position_[kq]);
    cell(sign_last_[last_]);
    cell(sign_size_[b]);
    cell(sign_column_[x]);
    rate = kSignRate + static_cast<i32>(kSignBoost * 64 / (64 + (count_ >> 2)));
    const int negative = decide<kSignN>(*at < 0, sign_, kq, rate, kSignFirst);
    *at = static_cast<Rank>(negative ? -(m + 1) : m + 1);
    for (size_t i = from; i < column.size(); ++i)
      if (y - (column[i] >> 1) < kRows)
        agree_[column[i] >> 1] += static_cast<int>(column[i] & 1) == negative ? 1 : -1;
    column.push_back(static_cast<u32>(y << 1 | negative));
    ++count_;
    sum_ += b;
    ++row_count_;
    row_sum_ += b;
    ++col_count_[x + s];
    col_sum_[x] += b;
    ++channel_count_[channel];
    channel_sum_[channel] += b;
    ++position_count_[k];
    ++current_;
    current_sum_ += b;
    recent_sum_ += b * 32 - (recent_sum_ >> 3);
    recent_count_ += 32 - (recent_count_ >> 3);
    row_sign_ += negative ? -1 : 1;
    last_ = negative + 1;
    gap_ = 0;
  }

  i64 magnitude(i64 m, i64 x, i64 channel, i32 kq, std::array<i32, 3> hints, const i32* beside) {
    const i64 mean = (sum_ * 16 + 16) / (count_ + 1), p = kMeanPrior;  // of buckets, times 16
    const i64 means[5] = {
        (row_sum_ * 16 + p * mean) / (row_count_ + p),
        (col_sum_[x] * 16 + p * mean) / (col_count_[x + stride_] + p),
        (channel_sum_[channel] * 16 + p * mean) / (channel_count_[channel] + p),
        (recent_sum_ + 32 * mean) / (recent_count_ + 32),
        (current_sum_ * 16 + 2 * mean) / (current_ + 2),
    };
    i32 excess[3], level[5], near[4];
    for (int j = 0; j < 3; ++j)
      excess[j] =
          static_cast<i32>(std::min<i64>((means[j] + 8) * 256 / (mean + 8) - 256, 512));
    for (int j = 0; j < 5; ++j)
      level[j] =
          static_cast<i32>(clamp<i64>(((means[j] + 8) * 16 / (mean + 8) >> 1) - 4, 0, 7));
    const i32 a = level[0], d = level[1], b = level[2], f = level[3], h = level[4];
    for (int j = 0; j < 4; ++j) {
      const i64 z = std::abs(static_cast<i64>(beside[j]));
      near[j] = !z ? 0
                   : static_cast<i32>(std::min<i64>(
                         3, i64{bucket(static_cast<u32>(z - 1))} * 32 / (mean + 8) + 1));
    }
    const i32 where[kSizeCells] = {a,
                                   b,
                                   d,
                                   f,
                                   h,
                                   a * 8 + d,
                                   kq,
                                   near[0] * 4 + near[1],
                                   near[2] * 4 + near[3],
                                   std::min(15, hints[2] >> 6)};
    const i32 want = bucket(static_cast<u32>(m));
    i32 got = 0;
    while (got < last_bucket_) {
      Cell& base = base_cells_[got];
      if (!base.seen) base.p = got ? base_cells_[got - 1].p >> 6 << 6 : 32768 << 6;
      begin(base.p >> 6);
      for (i32 v : excess) input(v);
      input(32);
      input(hints[0]);
      input(hints[1]);
      Cell* own = &size_cells_[got * kSizeSpan];
      for (int j = 0; j < kSizeCells; ++j) cell(own[kSizeAt[j] + where[j]]);
      cells_[used_++] = &base;
      const i32 rate = kSizeRate + static_cast<i32>(kSizeBoost * 64 / (64 + (steps_ >> 2)));
      ++steps_;
      if (!decide<kSizeN>(want > got, size_, got, rate, kSizeFirst)) break;
      ++got;
    }
    if (got < 8) return got;
    i64 value = 4 + ((got - 8) & 3);
    i32 node = 1;
    for (int j = (got - 8) / 4; j >= 0; --j) {
      int bit = static_cast<int>(m >> j & 1);
      if (node < 8) {
        Cell& c = low_cells_[got * 8 + node];
        if (!c.seen) c.p = 32768 << 6;
        bit = coder_.code(bit, clamp(c.p >> 6, 64, 65472));
        adapt(bit, kSizeFirst, c);
        node = node * 2 + bit;
      } else {
        bit = coder_.code(bit, 32768);
      }
      value = value * 2 + bit;
    }
    return std::min(value, largest_ - 1);
  }

  Coder& coder_;
  const Curves& curves_;
  const i64 rows_, cols_, kernel_, stride_, channels_, largest_;
  const i32 last_bucket_;
  Mixer<kZeroN> zero_;
  Mixer<kSignN> sign_;
  Mixer<kSizeN> size_;
  // Non-zeros, and sums of their buckets; col_count_ has a margin of a stride on both sides.
  std::vector<i64> col_count_, col_sum_, channel_count_, channel_sum_, position_count_;
  i64 count_ = 0, sum_ = 0, steps_ = 0;
  i64 y_ = 0, row_count_ = 0, row_sum_ = 0, row_sign_ = 0, recent_sum_ = 0, recent_count_ = 0;
  i64 current_ = 0, current_sum_ = 0, gap_ = 0, scale_ = 2;
  i32 last_ = 0, guess_mean_ = 0;
  std::vector<std::vector<u32>> columns_;  // per column: row << 1 | negative of its non-zeros
  std::vector<i64> agree_;                 // per earlier row: signs that agreed less those not
  std::array<Cell, 256> row_column_, channel_row_, near_column_;
  std::array<Cell, kPositions * 16> beside_;
  std::array<Cell, 8 * kPositions * 16> kernel_cell_;
  std::array<Cell, 64> gap_cell_, sign_position_;
  std::array<Cell, 512> beside_near_;
  std::array<Cell, 9> sign_left_;
  std::array<Cell, 27> sign_above_, sign_kernel_;
  std::array<Cell, 3> sign_last_;
  std::array<Cell, kBuckets> sign_size_;
  std::vector<Cell> sign_column_, size_cells_, base_cells_, low_cells_;
  i32 p_ = 0, base_ = 0;
  int inputs_ = 0, used_ = 0;
  i32 x_[kSignN];
  Cell* cells_[kSizeCells + 1];
};

using Ranks = nb::ndarray<const i32, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check(i64 rows, i64 cols, i64 kernel, i64 stride, i64 largest) {
  if (rows < 1 || cols < 1 || kernel < 1 || cols % kernel || stride < 1 || stride > cols)
    throw std::invalid_argument("its kernel does not divide its columns");
  if (largest < 1 || largest > kLargest)
    throw std::invalid_argument("its largest rank is out of range");
}

nb::bytes encode(Ranks ranks, i64 kernel, i64 stride, i64 largest) {
  const i64 rows = ranks.shape(0), cols = ranks.shape(1);
  check(rows, cols, kernel, stride, largest);
  std::vector<u8> out;
  {
    nb::gil_scoped_release release;
    std::vector<i32> copy(ranks.data(), ranks.data() + rows * cols);
    for (i32 v : copy)
      if (std::abs(static_cast<i64>(v)) > largest)
        throw std::invalid_argument("a rank is beyond the largest");
    Encoder coder;
    auto model = std::make_unique<Model<Encoder, i32>>(coder, rows, cols, kernel, stride, largest);
    model->run(copy.data());
    out = coder.finish();
  }
  return nb::bytes(out.data(), out.size());
}

template <class Rank>
nb::object decode_as(nb::bytes data, i64 rows, i64 cols, i64 kernel, i64 stride, i64 largest) {
  auto ranks = std::make_unique<Rank[]>(static_cast<size_t>(rows) * cols);
  {
    nb::gil_scoped_release release;
    Decoder coder(reinterpret_cast<const u8*>(data.c_str()), data.size());
    auto model = std::make_unique<Model<Decoder, Rank>>(coder, rows, cols, kernel, stride, largest);
    model->run(ranks.get());
    coder.finish();
  }
  size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(cols)};
  Rank* raw = ranks.release();
  nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<Rank*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, Rank, nb::ndim<2>>(raw, 2, shape, owner));
}

// The narrowest of int8, int16 and int32 that holds `largest`, so that memory follows the tensor.
nb::object decode(nb::bytes data, i64 rows, i64 cols, i64 kernel, i64 stride, i64 largest) {
  check(rows, cols, kernel, stride, largest);
  if (rows > (i64{1} << 40) / cols) throw std::invalid_argument("it claims too many entries");
  const auto as = largest < 1 << 7    ? decode_as<std::int8_t>
                  : largest < 1 << 15 ? decode_as<std::int16_t>
                                      : decode_as<i32>;
  return as(data, rows, cols, kernel, stride, largest);
}

}  // namespace

NB_MODULE(context, m) {
  m.def("encode", &encode, nb::arg("ranks"), nb::arg("kernel"), nb::arg("stride"),
        nb::arg("largest"));
  m.def("decode", &decode, nb::arg("data"), nb::arg("rows"), nb::arg("cols"), nb::arg("kernel"),
        nb::arg("stride"), nb::arg("largest"));
}
