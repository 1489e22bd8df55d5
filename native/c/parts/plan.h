// A plan's file, read and checked: operators in order, the shapes of their values, constant arrays.
// Layout of the file and meaning of the operators: docs/plan-format.md.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "digest.h"
#include "../gossamer.h"
#include "json.h"

namespace gossamer::c {

// What is no fault of the file, but beyond this library.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

typedef std::vector<int64_t> Shape;

struct Type {
  const char* name;
  size_t bytes;
};
// In the order of gossamer_dtype.
constexpr Type kTypes[] = {{"float32", 4}, {"int64", 8}, {"int32", 4}, {"bool", 1},
                           {"float64", 8}, {"uint8", 1}, {"int8", 1},  {"int16", 2}};

inline int type_of(const std::string& name) {
  for (int i = 0; i < int(sizeof kTypes / sizeof *kTypes); i++)
    if (name == kTypes[i].name) return i;
  throw FormatError("a value of type " + name.substr(0, 40));
}

constexpr int64_t kMostElements = int64_t(1) << 28;  // of a value of one example
constexpr size_t kMostNodes = 1 << 14, kMostHeader = 64 << 20;

// Elements of a shape with this batch; what does not fit 2^62 throws.
inline int64_t elements(const Shape& shape, int64_t batch = 1) {
  double guess = 1;
  int64_t result = 1;
  for (int64_t d : shape) {
    const double side = d >= 0 ? double(d) : -double(d) * double(batch);
    if ((guess *= side) > 4e18) throw std::bad_alloc();
    result *= d >= 0 ? d : -d * batch;
  }
  return result;
}

inline Shape resolved(const Shape& shape, int64_t batch) {
  Shape result;
  for (int64_t d : shape) result.push_back(d >= 0 ? d : -d * batch);
  return result;
}

// A value that is computed or given, or a constant, whose bytes are there.
struct Slot {
  std::string name;
  Shape shape;
  int dtype = 0;
  bool constant = false;
  std::vector<uint8_t> data;
};

struct Node {
  std::string op;
  std::vector<int> inputs;  // slots; -1 for what is left out
  int output = 0;
  Json a;  // its attributes
};

struct Probe {  // an example: arrays of the inputs, then of the outputs
  std::vector<Slot> given, wanted;
};

struct Plan {
  std::vector<Slot> slots;
  std::vector<int> inputs, outputs;
  std::vector<Node> nodes;
  Probe probe;
  bool integers = false;

  bool free() const {  // whether the batch may be of any size
    for (int i : inputs)
      for (int64_t d : slots[size_t(i)].shape)
        if (d < 0) return true;
    return false;
  }
};

// Operator -> number of inputs (-1: any), and its attributes.
inline const std::map<std::string, std::pair<int, std::vector<const char*>>>& operators() {
  static const std::map<std::string, std::pair<int, std::vector<const char*>>> all = {
      {"conv", {4, {"stride", "padding", "dilation", "groups", "activation"}}},
      {"linear", {4, {"activation"}}},
      {"affine", {3, {"activation"}}},
      {"unary", {1, {"activation"}}},
      {"binary", {2, {"function", "activation"}}},
      {"max_pool", {1, {"kernel", "stride", "padding", "dilation"}}},
      {"avg_pool", {1, {"kernel", "stride", "padding", "counted"}}},
      {"mean", {1, {"axes", "keep"}}},
      {"reshape", {1, {"shape"}}},
      {"permute", {1, {"axes"}}},
      {"slice", {1, {"index"}}},
      {"pad", {1, {"pads", "value"}}},
      {"cat", {-1, {"axis"}}},
      {"softmax", {1, {"axis"}}},
      {"layer_norm", {3, {"rank", "eps"}}},
      {"embedding", {2, {}}},
      {"matmul", {2, {}}},
      {"lstm", {4, {"reverse"}}},
      {"gru", {4, {"reverse"}}},
      {"fill", {0, {"shape", "value"}}},
      {"quantize", {1, {"scale", "zero"}}},
      {"dequantize", {1, {"scale", "zero", "channels"}}},
      {"conv_int8",
       {5, {"stride", "padding", "dilation", "groups", "zero", "step", "low", "high"}}},
      {"linear_int8", {4, {"low", "high"}}},
      {"max_pool_int8", {1, {"kernel", "stride", "padding", "dilation"}}}};
  return all;
}

class PlanReader {
 public:
  PlanReader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  Plan read() {
    const Json header = open();
    for (const Json& row : header.field("arrays").list()) array(row);
    const Json& probe = header.field("probe");
    take_probe(probe.at(0).whole(), probe.at(1).whole());
    for (const auto& [name, kind] : header.field("values").fields)
      add({name, kind.at(0).wholes(), type_of(kind.at(1).string()), false, {}});
    std::vector<bool> known(plan_.slots.size());
    for (size_t i = 0; i < known.size(); i++) known[i] = plan_.slots[i].constant;
    for (const Json& name : header.field("inputs").list()) {
      plan_.inputs.push_back(value(name.string()));
      known[size_t(plan_.inputs.back())] = true;
    }
    const auto& nodes = header.field("nodes").list();
    if (nodes.size() > kMostNodes) throw Unsupported("a plan of more than 16384 operators");
    for (const Json& n : nodes) node(n, known);
    for (const Json& name : header.field("outputs").list()) {
      plan_.outputs.push_back(value(name.string()));
      if (!known[size_t(plan_.outputs.back())])
        throw FormatError("output " + shown(name.string()) + " is computed nowhere");
    }
    const Json* precision = header.field("facts").find("precision");
    plan_.integers = precision && precision->kind == Json::kString && precision->text == "int8";
    check_codes();
    return std::move(plan_);
  }

 private:
  const uint8_t* data_;
  size_t size_, body_ = 0, end_ = 0;  // of the arrays
  Plan plan_;
  std::unordered_map<std::string, int> places_;

  static std::string shown(const std::string& name) { return "'" + name.substr(0, 60) + "'"; }

  Json open() {
    if (size_ < 48 || std::memcmp(data_, "GSMPLAN1", 8))
      throw FormatError("no plan of this version; compile the network again");
    const auto digest = sha256(data_, size_ - 32);
    if (std::memcmp(digest.data(), data_ + size_ - 32, 32))
      throw FormatError("damaged: its digest differs; compile the network again");
    uint64_t length = 0;
    for (int i = 0; i < 8; i++) length |= uint64_t(data_[8 + i]) << 8 * i;
    if (length > std::min<uint64_t>(kMostHeader, size_ - 48))
      throw FormatError("damaged: its header is longer than can be");
    const char* text = reinterpret_cast<const char*>(data_) + 16;
    body_ = (16 + size_t(length) + 63) / 64 * 64;
    end_ = size_ - 32;
    if (body_ > end_) throw FormatError("damaged: no arrays behind its header");
    return JsonReader(text, text + length).read();
  }

  int add(Slot slot) {
    double most = 1;
    for (int64_t d : slot.shape) most *= d < 0 ? -double(d) : double(d);
    if (slot.shape.size() > GOSSAMER_MOST_DIMENSIONS || most > double(kMostElements))
      throw FormatError(shown(slot.name) + " is larger than can be");
    if (!places_.emplace(slot.name, int(plan_.slots.size())).second)
      throw FormatError(shown(slot.name) + " is there twice");
    plan_.slots.push_back(std::move(slot));
    return int(plan_.slots.size()) - 1;
  }

  int slot(const std::string& name) const {
    const auto at = places_.find(name);
    if (at == places_.end()) throw FormatError(shown(name) + " is not there");
    return at->second;
  }
  int value(const std::string& name) const {
    const int at = slot(name);
    if (plan_.slots[size_t(at)].constant) throw FormatError(shown(name) + " is a constant");
    return at;
  }

  // Name, type, shape, coding, place and length.
  void array(const Json& row) {
    Slot s{row.at(0).string(), row.at(2).wholes(), type_of(row.at(1).string()), true, {}};
    const std::string& coding = row.at(3).string();
    const int64_t at = row.at(4).whole(), size = row.at(5).whole();
    const int64_t room = int64_t(end_ - body_);
    for (int64_t d : s.shape)
      if (d < 0) throw FormatError(shown(s.name) + " has a negative size");
    if (at < 0 || size < 0 || at > room || size > room - at)
      throw FormatError("array " + shown(s.name) + " reaches beyond the file");
    const int64_t count = elements(s.shape), each = int64_t(kTypes[s.dtype].bytes);
    const uint8_t* from = data_ + body_ + at;
    if (count > kMostElements) throw FormatError(shown(s.name) + " is larger than can be");
    if (coding == "dense") {
      if (size < count * each) throw FormatError("array " + shown(s.name) + " is too short");
      s.data.assign(from, from + count * each);
    } else if (coding == "sparse" && (s.dtype == GOSSAMER_FLOAT32 || s.dtype == GOSSAMER_INT8)) {
      const int64_t bitmap = (count + 7) / 8;
      if (bitmap > size) throw FormatError("array " + shown(s.name) + " is too short");
      s.data.resize(size_t(count * each));
      const uint8_t *next = from + bitmap, *end = from + size;
      if (live(from, count) * each != end - next)
        throw FormatError("array " + shown(s.name) + " has values that do not fit it");
      spread(from, count, each, next, s.data.data());
    } else if (coding == "few" && few_bits(s.dtype)) {
      s.data.resize(size_t(count * each));
      const int64_t rows = s.shape.empty() ? 1 : s.shape[0];
      looked_up(s.name, from, size, count, rows, each, s.data.data());
    } else if (coding == "sparse few" && few_bits(s.dtype)) {
      const int64_t bitmap = (count + 7) / 8;
      if (bitmap > size) throw FormatError("array " + shown(s.name) + " is too short");
      const int64_t kept = live(from, count);
      std::vector<uint8_t> values(size_t(kept * each));
      looked_up(s.name, from + bitmap, size - bitmap, kept, 1, each, values.data());
      s.data.resize(size_t(count * each));
      spread(from, count, each, values.data(), s.data.data());
    } else {
      throw FormatError("array " + shown(s.name) + " is coded in an unknown way");
    }
    add(std::move(s));
  }

  // How many of the first `count` bits of a map are set; the first is the highest of a byte.
  static int64_t live(const uint8_t* map, int64_t count) {
    int64_t all = 0;
    for (int64_t i = 0; i < count / 8; i++) all += __builtin_popcount(map[i]);
    if (count % 8) all += __builtin_popcount(map[count / 8] >> (8 - count % 8));
    return all;
  }

  // Values to the places whose bits are set.
  static void spread(const uint8_t* map, int64_t count, int64_t each, const uint8_t* next,
                     uint8_t* to) {
    const auto all = [&](auto size) {
      for (int64_t i = 0; i < count; i += 8) {
        uint32_t bits = uint32_t(map[i / 8]) << 24;
        if (count - i < 8) bits &= ~(0xffffffffu >> (count - i));
        for (; bits; next += size()) {
          const int k = __builtin_clz(bits);
          std::memcpy(to + (i + k) * size(), next, size_t(size()));
          bits &= ~(0x80000000u >> k);
        }
      }
    };
    each == 4 ? all(std::integral_constant<int64_t, 4>()) : all(std::integral_constant<int64_t, 1>());
  }

  static bool few_bits(int dtype) { return dtype == GOSSAMER_FLOAT32 || dtype == GOSSAMER_INT8; }

  // Codes of 1, 2 or 4 bits, the lowest of a byte first, and a book for all of them or each row.
  static void looked_up(const std::string& name, const uint8_t* from, int64_t size, int64_t count,
                        int64_t rows, int64_t each, uint8_t* to) {
    const int64_t bits = size >= 2 ? from[0] : 0, apart = size >= 2 ? from[1] : 0;
    const int64_t books = apart ? rows : 1;
    if ((bits != 1 && bits != 2 && bits != 4) || apart > 1 || books < 1 || books > size ||
        size != 2 + (books << bits) * each + (count * bits + 7) / 8)
      throw FormatError("array " + shown(name) + " has codes that do not fit it");
    const uint8_t *book = from + 2, *codes = book + (books << bits) * each;
    const int64_t columns = std::max<int64_t>(1, count / books), mask = (1 << bits) - 1;
    for (int64_t i = 0; i < count; i++) {
      const int64_t code = codes[i * bits / 8] >> (i * bits % 8) & mask;
      const int64_t row = books > 1 ? i / columns : 0;
      std::memcpy(to + i * each, book + ((row << bits) + code) * each, size_t(each));
    }
  }

  void take_probe(int64_t given, int64_t wanted) {
    const int64_t all = int64_t(plan_.slots.size());
    if (given < 0 || wanted < 0 || given > all || wanted > all)
      throw FormatError("an example of so many tensors");
    for (int64_t i = 0; i < given + wanted; i++) {
      const std::string name = "probe/" + std::to_string(i);
      Slot& s = plan_.slots[size_t(slot(name))];
      (i < given ? plan_.probe.given : plan_.probe.wanted).push_back(s);
      s.data = {}, s.shape = {0};
    }
  }

  void node(const Json& row, std::vector<bool>& known) {
    Node n;
    n.op = row.at(0).string();
    if (n.op == "torch") throw Unsupported("parts of it run in torch");
    if (n.op == "conv_w8" || n.op == "linear_w8" || n.op == "round_u8")
      throw Unsupported("operator " + n.op + " is of other engines; compile with engine='plan'");
    const auto rule = operators().find(n.op);
    if (rule == operators().end())
      throw FormatError("operator " + shown(n.op) + " is unknown");
    const auto& [arity, names] = rule->second;
    const auto& inputs = row.at(1).list();
    if ((arity >= 0 && inputs.size() != size_t(arity)) || inputs.empty() ||
        row.at(2).list().size() != 1)
      throw FormatError(n.op + " of another number of inputs or outputs");
    for (const Json& name : inputs) {
      n.inputs.push_back(name.string().empty() ? -1 : slot(name.string()));
      if (n.inputs.back() >= 0 && !known[size_t(n.inputs.back())])
        throw FormatError(n.op + " reads " + shown(name.string()) + ", which is not there yet");
    }
    n.output = value(row.at(2).at(0).string());
    if (known[size_t(n.output)]) throw FormatError(n.op + " gives a value twice");
    known[size_t(n.output)] = true;
    n.a = row.at(3);
    if (n.a.kind != Json::kMap || n.a.fields.size() != names.size())
      throw FormatError(n.op + " has other attributes");
    for (const char* name : names) n.a.field(name);
    plan_.nodes.push_back(std::move(n));
  }

  // Integer operators read codes of seven bits: bytes beyond them overflow in some kernels.
  void check_codes() const {
    std::vector<bool> codes(plan_.slots.size());
    for (const Node& n : plan_.nodes) {
      const bool integer = n.op == "conv_int8" || n.op == "linear_int8" || n.op == "max_pool_int8";
      const bool moves = n.op == "reshape" || n.op == "slice" || n.op == "pad";
      if ((integer || n.op == "quantize" ||
           (moves && n.inputs[0] >= 0 && codes[size_t(n.inputs[0])])) &&
          plan_.slots[size_t(n.output)].dtype == GOSSAMER_UINT8)
        codes[size_t(n.output)] = true;
      if (!integer && n.op != "dequantize") continue;
      for (size_t i = 0; i < n.inputs.size(); i++) {
        if (n.inputs[i] < 0) continue;
        const Slot& s = plan_.slots[size_t(n.inputs[i])];
        const bool constant = i >= 1 && i <= 3;
        const int wanted = i == 1 ? GOSSAMER_INT8 : GOSSAMER_FLOAT32;
        const bool good = constant ? s.constant && s.dtype == wanted
                                   : codes[size_t(n.inputs[i])] ||
                                         (i == 4 && s.dtype == GOSSAMER_FLOAT32);
        if (!good) throw FormatError(n.op + " reads " + shown(s.name) + ", which is no such codes");
      }
    }
  }
};

}  // namespace gossamer::c
