// gossamer._native.entropy: bit packing, Huffman, rANS, and decoding straight to float32.
// Input bytes are hostile: every length is checked here or in the headers, and errors are
// std::invalid_argument, which Python sees as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "expand.h"
#include "huffman.h"
#include "rans.h"

namespace nb = nanobind;
using namespace gossamer;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyIn = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyOut = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Calls f with a null pointer of the array's unsigned element type.
template <class Array, class F>
auto by_type(const Array& array, F f) {
  if (array.dtype() == nb::dtype<uint8_t>()) return f((uint8_t*)nullptr);
  if (array.dtype() == nb::dtype<uint16_t>()) return f((uint16_t*)nullptr);
  if (array.dtype() == nb::dtype<uint32_t>()) return f((uint32_t*)nullptr);
  throw std::invalid_argument("symbols must be uint8, uint16 or uint32");
}

nb::bytes to_bytes(const std::vector<uint8_t>& v) {
  return nb::bytes(reinterpret_cast<const char*>(v.data()), v.size());
}

template <class T>
void count_symbols(const T* in, size_t n, int64_t* out, size_t alphabet) {
  // Runs of one symbol would wait for the counter: spread them over four.
  std::vector<int64_t> part(sizeof(T) == 1 ? 4 * 256 : 0);
  if (sizeof(T) == 1) {
    for (size_t i = 0; i < n; i++) part[(i & 3) * 256 + in[i]]++;
    for (size_t s = 0; s < 256; s++) {
      int64_t c = part[s] + part[256 + s] + part[512 + s] + part[768 + s];
      if (s < alphabet)
        out[s] += c;
      else if (c)
        throw std::invalid_argument("a symbol is outside the alphabet");
    }
    return;
  }
  for (size_t i = 0; i < n; i++) {
    if (in[i] >= alphabet) throw std::invalid_argument("a symbol is outside the alphabet");
    out[in[i]]++;
  }
}

void histogram(AnyIn symbols, Out<int64_t> out) {
  by_type(symbols, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    nb::gil_scoped_release release;
    count_symbols((const T*)symbols.data(), symbols.size(), out.data(), out.size());
  });
}

void check_width(int width) {
  if (width < 0 || width > 32) throw std::invalid_argument("width must be 0 to 32 bits");
}

nb::bytes pack_bits(In<uint32_t> values, int width) {
  check_width(width);
  const size_t n = values.size();
  std::vector<uint8_t> out((n * size_t(width) + 7) / 8);
  {
    nb::gil_scoped_release release;
    const uint64_t mask = (uint64_t(1) << width) - 1;
    uint64_t acc = 0;
    int held = 0;
    uint8_t* p = out.data();
    for (size_t i = 0; i < n; i++) {
      acc |= (values.data()[i] & mask) << held;
      held += width;
      for (; held >= 8; held -= 8, acc >>= 8) *p++ = uint8_t(acc);
    }
    if (held) *p = uint8_t(acc);
  }
  return to_bytes(out);
}

template <class T>
void unpack(const uint8_t* data, size_t size, int width, T* out, size_t n) {
  const uint64_t mask = (uint64_t(1) << width) - 1;
  size_t i = 0, bit = 0;
  for (; i < n && (bit >> 3) + 8 <= size; i++, bit += size_t(width)) {
    const uint8_t* p = data + (bit >> 3);
    uint64_t v = load_u32(p) | uint64_t(load_u32(p + 4)) << 32;
    out[i] = T(v >> (bit & 7) & mask);
  }
  for (; i < n; i++, bit += size_t(width)) {
    uint64_t v = 0;
    for (size_t b = 0; b < 8 && (bit >> 3) + b < size; b++)
      v |= uint64_t(data[(bit >> 3) + b]) << (8 * b);
    out[i] = T(v >> (bit & 7) & mask);
  }
}

void unpack_bits(In<uint8_t> data, int width, AnyOut out) {
  check_width(width);
  if (data.size() != (out.size() * size_t(width) + 7) / 8)
    throw std::invalid_argument("packed integers have the wrong length");
  by_type(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    nb::gil_scoped_release release;
    unpack(data.data(), data.size(), width, (T*)out.data(), out.size());
  });
}

nb::bytes huffman_encode_(AnyIn symbols, In<uint32_t> table) {
  std::vector<uint8_t> out;
  by_type(symbols, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    nb::gil_scoped_release release;
    out = huffman_encode((const T*)symbols.data(), symbols.size(), table.data(), table.size());
  });
  return to_bytes(out);
}

void huffman_decode(In<uint8_t> data, In<uint32_t> order, In<uint8_t> lengths, AnyOut out) {
  if (order.size() != lengths.size() || order.size() < 2)
    throw std::invalid_argument("a Huffman table needs two symbols or more, and their lengths");
  by_type(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    nb::gil_scoped_release release;
    HuffmanTable table(order.data(), lengths.data(), order.size());
    table.decode(data.data(), data.size(), (T*)out.data(), out.size());
  });
}

nb::bytes rans_encode_(AnyIn symbols, In<uint32_t> frequencies, int bits, int lanes) {
  std::vector<uint8_t> out;
  by_type(symbols, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    nb::gil_scoped_release release;
    out = rans_encode((const T*)symbols.data(), symbols.size(), frequencies.data(),
                      frequencies.size(), bits, lanes);
  });
  return to_bytes(out);
}

template <class T>
void decode_all(const In<uint8_t>& data, const In<uint32_t>& frequencies, int bits, int lanes,
                T* out, size_t n) {
  RansTable<T> table(frequencies.data(), frequencies.size(), bits, lanes);
  RansDecoder<T> decoder(table, data.data(), data.size(), lanes);
  decoder.decode(out, n);
  decoder.finish();
}

void rans_decode(In<uint8_t> data, In<uint32_t> frequencies, int bits, int lanes, AnyOut out) {
  const bool byte = out.dtype() == nb::dtype<uint8_t>();
  if (!byte && out.dtype() != nb::dtype<uint16_t>())
    throw std::invalid_argument("rANS symbols must be uint8 or uint16");
  nb::gil_scoped_release release;
  if (byte)
    decode_all(data, frequencies, bits, lanes, (uint8_t*)out.data(), out.size());
  else
    decode_all(data, frequencies, bits, lanes, (uint16_t*)out.data(), out.size());
}

// `frequencies` is null where `data` are plain symbols.
Feed feed(const In<uint8_t>& data, const std::optional<In<uint32_t>>& frequencies, int bits,
          int lanes, size_t count) {
  if (frequencies)
    return Feed(data.data(), data.size(), frequencies->data(), frequencies->size(), bits, lanes,
                count);
  if (data.size() != count) throw std::invalid_argument("plain symbols of another number");
  return Feed(data.data(), count);
}

std::vector<float> padded(const In<float>& book) {
  if (book.size() > 256) throw std::invalid_argument("a code book of more than 256 entries");
  std::vector<float> out(256, 0.0f);
  std::copy(book.data(), book.data() + book.size(), out.begin());
  return out;
}

void expand_sparse_(In<uint8_t> gaps, std::optional<In<uint32_t>> gap_frequencies, int gap_bits,
                    int gap_lanes, size_t gap_count, In<uint8_t> codes,
                    std::optional<In<uint32_t>> code_frequencies, int code_bits, int code_lanes,
                    size_t code_count, In<float> book, Out<float> out) {
  nb::gil_scoped_release release;
  Feed g = feed(gaps, gap_frequencies, gap_bits, gap_lanes, gap_count);
  Feed c = feed(codes, code_frequencies, code_bits, code_lanes, code_count);
  expand_sparse(g, c, padded(book).data(), out.data(), out.size());
}

void expand_dense_(In<uint8_t> data, std::optional<In<uint32_t>> frequencies, int bits, int lanes,
                   In<float> book, Out<float> out) {
  nb::gil_scoped_release release;
  Feed symbols = feed(data, frequencies, bits, lanes, out.size());
  expand_dense(symbols, padded(book).data(), book.size(), out.data(), out.size());
}

}  // namespace

NB_MODULE(entropy, m) {
  m.def("histogram", &histogram);
  m.def("pack_bits", &pack_bits);
  m.def("unpack_bits", &unpack_bits);
  m.def("huffman_encode", &huffman_encode_);
  m.def("huffman_decode", &huffman_decode);
  m.def("rans_encode", &rans_encode_);
  m.def("rans_decode", &rans_decode);
  m.def("expand_sparse", &expand_sparse_, nb::arg("gaps"), nb::arg("gap_frequencies").none(),
        nb::arg("gap_bits"), nb::arg("gap_lanes"), nb::arg("gap_count"), nb::arg("codes"),
        nb::arg("code_frequencies").none(), nb::arg("code_bits"), nb::arg("code_lanes"),
        nb::arg("code_count"), nb::arg("book"), nb::arg("out"));
  m.def("expand_dense", &expand_dense_, nb::arg("data"), nb::arg("frequencies").none(),
        nb::arg("bits"), nb::arg("lanes"), nb::arg("book"), nb::arg("out"));
}
