// JSON of a plan's header: a tree of values, with bounded depth; anything else is an error.
#pragma once
#include <cstdint>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gossamer::c {

// A fault of a file.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Json {
  enum Kind { kNull, kBool, kInt, kFloat, kString, kList, kMap } kind = kNull;
  int64_t integer = 0;  // of kBool too
  double number = 0;    // of kInt too
  std::string text;
  std::vector<Json> parts;                           // of a list
  std::vector<std::pair<std::string, Json>> fields;  // of a map

  const Json& field(const char* name) const {
    if (const Json* result = find(name)) return *result;
    throw FormatError(std::string("the header has no ") + name);
  }
  const Json* find(const char* name) const {
    if (kind != kMap) throw FormatError(std::string("no mapping where ") + name + " is wanted");
    for (const auto& f : fields)
      if (f.first == name) return &f.second;
    return nullptr;
  }
  const std::vector<Json>& list() const {
    if (kind != kList) throw FormatError("no list where one is wanted");
    return parts;
  }
  const Json& at(size_t i) const {
    if (i >= list().size()) throw FormatError("a list is too short");
    return parts[i];
  }
  const std::string& string() const {
    if (kind != kString) throw FormatError("no string where one is wanted");
    return text;
  }
  int64_t whole() const {
    if (kind != kInt) throw FormatError("no whole number where one is wanted");
    return integer;
  }
  double real() const {
    if (kind != kInt && kind != kFloat) throw FormatError("no number where one is wanted");
    return number;
  }
  bool truth() const {
    if (kind != kBool) throw FormatError("no true or false where one is wanted");
    return integer != 0;
  }
  std::vector<int64_t> wholes() const {
    std::vector<int64_t> result;
    for (const Json& part : list()) result.push_back(part.whole());
    return result;
  }
};

class JsonReader {
 public:
  JsonReader(const char* from, const char* end) : at_(from), end_(end) {}

  Json read() {
    Json result = value(0);
    if (skip() != '\0' || at_ != end_) fail();
    return result;
  }

 private:
  static constexpr int kDeepest = 32;
  const char *at_, *end_;
  int left_ = 1 << 20;  // values that may come: bounded memory

  [[noreturn]] static void fail() { throw FormatError("the header is no JSON of a plan"); }

  // The next character that is no space; '\0' at the end.
  char skip() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) at_++;
    return at_ == end_ ? '\0' : *at_;
  }
  bool take(char c) { return skip() == c && at_ != end_ ? (at_++, true) : false; }
  void word(const char* w) {
    for (; *w; w++, at_++)
      if (at_ == end_ || *at_ != *w) fail();
  }

  Json value(int depth) {
    if (depth > kDeepest || !left_--) fail();
    Json j;
    switch (skip()) {
      case '{':
        j.kind = Json::kMap, at_++;
        if (take('}')) return j;
        do {
          if (skip() != '"') fail();
          std::string name = string();
          if (!take(':')) fail();
          j.fields.emplace_back(std::move(name), value(depth + 1));
        } while (take(','));
        if (!take('}')) fail();
        return j;
      case '[':
        j.kind = Json::kList, at_++;
        if (take(']')) return j;
        do j.parts.push_back(value(depth + 1));
        while (take(','));
        if (!take(']')) fail();
        return j;
      case '"': j.kind = Json::kString, j.text = string(); return j;
      case 't': word("true"), j.kind = Json::kBool, j.integer = 1; return j;
      case 'f': word("false"), j.kind = Json::kBool; return j;
      case 'n': word("null"); return j;
      default: return numeral();
    }
  }

  Json numeral() {
    const char* from = at_;
    bool whole = true;
    while (at_ != end_ && ((*at_ >= '0' && *at_ <= '9') || *at_ == '-' || *at_ == '+' ||
                           *at_ == '.' || *at_ == 'e' || *at_ == 'E')) {
      whole &= *at_ != '.' && *at_ != 'e' && *at_ != 'E';
      at_++;
    }
    Json j;
    if (at_ == from || at_ - from > 40) fail();
    std::istringstream in(std::string(from, at_));
    in.imbue(std::locale::classic());  // whatever the program's locale writes for a point
    if (whole) j.kind = Json::kInt, in >> j.integer, j.number = double(j.integer);
    else j.kind = Json::kFloat, in >> j.number;
    if (in.fail() || in.peek() != std::istringstream::traits_type::eof()) fail();
    return j;
  }

  unsigned hex() {
    unsigned result = 0;
    for (int i = 0; i < 4; i++, at_++) {
      if (at_ == end_) fail();
      const char c = *at_;
      result = result << 4 | unsigned(c >= '0' && c <= '9'   ? c - '0'
                                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                           : (fail(), 0));
    }
    return result;
  }

  std::string string() {
    std::string result;
    for (at_++;;) {
      if (at_ == end_ || (unsigned char)*at_ < 32) fail();
      char c = *at_++;
      if (c == '"') return result;
      if (c != '\\') {
        result += c;
        continue;
      }
      if (at_ == end_) fail();
      switch (c = *at_++) {
        case 'n': result += '\n'; break;
        case 't': result += '\t'; break;
        case 'r': result += '\r'; break;
        case 'b': result += '\b'; break;
        case 'f': result += '\f'; break;
        case 'u': encode(result, hex()); break;
        case '"': case '\\': case '/': result += c; break;
        default: fail();
      }
    }
  }

  void encode(std::string& to, unsigned c) {
    if (c >= 0xD800 && c < 0xDC00) {
      word("\\u");
      const unsigned low = hex();
      if (low < 0xDC00 || low > 0xDFFF) fail();
      c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
      to += char(0xF0 | c >> 18);
      to += char(0x80 | (c >> 12 & 63));
    } else if (c >= 0x800) {
      to += char(0xE0 | c >> 12);
    }
    if (c >= 0x800) to += char(0x80 | (c >> 6 & 63));
    else if (c >= 0x80) to += char(0xC0 | c >> 6);
    to += c < 0x80 ? char(c) : char(0x80 | (c & 63));
  }
};

}  // namespace gossamer::c
