// A plan ready to run: its weights packed, and blocks of memory that values share (as
// gossamer.runtime.plan.program does it). A call takes a block that no other call has.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <vector>

#include "codes.h"
#include "layers.h"
#include "others.h"
#include "recurrent.h"

namespace gossamer::c {

constexpr size_t kLine = 64, kBlocks = 8;  // bytes where arrays begin; blocks that are kept

struct Block {
  int64_t batch = 0;
  std::unique_ptr<uint8_t[], Free> memory;
  std::vector<uint8_t*> at;  // of each value; null for constants
  std::vector<Step> steps;
};

class Program {
 public:
  explicit Program(Plan plan) : plan_(std::move(plan)) {
    packed_.resize(plan_.nodes.size());
    for (size_t i = 0; i < packed_.size(); i++)
      packed_[i] = pack(bound(plan_.nodes[i], packed_[i], nullptr, 1));
    drop_weights();
  }

  const Plan& plan() const { return plan_; }

  // The most that a block may take; blocks that are kept are freed.
  void bound_memory(size_t bytes) { limit_ = bytes, free_.clear(); }

  // The bytes of a block.
  size_t memory(int64_t batch) const {
    std::vector<int64_t> at;
    return place(batch, at);
  }

  // Copies inputs in, computes, copies outputs out.
  void run(int64_t batch, const void* const* inputs, void* const* outputs, size_t threads) const {
    std::unique_ptr<Block> block = take(batch);
    for (size_t i = 0; i < plan_.inputs.size(); i++)
      copy(block->at[size_t(plan_.inputs[i])], inputs[i], plan_.inputs[i], batch);
    for (const Step& step : block->steps) step(threads);
    for (size_t i = 0; i < plan_.outputs.size(); i++)
      copy(outputs[i], block->at[size_t(plan_.outputs[i])], plan_.outputs[i], batch);
    give_back(std::move(block));
  }

  // Bind every operator, so that what does not fit is seen; nothing is computed.
  void try_binding() const { give_back(take(1)); }

 private:
  Plan plan_;
  std::vector<Packed> packed_;
  size_t limit_ = size_t(1) << 30;
  mutable std::mutex lock_;
  mutable std::vector<std::unique_ptr<Block>> free_;  // the one used last is at the end

  const Slot& slot(int i) const { return plan_.slots[size_t(i)]; }

  void copy(void* to, const void* from, int i, int64_t batch) const {
    const Slot& s = slot(i);
    const size_t bytes = size_t(elements(s.shape, batch)) * kTypes[s.dtype].bytes;
    if (bytes) std::memcpy(to, from, bytes);
  }

  // Weights that are packed are not needed as they were.
  void drop_weights() {
    std::vector<bool> needed(plan_.slots.size());
    for (size_t i = 0; i < packed_.size(); i++) {
      const auto* rows = std::get_if<PackedRows>(&packed_[i]);
      const bool packed = packed_[i].index() && !(rows && rows->starts.empty());
      const auto& inputs = plan_.nodes[i].inputs;
      for (size_t k = 0; k < inputs.size(); k++)
        if (inputs[k] >= 0 && !(packed && k == 1)) needed[size_t(inputs[k])] = true;
    }
    for (size_t i = 0; i < needed.size(); i++)
      if (!needed[i]) std::vector<uint8_t>().swap(plan_.slots[i].data);
  }

  Binding bound(const Node& node, const Packed& packed, const Block* block, int64_t batch) const {
    static uint8_t nothing;  // where an operand without bytes is said to lie; never touched
    const auto operand = [&](int i) {
      if (i < 0) return Operand{};
      const Slot& s = slot(i);
      uint8_t* data = s.constant ? const_cast<uint8_t*>(s.data.data())
                      : block    ? block->at[size_t(i)]
                                 : nullptr;
      return Operand{resolved(s.shape, batch), s.dtype, data ? data : &nothing};
    };
    Binding b{node, packed, {}, operand(node.output), limit_};
    for (size_t k = 0; k < node.inputs.size(); k++) {
      if (!block && k == 1 && node.inputs[1] >= 0 && !slot(node.inputs[1]).constant)
        b.in.emplace_back();  // a weight that is computed is none that can be packed
      else
        b.in.push_back(operand(node.inputs[k]));
    }
    return b;
  }

  static Step bind(const Binding& b) {
    static const std::map<std::string, Step (*)(const Binding&)> all = {
        {"conv", conv}, {"linear", linear}, {"affine", affine}, {"unary", unary},
        {"binary", binary}, {"max_pool", max_pool}, {"avg_pool", avg_pool}, {"mean", mean},
        {"reshape", reshape}, {"permute", permute}, {"slice", slice}, {"pad", pad}, {"cat", cat},
        {"softmax", softmax}, {"layer_norm", layer_norm}, {"embedding", embedding},
        {"lstm", recurrent}, {"gru", recurrent}, {"fill", fill},
        {"matmul", matmul}, {"quantize", quantize}, {"dequantize", dequantize},
        {"conv_int8", conv_int8}, {"linear_int8", linear_int8}, {"max_pool_int8", max_pool_int8}};
    const std::string& op = b.node.op;
    const bool whole = op == "quantize" || op.find("int8") != op.npos;  // may give codes
    const bool moves = op == "reshape" || op == "permute" || op == "slice" || op == "cat" ||
                       op == "pad";
    if (!whole && !moves && b.out.dtype != GOSSAMER_FLOAT32)
      throw Unsupported(op + " of another type than float32");
    return all.at(op)(b);
  }

  // A reshape of a value is another view of its memory.
  bool is_view(const Node& n) const {
    return n.op == "reshape" && n.inputs[0] >= 0 && !slot(n.inputs[0]).constant;
  }

  // Where each value begins, and how long the block is. Larger values are placed first, each at the
  // lowest place that is free while it lives.
  size_t place(int64_t batch, std::vector<int64_t>& at) const {
    struct Life {
      int root;
      int64_t size, begin, end;
    };
    const size_t count = plan_.slots.size();
    const int64_t last = int64_t(plan_.nodes.size());
    std::vector<int> root(count);
    for (size_t i = 0; i < count; i++) root[i] = int(i);
    std::vector<int64_t> begin(count, -1), end(count, -1);
    const auto lives = [&](int i, int64_t from, int64_t to) {
      const size_t r = size_t(root[size_t(i)]);
      begin[r] = begin[r] < 0 ? from : begin[r];
      end[r] = std::max(end[r], to);
    };
    for (int i : plan_.inputs) lives(i, 0, last);
    for (int64_t k = 0; k < last; k++) {
      const Node& n = plan_.nodes[size_t(k)];
      if (is_view(n)) {
        const Slot &x = slot(n.inputs[0]), &y = slot(n.output);
        if (x.dtype != y.dtype || elements(x.shape, batch) != elements(y.shape, batch))
          throw FormatError("reshape does not fit: its size");
        root[size_t(n.output)] = root[size_t(n.inputs[0])];
      }
      for (int i : n.inputs)
        if (i >= 0 && !slot(i).constant) lives(i, k, k);
      lives(n.output, k, k);
    }
    for (int i : plan_.outputs) lives(i, last, last);
    std::vector<Life> all;
    double most = 0;
    for (size_t i = 0; i < count; i++)
      if (begin[i] >= 0) {
        const int64_t bytes = elements(plan_.slots[i].shape, batch);
        if (double(bytes) * 8 > 4e18) throw std::bad_alloc();
        const int64_t size = std::max<int64_t>(bytes, 1) * int64_t(kTypes[plan_.slots[i].dtype].bytes);
        all.push_back({int(i), (size + int64_t(kLine) - 1) / int64_t(kLine) * int64_t(kLine),
                       begin[i], end[i]});
        if ((most += double(size)) > 4e18) throw std::bad_alloc();
      }
    std::stable_sort(all.begin(), all.end(), [](const Life& a, const Life& b) {
      return std::tie(b.size, a.begin, a.end) < std::tie(a.size, b.begin, b.end);
    });
    std::vector<int64_t> places(count, -1);
    std::vector<std::pair<int64_t, int64_t>> busy;
    int64_t total = 0;
    for (size_t i = 0; i < all.size(); i++) {
      busy.clear();
      for (size_t k = 0; k < i; k++)
        if (all[k].begin <= all[i].end && all[k].end >= all[i].begin) {
          const int64_t from = places[size_t(all[k].root)];
          busy.emplace_back(from, from + all[k].size);
        }
      std::sort(busy.begin(), busy.end());
      int64_t to = 0;
      for (const auto& [low, high] : busy) {
        if (to + all[i].size <= low) break;
        to = std::max(to, high);
      }
      places[size_t(all[i].root)] = to;
      total = std::max(total, to + all[i].size);
    }
    at.assign(count, -1);
    for (size_t i = 0; i < count; i++) at[i] = places[size_t(root[i])];
    return size_t(total);
  }

  std::unique_ptr<Block> take(int64_t batch) const {
    {
      std::lock_guard<std::mutex> guard(lock_);
      for (size_t i = free_.size(); i-- > 0;)
        if (free_[i]->batch == batch) {
          std::unique_ptr<Block> result = std::move(free_[i]);
          free_.erase(free_.begin() + int64_t(i));
          return result;
        }
    }
    auto made = std::make_unique<Block>();
    made->batch = batch;
    std::vector<int64_t> at;
    const size_t total = place(batch, at);
    if (total > limit_) throw std::bad_alloc();
    void* raw = std::aligned_alloc(kLine, std::max(total, kLine));
    if (!raw) throw std::bad_alloc();
    made->memory.reset(static_cast<uint8_t*>(raw));
    std::memset(raw, 0, total);
    for (int64_t place : at) made->at.push_back(place < 0 ? nullptr : made->memory.get() + place);
    for (size_t i = 0; i < plan_.nodes.size(); i++)
      if (!is_view(plan_.nodes[i]))
        made->steps.push_back(bind(bound(plan_.nodes[i], packed_[i], made.get(), batch)));
    return made;
  }

  void give_back(std::unique_ptr<Block> block) const {
    std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(std::move(block));
    if (free_.size() > kBlocks) free_.erase(free_.begin());
  }
};

}  // namespace gossamer::c
