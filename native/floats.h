// Functions of one value and of two.
#pragma once

namespace gossamer {

enum class Function {
  kNone, kRelu, kClamp, kLeaky, kElu, kSigmoid, kTanh, kSilu, kGelu, kGeluTanh, kHardsigmoid,
  kHardswish, kNeg, kAbs
};
enum class Join { kAdd, kSub, kMul, kDiv, kMaximum, kMinimum };

}  // namespace gossamer
