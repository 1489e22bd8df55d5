// The operators of floats that are no layers: arithmetic, pools, reductions, copies.
#pragma once
#include <limits>

#include "bind.h"

namespace gossamer::c {

inline Step affine(const Binding& b) {
  const Operand &x = b.floats(0), &scale = b.floats(1), &shift = b.floats(2), &y = b.out;
  const Activation end(b);
  b.fits(x.shape == y.shape && x.rank() >= 2, "its result");
  const int64_t channels = x.shape[1], images = x.shape[0];
  b.fits(scale.count() == channels && shift.count() == channels, "scale and shift");
  const int64_t inner = channels && images ? x.count() / channels / images : 0;
  const float *from = x.floats(), *s = scale.floats(), *t = shift.floats();
  float* to = y.floats();
  return [=](size_t) {
    for (int64_t i = 0; i < images * channels; i++) {
      const float factor = s[i % channels], offset = t[i % channels];
      for (int64_t k = i * inner; k < (i + 1) * inner; k++) to[k] = from[k] * factor + offset;
    }
    end.apply(to, images * channels * inner);
  };
}

inline Step unary(const Binding& b) {
  const Operand &x = b.floats(0), &y = b.out;
  const Activation end(b);
  b.fits(x.shape == y.shape, "its result");
  const float* from = x.floats();
  float* to = y.floats();
  return [=, n = y.count()](size_t) {
    std::copy(from, from + n, to);
    end.apply(to, n);
  };
}

inline Step binary(const Binding& b) {
  const Operand &x = b.floats(0), &z = b.floats(1), &y = b.out;
  const Activation end(b);
  const Shape one = stretched(b, x.shape, y.shape), two = stretched(b, z.shape, y.shape);
  const std::string& name = b.setting("function").string();
  const bool same = x.shape == y.shape && z.shape == y.shape;
  const float *p = x.floats(), *q = z.floats();
  float* to = y.floats();
  const auto with = [&](auto f) -> Step {
    return [=, shape = y.shape, n = y.count()](size_t) {
      if (same) {
        for (int64_t i = 0; i < n; i++) to[i] = f(p[i], q[i]);
      } else {
        float* next = to;
        walk(shape, one, two, [&](int64_t i, int64_t j) { *next++ = f(p[i], q[j]); });
      }
      end.apply(to, n);
    };
  };
  if (name == "add") return with([](float u, float v) { return u + v; });
  if (name == "sub") return with([](float u, float v) { return u - v; });
  if (name == "mul") return with([](float u, float v) { return u * v; });
  if (name == "div") return with([](float u, float v) { return u / v; });
  if (name == "maximum") return with([](float u, float v) { return u > v || u != u ? u : v; });
  if (name == "minimum") return with([](float u, float v) { return u < v || u != u ? u : v; });
  throw FormatError("function '" + name.substr(0, 40) + "' is unknown");
}

// Windows over (images, D, H, W, inner): maps of one to three dimensions.
struct Pool {
  int64_t images = 1, inner = 1, size[3] = {1, 1, 1}, places[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1}, before[3] = {}, dilation[3] = {1, 1, 1};

  Pool(const Binding& b, size_t inside) {
    const Operand &x = b.in[0], &y = b.out;
    b.fits(bool(x) && x.rank() == y.rank() && x.dtype == y.dtype, "its result");
    b.fits(x.rank() >= 3 + inside && x.rank() <= 5 + inside, "a map of one to three dimensions");
    const size_t rank = x.rank() - 2 - inside;
    b.fits(x.shape[0] == y.shape[0] && x.shape[1] == y.shape[1], "its result");
    const auto k = b.each("kernel", rank, 1), s = b.each("stride", rank, 1);
    const auto p = b.pairs("padding", rank);
    const auto d = b.node.a.find("dilation") ? b.each("dilation", rank, 1) : Shape(rank, 1);
    images = x.shape[0] * x.shape[1];
    if (inside) inner = x.shape.back(), b.fits(inner == y.shape.back(), "its result");
    for (size_t i = 0; i < rank; i++) {
      const size_t at = 3 - rank + i;
      size[at] = x.shape[2 + i], places[at] = y.shape[2 + i], kernel[at] = k[i], stride[at] = s[i];
      before[at] = p[2 * i], dilation[at] = d[i];
      b.fits(places[at] == Window::places(size[at], p[2 * i], p[2 * i + 1], k[i], d[i], s[i]),
             "its windows");
    }
  }

  // f(first, offset of an element that a window sees) for all of them; end(window, how many).
  template <class F, class G>
  void run(F f, G end) const {
    int64_t window = 0;
    for (int64_t n = 0; n < images; n++)
      for (int64_t z = 0; z < places[0]; z++)
        for (int64_t y = 0; y < places[1]; y++)
          for (int64_t x = 0; x < places[2]; x++, window++) {
            int64_t seen = 0;
            const int64_t z0 = z * stride[0] - before[0], y0 = y * stride[1] - before[1];
            const int64_t x0 = x * stride[2] - before[2];
            for (int64_t i = 0; i < kernel[0]; i++)
              for (int64_t j = 0; j < kernel[1]; j++)
                for (int64_t k = 0; k < kernel[2]; k++) {
                  const int64_t at[3] = {z0 + i * dilation[0], y0 + j * dilation[1],
                                         x0 + k * dilation[2]};
                  if (at[0] < 0 || at[1] < 0 || at[2] < 0 || at[0] >= size[0] ||
                      at[1] >= size[1] || at[2] >= size[2])
                    continue;
                  f(!seen++, ((n * size[0] + at[0]) * size[1] + at[1]) * size[2] + at[2]);
                }
            end(window, seen);
          }
  }
};

inline Step max_pool(const Binding& b) {
  const Pool pool(b, 0);
  const float* x = b.floats(0).floats();
  float* y = b.out.floats();
  return [=](size_t) {
    float most = 0;
    pool.run([&](bool first, int64_t at) { most = first || x[at] > most || x[at] != x[at] ? x[at] : most; },
             [&](int64_t window, int64_t seen) {
               y[window] = seen ? most : -std::numeric_limits<float>::infinity();
             });
  };
}

inline Step avg_pool(const Binding& b) {
  const Pool pool(b, 0);
  const bool counted = b.setting("counted").truth();
  const float* x = b.floats(0).floats();
  float* y = b.out.floats();
  return [=](size_t) {
    const float all = float(pool.kernel[0] * pool.kernel[1] * pool.kernel[2]);
    float sum = 0;
    pool.run([&](bool first, int64_t at) { sum = (first ? 0 : sum) + x[at]; },
             [&](int64_t window, int64_t seen) {
               y[window] = (seen ? sum : 0) / (counted ? all : float(seen));
             });
  };
}

inline Step mean(const Binding& b) {
  const Operand &x = b.floats(0), &y = b.out;
  const bool keep = b.setting("keep").truth();
  std::vector<bool> gone(x.rank());
  for (const Json& a : b.setting("axes").list()) gone[size_t(b.axis(a, x.rank()))] = true;
  Shape left, strides(x.rank(), 0);
  for (size_t i = 0; i < x.rank(); i++)
    if (!gone[i] || keep) left.push_back(gone[i] ? 1 : x.shape[i]);
  b.fits(left == y.shape, "its result");
  for (int64_t step = 1, i = int64_t(x.rank()); i-- > 0;)
    if (!gone[size_t(i)]) strides[size_t(i)] = step, step *= x.shape[size_t(i)];
  const int64_t results = y.count(), each = results ? x.count() / results : 0;
  if (size_t(results) * sizeof(double) > b.limit) throw std::bad_alloc();
  auto sums = std::make_shared<std::vector<double>>(size_t(results));
  const float* from = x.floats();
  float* to = y.floats();
  return [=, shape = x.shape, own = strides_of(x.shape)](size_t) {
    std::fill(sums->begin(), sums->end(), 0.0);
    walk(shape, own, strides, [&](int64_t i, int64_t j) { (*sums)[size_t(j)] += from[i]; });
    for (int64_t i = 0; i < results; i++) to[i] = float((*sums)[size_t(i)] / double(each));
  };
}

// Elements of x at these strides from `first` to elements of y at those from `start`.
inline Step copied(const Binding& b, const Operand& x, const Shape& shape, int64_t first,
                   const Shape& from, int64_t start, const Shape& to) {
  b.fits(x.dtype == b.out.dtype, "its type");
  const size_t each = kTypes[x.dtype].bytes;
  const uint8_t* source = x.data + size_t(first) * each;
  uint8_t* target = b.out.data + size_t(start) * each;
  const auto with = [&](auto bytes) -> Step {
    return [=](size_t) {
      walk(shape, from, to, [=](int64_t i, int64_t j) {
        std::memcpy(target + j * bytes, source + i * bytes, bytes);
      });
    };
  };
  if (each == 4) return with(std::integral_constant<int64_t, 4>());
  if (each == 1) return with(std::integral_constant<int64_t, 1>());
  if (each == 8) return with(std::integral_constant<int64_t, 8>());
  return with(std::integral_constant<int64_t, 2>());
}

inline Step reshape(const Binding& b) {  // of a constant: a value's is no step
  b.fits(b.in[0] && b.in[0].count() == b.out.count(), "its size");
  const Shape line{b.out.count()}, one{1};
  return copied(b, b.in[0], line, 0, one, 0, one);
}

inline Step permute(const Binding& b) {
  const Operand& x = b.in[0];
  const auto axes = b.setting("axes").wholes();
  b.fits(x && axes.size() == x.rank() && b.out.rank() == x.rank(), "its axes");
  Shape from, own = strides_of(x.shape);
  std::vector<bool> taken(axes.size());
  for (size_t i = 0; i < axes.size(); i++) {
    const size_t at = size_t(b.axis(b.setting("axes").at(i), axes.size()));
    b.fits(!taken[at] && b.out.shape[i] == x.shape[at], "its axes");
    taken[at] = true, from.push_back(own[at]);
  }
  return copied(b, x, b.out.shape, 0, from, 0, strides_of(b.out.shape));
}

// Start, stop and step for each dimension, as Python's slices of positive steps.
inline Step slice(const Binding& b) {
  const Operand& x = b.in[0];
  const auto& index = b.setting("index").list();
  b.fits(x && index.size() <= x.rank() && b.out.rank() == x.rank(), "its index");
  Shape from = strides_of(x.shape);
  int64_t first = 0;
  for (size_t i = 0; i < x.rank(); i++) {
    const int64_t size = x.shape[i];
    const auto part = [&](size_t k, int64_t otherwise) {
      if (i >= index.size() || index[i].at(k).kind == Json::kNull) return otherwise;
      const int64_t v = index[i].at(k).whole();
      return k == 2 ? v : std::clamp(v < 0 ? v + size : v, int64_t(0), size);
    };
    const int64_t start = part(0, 0), stop = part(1, size), step = part(2, 1);
    b.fits(step >= 1, "a step that is not positive");
    b.fits(b.out.shape[i] == (stop > start ? (stop - start - 1) / step + 1 : 0), "its result");
    first += start * from[i];
    if (__builtin_mul_overflow(from[i], step, &from[i])) b.fits(false, "its steps");
  }
  return copied(b, x, b.out.shape, first, from, 0, strides_of(b.out.shape));
}

inline Step pad(const Binding& b) {
  const Operand &x = b.in[0], &y = b.out;
  const bool codes = y.dtype == GOSSAMER_UINT8;
  b.fits(x && (codes || y.dtype == GOSSAMER_FLOAT32), "its type");
  const auto pads = b.pairs("pads", x.rank());
  const Shape own = strides_of(y.shape);
  int64_t start = 0;
  b.fits(y.rank() == x.rank(), "its result");
  for (size_t i = 0; i < x.rank(); i++) {
    b.fits(y.shape[i] == x.shape[i] + pads[2 * i] + pads[2 * i + 1], "its result");
    start += pads[2 * i] * own[i];
  }
  const float value = float(b.setting("value").real());
  b.fits(!codes || (value >= 0 && value <= 127), "its value");
  const Step copy = copied(b, x, x.shape, 0, strides_of(x.shape), start, own);
  if (codes)
    return [=, to = y.data, n = y.count()](size_t threads) {
      std::memset(to, int(value), size_t(n));
      copy(threads);
    };
  return [=, to = y.floats(), n = y.count()](size_t threads) {
    std::fill(to, to + n, value);
    copy(threads);
  };
}

inline Step cat(const Binding& b) {
  const Operand& y = b.out;
  const size_t axis = size_t(b.axis(b.setting("axis"), y.rank()));
  const Shape own = strides_of(y.shape);
  std::vector<Step> parts;
  int64_t at = 0;
  for (const Operand& x : b.in) {
    b.fits(x && x.rank() == y.rank() && x.shape[axis] <= y.shape[axis] - at, "its parts");
    for (size_t i = 0; i < x.rank(); i++)
      b.fits(i == axis || x.shape[i] == y.shape[i], "its parts");
    parts.push_back(copied(b, x, x.shape, 0, strides_of(x.shape), at * own[axis], own));
    at += x.shape[axis];
  }
  b.fits(at == y.shape[axis], "its parts");
  return [=](size_t threads) {
    for (const Step& part : parts) part(threads);
  };
}

inline Step softmax(const Binding& b) {
  const Operand &x = b.floats(0), &y = b.out;
  b.fits(x.shape == y.shape, "its result");
  const size_t axis = size_t(b.axis(b.setting("axis"), x.rank()));
  const int64_t n = x.shape[axis], apart = strides_of(x.shape)[axis], lines = n ? x.count() / n : 0;
  const float* from = x.floats();
  float* to = y.floats();
  return [=](size_t) {
    for (int64_t i = 0; i < lines; i++) {
      const int64_t at = i / apart * apart * n + i % apart;
      float most = from[at], sum = 0;
      for (int64_t k = 1; k < n; k++) most = std::max(most, from[at + k * apart]);
      for (int64_t k = 0; k < n; k++)
        sum += to[at + k * apart] = std::exp(from[at + k * apart] - most);
      for (int64_t k = 0; k < n; k++) to[at + k * apart] /= sum;
    }
  };
}

inline Step layer_norm(const Binding& b) {
  const Operand &x = b.floats(0), &scale = b.in[1], &shift = b.in[2], &y = b.out;
  const int64_t rank = b.setting("rank").whole();
  b.fits(x.shape == y.shape && rank >= 1 && rank <= int64_t(x.rank()), "its result");
  const int64_t n = elements(Shape(x.shape.end() - rank, x.shape.end()));
  for (const Operand* o : {&scale, &shift})
    b.fits(!*o || (o->dtype == GOSSAMER_FLOAT32 && o->count() == n), "scale and shift");
  const double eps = b.setting("eps").real();
  const int64_t lines = n ? x.count() / n : 0;
  const float *from = x.floats(), *s = scale.floats(), *t = shift.floats();
  float* to = y.floats();
  return [=](size_t) {
    for (int64_t i = 0; i < lines; i++) {
      const float* v = from + i * n;
      float* w = to + i * n;
      double sum = 0, squares = 0;
      for (int64_t k = 0; k < n; k++) sum += v[k];
      const double middle = sum / double(n);
      for (int64_t k = 0; k < n; k++) squares += (v[k] - middle) * (v[k] - middle);
      const double inverse = 1 / std::sqrt(squares / double(n) + eps);
      for (int64_t k = 0; k < n; k++) {
        const float u = float((v[k] - middle) * inverse) * (s ? s[k] : 1);
        w[k] = t ? u + t[k] : u;
      }
    }
  };
}

inline Step embedding(const Binding& b) {
  const Operand &w = b.floats(0), &at = b.in[1], &y = b.out;
  b.fits(bool(at) && (at.dtype == GOSSAMER_INT64 || at.dtype == GOSSAMER_INT32), "its indices");
  b.fits(w.rank() == 2, "its table");
  Shape shape = at.shape;
  shape.push_back(w.shape[1]);
  b.fits(shape == y.shape, "its result");
  const int64_t rows = w.shape[0], wide = w.shape[1];
  return [=, n = at.count()](size_t) {
    for (int64_t i = 0; i < n; i++) {
      int64_t row = 0;
      if (at.dtype == GOSSAMER_INT64) std::memcpy(&row, at.data + 8 * i, 8);
      else row = reinterpret_cast<const int32_t*>(at.data)[i];
      if (row < 0 || row >= rows)
        throw BadInput("index " + std::to_string(row) + " is beyond the " + std::to_string(rows) +
                       " rows of an embedding");
      std::copy(w.floats() + row * wide, w.floats() + (row + 1) * wide, y.floats() + i * wide);
    }
  };
}

inline Step matmul(const Binding& b) {
  const Operand &x = b.floats(0), &z = b.floats(1), &y = b.out;
  b.fits(std::min({x.rank(), z.rank(), y.rank()}) >= 2, "two dimensions at least");
  const auto outer = [](const Shape& s) { return Shape(s.begin(), s.end() - 2); };
  const Shape batch = outer(y.shape);
  Shape one = stretched(b, outer(x.shape), batch), two = stretched(b, outer(z.shape), batch);
  const int64_t rows = *(y.shape.end() - 2), columns = y.shape.back(), inner = x.shape.back();
  b.fits(*(x.shape.end() - 2) == rows && z.shape.back() == columns && *(z.shape.end() - 2) == inner,
         "its sizes");
  for (int64_t& s : one) s *= rows * inner;
  for (int64_t& s : two) s *= inner * columns;
  const float *p = x.floats(), *q = z.floats();
  float* to = y.floats();
  return [=](size_t) {
    float* next = to;
    walk(batch, one, two, [&](int64_t i, int64_t j) {
      for (int64_t r = 0; r < rows; r++, next += columns) {
        std::fill(next, next + columns, 0.0f);
        for (int64_t k = 0; k < inner; k++) {
          const float v = p[i + r * inner + k];
          const float* line = q + j + k * columns;
          for (int64_t c = 0; c < columns; c++) next[c] += v * line[c];
        }
      }
    });
  };
}

}  // namespace gossamer::c
