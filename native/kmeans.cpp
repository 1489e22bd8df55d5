// One-dimensional clustering: histogram, global optimum over sorted points, assignment, sums.
// Results do not depend on the number of threads: what is summed in floating point is summed per
// block of fixed size, and the blocks in order.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace nb = nanobind;
using gossamer::parallel;

namespace {

template <typename T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr size_t kBlock = size_t(1) << 18;
constexpr size_t kCells = size_t(1) << 14;
constexpr size_t kMaxLabels = 65536;

size_t blocks(size_t n) { return (n + kBlock - 1) / kBlock; }

template <typename T>
std::tuple<int64_t, int64_t, double, double> scan(In<T> x, size_t threads) {
  struct Part {
    int64_t bad = 0, nonzero = 0;
    T lo = std::numeric_limits<T>::infinity(), hi = -std::numeric_limits<T>::infinity();
  };
  const T* v = x.data();
  const size_t n = x.size();
  std::vector<Part> parts(blocks(n));
  {
    nb::gil_scoped_release release;
    parallel(parts.size(), threads, [&](size_t, size_t b) {
      Part p;
      const T most = std::numeric_limits<T>::max();
      for (size_t i = b * kBlock, end = std::min(n, i + kBlock); i < end; i++) {
        const T a = v[i];
        const bool counts = a != 0 && std::abs(a) <= most;
        p.bad += !(std::abs(a) <= most);
        p.nonzero += counts;
        const T low = counts ? a : std::numeric_limits<T>::infinity();
        const T high = counts ? a : -std::numeric_limits<T>::infinity();
        p.lo = low < p.lo ? low : p.lo;
        p.hi = high > p.hi ? high : p.hi;
      }
      parts[b] = p;
    });
  }
  Part all;
  for (const Part& p : parts) {
    all.bad += p.bad;
    all.nonzero += p.nonzero;
    all.lo = std::min(all.lo, p.lo);
    all.hi = std::max(all.hi, p.hi);
  }
  return {all.bad, all.nonzero, double(all.lo), double(all.hi)};
}

// Monotone in v, so that equal cells are the only ones where values must be compared.
template <typename T>
inline size_t cell(T v, T lo, T scale, T top) {
  const T t = (v - lo) * scale;
  // Written so that NaN and infinities land inside, too.
  return t > 0 ? size_t(t < top ? t : top) : 0;
}

template <typename T>
void histogram(In<T> x, double lo, double hi, Out<int64_t> counts, size_t threads) {
  const size_t bins = counts.size(), n = x.size();
  if (bins == 0) throw std::invalid_argument("counts is empty");
  const T* v = x.data();
  int64_t* out = counts.data();
  threads = std::max<size_t>(1, std::min(threads, blocks(n)));
  std::vector<uint64_t> own(threads * bins, 0);
  nb::gil_scoped_release release;
  const T low = T(lo), scale = T(double(bins) / (hi - lo)), top = T(bins - 1);
  parallel(blocks(n), threads, [&](size_t worker, size_t b) {
    uint64_t* c = own.data() + worker * bins;
    for (size_t i = b * kBlock, end = std::min(n, i + kBlock); i < end; i++)
      c[cell(v[i], low, scale, top)] += v[i] != 0;
  });
  for (size_t i = 0; i < bins; i++) {
    uint64_t sum = 0;
    for (size_t t = 0; t < threads; t++) sum += own[t * bins + i];
    out[i] = int64_t(sum);
  }
}

// Dynamic programming over sorted weighted points. The sum of squares within a cluster is
// (sum of squares) - S^2 / W, so that the total of S^2 / W is what is to be made large.
struct Layer {
  const double* w;     // prefix sums of the weights
  const double* s;     // prefix sums of weight times position
  const double* prev;  // best total of the first i points in one cluster less
  double* cur;
  int32_t* arg;

  // Points [lo, hi] (ends of the last cluster), its start in [al, ah]: starts are monotone.
  void solve(int64_t lo, int64_t hi, int64_t al, int64_t ah, int spare) const {
    while (lo <= hi) {
      const int64_t m = lo + (hi - lo) / 2, end = std::min(m - 1, ah);
      const double wm = w[m], sm = s[m];
      double best = -1;
      int64_t at = al;
      for (int64_t i = al; i <= end; i++) {
        const double d = sm - s[i], value = prev[i] + d * d / (wm - w[i]);
        if (value > best) best = value, at = i;
      }
      cur[m] = best;
      arg[m] = int32_t(at);
      if (spare > 0) {
        std::thread left([&, at, m] { solve(lo, m - 1, al, at, spare - 1); });
        solve(m + 1, hi, at, ah, spare - 1);
        left.join();
        return;
      }
      solve(lo, m - 1, al, at, 0);
      lo = m + 1;
      al = at;
    }
  }
};

void partition(In<double> weight, In<double> position, Out<int64_t> bounds, size_t threads) {
  const size_t n = weight.size();
  if (position.size() != n) throw std::invalid_argument("weight and position differ in length");
  if (bounds.size() < 2 || bounds.size() - 1 > n || n >= size_t(1) << 31)
    throw std::invalid_argument("need 1 <= clusters <= points < 2^31");
  const size_t k = bounds.size() - 1;
  std::vector<double> w(n + 1, 0), s(n + 1, 0), prev(n + 1), cur(n + 1, 0);
  std::vector<int32_t> args((k - 1) * (n + 1));
  const double *wp = weight.data(), *xp = position.data();
  int64_t* out = bounds.data();
  nb::gil_scoped_release release;
  for (size_t i = 0; i < n; i++) {
    w[i + 1] = w[i] + wp[i];
    s[i + 1] = s[i] + wp[i] * xp[i];
  }
  for (size_t i = 1; i <= n; i++) prev[i] = s[i] * s[i] / w[i];
  int spare = 0;
  while ((size_t(2) << spare) <= threads && spare < 4) spare++;
  for (size_t c = 2; c <= k; c++) {
    const Layer layer{w.data(), s.data(), prev.data(), cur.data(), args.data() + (c - 2) * (n + 1)};
    // No more clusters than points before, none empty after: c - 1 <= start < end <= n - (k - c).
    layer.solve(int64_t(c), int64_t(n - (k - c)), int64_t(c - 1), int64_t(n), spare);
    std::swap(prev, cur);
  }
  out[k] = int64_t(n);
  for (size_t c = k; c >= 2; c--) out[c - 1] = args[(c - 2) * (n + 1) + size_t(out[c])];
  out[0] = 0;
}

template <typename T>
struct Thresholds {
  const T* t;
  size_t n;
  T lo = 0, scale = 0, top = T(kCells - 1);
  std::vector<uint16_t> first;  // first[c]: thresholds that lie in earlier cells than c

  Thresholds(const T* data, size_t size) : t(data), n(size), first(kCells + 1, 0) {
    if (n == 0) return;
    lo = t[0];
    const T span = t[n - 1] - lo;
    scale = span > 0 && std::isfinite(span) ? T(kCells) / span : T(0);
    if (!std::isfinite(scale)) scale = 0;
    std::vector<uint32_t> held(kCells + 1, 0);
    for (size_t i = 0; i < n; i++) held[cell(t[i], lo, scale, top) + 1]++;
    for (size_t c = 0; c < kCells; c++) {
      held[c + 1] += held[c];
      first[c + 1] = uint16_t(held[c + 1]);
    }
  }

  // How many thresholds are <= v.
  size_t rank(T v) const {
    const size_t c = cell(v, lo, scale, top);
    size_t a = first[c], b = first[c + 1];
    while (b - a > 4) {
      const size_t m = (a + b) / 2;
      if (v >= t[m]) a = m + 1;
      else b = m;
    }
    while (a < b && v >= t[a]) a++;
    return a;
  }
};

// Few thresholds: all are compared, which takes neither a branch nor a table.
constexpr size_t kCompared = 16;
constexpr size_t kChunk = 1024;  // values whose ranks stay in the first-level cache

template <typename T>
__attribute__((always_inline)) inline void compare_all(const T* v, size_t n, const T* t, size_t k,
                                                       int32_t* rank) {
  for (size_t i = 0; i < n; i++) rank[i] = 0;
  for (size_t j = 0; j < k; j++) {
    const T edge = t[j];
    for (size_t i = 0; i < n; i++) rank[i] += v[i] >= edge;
  }
  // Zeros rank behind everything else.
  for (size_t i = 0; i < n; i++) rank[i] = v[i] != 0 ? rank[i] : int32_t(k + 1);
}

#ifdef GOSSAMER_X86
template <typename T>
GOSSAMER_AVX2 void compare_avx2(const T* v, size_t n, const T* t, size_t k, int32_t* rank) {
  compare_all(v, n, t, k, rank);
}
#endif

// How many thresholds are <= each value; k + 1 where the value is zero.
template <typename T>
void ranks(const Thresholds<T>& table, const T* v, size_t n, bool avx2, int32_t* rank) {
  if (table.n > kCompared) {
    const int32_t zero = int32_t(table.n + 1);
    for (size_t i = 0; i < n; i++) rank[i] = v[i] != 0 ? int32_t(table.rank(v[i])) : zero;
    return;
  }
#ifdef GOSSAMER_X86
  if (avx2) return compare_avx2(v, n, table.t, table.n, rank);
#endif
  (void)avx2;
  compare_all(v, n, table.t, table.n, rank);
}

template <typename T, typename C>
void assign(In<T> x, In<T> thresholds, In<int32_t> labels, std::optional<Out<C>> codes,
            std::optional<Out<int64_t>> counts, std::optional<Out<double>> sums, size_t threads) {
  struct Total {
    double sum;
    int64_t count;
  };
  const size_t n = x.size(), k = labels.size();
  if (k == 0 || k > kMaxLabels || thresholds.size() + 1 != k)
    throw std::invalid_argument("need 1 to 65536 labels and one threshold less");
  if (codes && codes->size() != n) throw std::invalid_argument("codes has another length than x");
  if (counts.has_value() != sums.has_value() ||
      (counts && (counts->size() != k || sums->size() != k)))
    throw std::invalid_argument("counts and sums need one entry a label");
  const T *v = x.data(), *t = thresholds.data();
  for (size_t i = 1; i + 1 < k; i++)
    if (!(t[i - 1] <= t[i])) throw std::invalid_argument("thresholds are not ascending");
  const Thresholds<T> table(t, k - 1);
  const bool avx2 = gossamer::isa() >= gossamer::kAvx2;
  std::vector<C> label(k + 1, 0);  // and that of zeros
  for (size_t i = 0; i < k; i++) label[i] = C(labels.data()[i]);
  C* out = codes ? codes->data() : nullptr;
  int64_t* count = counts ? counts->data() : nullptr;
  double* sum = sums ? sums->data() : nullptr;
  // With few labels the next value often has the same one: four totals of each label, so that
  // neighbours do not wait for each other.
  const size_t ways = k <= 256 ? 4 : 1, row = k + 1;
  const size_t parts = blocks(n), wave = std::clamp<size_t>((size_t(1) << 20) / k, 1, 64);
  std::vector<Total> totals(count ? std::min(parts, wave) * row * ways : 0);
  nb::gil_scoped_release release;
  if (count) {
    std::fill(count, count + k, 0);
    std::fill(sum, sum + k, 0.0);
  }
  for (size_t from = 0; from < parts; from += wave) {
    const size_t here = std::min(wave, parts - from);
    std::fill(totals.begin(), totals.end(), Total{0.0, 0});
    parallel(here, threads, [&](size_t, size_t b) {
      const size_t begin = (from + b) * kBlock, end = std::min(n, begin + kBlock);
      Total* own = count ? totals.data() + b * row * ways : nullptr;
      int32_t rank[kChunk];
      for (size_t at = begin; at < end; at += kChunk) {
        const size_t size = std::min(kChunk, end - at);
        ranks(table, v + at, size, avx2, rank);
        if (out)
          for (size_t i = 0; i < size; i++) out[at + i] = label[size_t(rank[i])];
        if (own)
          for (size_t i = 0; i < size; i++) {
            Total& total = own[(i & (ways - 1)) * row + size_t(rank[i])];
            total.sum += double(v[at + i]);
            total.count++;
          }
      }
    });
    if (!count) continue;
    for (size_t b = 0; b < here * ways; b++)
      for (size_t q = 0; q < k; q++) {
        count[q] += totals[b * row + q].count;
        sum[q] += totals[b * row + q].sum;
      }
  }
}

// sums[c] = sum of x where codes == c.
template <typename T, typename C>
void group_sum(In<T> x, In<C> codes, Out<double> sums, size_t threads) {
  const size_t n = x.size(), k = sums.size();
  if (codes.size() != n) throw std::invalid_argument("codes has another length than x");
  const T* v = x.data();
  const C* code = codes.data();
  double* sum = sums.data();
  const size_t parts = blocks(n), wave = std::clamp<size_t>((size_t(1) << 20) / std::max<size_t>(k, 1), 1, 64);
  std::vector<double> own(std::min(parts, wave) * k * 4);
  std::atomic<bool> outside{false};
  {
    nb::gil_scoped_release release;
    std::fill(sum, sum + k, 0.0);
    for (size_t from = 0; from < parts; from += wave) {
      const size_t here = std::min(wave, parts - from);
      std::fill(own.begin(), own.end(), 0.0);
      parallel(here, threads, [&](size_t, size_t b) {
        const size_t begin = (from + b) * kBlock, end = std::min(n, begin + kBlock);
        // Four sums a cluster: neighbours with one code do not wait for each other.
        double* s = own.data() + b * k * 4;
        for (size_t i = begin; i < end; i++) {
          const size_t c = size_t(code[i]);  // a negative code becomes too large
          if (c >= k) {
            outside = true;
            return;
          }
          s[c * 4 + (i & 3)] += double(v[i]);
        }
      });
      for (size_t b = 0; b < here; b++)
        for (size_t c = 0; c < k; c++) {
          const double* s = own.data() + (b * k + c) * 4;
          sum[c] += (s[0] + s[1]) + (s[2] + s[3]);
        }
    }
  }
  if (outside) throw std::invalid_argument("a code is outside the code book");
}

template <typename T>
void bind(nb::module_& m) {
  m.def("scan", &scan<T>, nb::arg("x"), nb::arg("threads"),
        "(values not finite, non-zero values, their minimum, their maximum)");
  m.def("histogram", &histogram<T>, nb::arg("x"), nb::arg("lo"), nb::arg("hi"), nb::arg("counts"),
        nb::arg("threads"), "Count the non-zero values in equal bins over [lo, hi].");
  m.def("assign", &assign<T, uint8_t>, nb::arg("x"), nb::arg("thresholds"), nb::arg("labels"),
        nb::arg("codes").none(), nb::arg("counts").none(), nb::arg("sums").none(),
        nb::arg("threads"),
        "labels[number of thresholds <= x] where x is not 0, else 0; counts and sums per label.");
  m.def("assign", &assign<T, int32_t>, nb::arg("x"), nb::arg("thresholds"), nb::arg("labels"),
        nb::arg("codes").none(), nb::arg("counts").none(), nb::arg("sums").none(),
        nb::arg("threads"));
  m.def("group_sum", &group_sum<T, uint8_t>, nb::arg("x"), nb::arg("codes"), nb::arg("sums"),
        nb::arg("threads"), "sums[c] = sum of x where codes == c.");
  m.def("group_sum", &group_sum<T, int32_t>, nb::arg("x"), nb::arg("codes"), nb::arg("sums"),
        nb::arg("threads"));
}

}  // namespace

NB_MODULE(kmeans, m) {
  m.doc() = "One-dimensional clustering kernels.";
  bind<float>(m);
  bind<double>(m);
  m.def("partition", &partition, nb::arg("weight"), nb::arg("position"), nb::arg("bounds"),
        nb::arg("threads"), "Bounds of the optimal clusters of sorted weighted points.");
}
