// Compiles the file GOSSAMER_BODY once for each instruction set, in a namespace of its own, over the
// lanes of lanes.h. No include guard: a module includes it once, with GOSSAMER_BODY defined.
// GOSSAMER_PICK(isa, f) is the address of f of the namespace that belongs to the level.
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#ifdef GOSSAMER_X86
#include <immintrin.h>
#endif
#ifdef GOSSAMER_NEON
#include <arm_neon.h>
#endif

// The instructions that functions may use from here on; clang knows no `#pragma GCC target`.
#define GOSSAMER_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define GOSSAMER_TARGET_PUSH(set) \
  GOSSAMER_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define GOSSAMER_TARGET_POP GOSSAMER_PRAGMA(clang attribute pop)
#else
#define GOSSAMER_TARGET_PUSH(set) GOSSAMER_PRAGMA(GCC push_options) GOSSAMER_PRAGMA(GCC target(set))
#define GOSSAMER_TARGET_POP GOSSAMER_PRAGMA(GCC pop_options)
#endif

// Wide vectors stay inside: everything is inlined. (Said to the end of the file, where code is made.)
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC 12 warns of its own AVX-512 headers, which begin with undefined vectors.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace gossamer::portable {
#define GOSSAMER_LANES 4
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES
}  // namespace gossamer::portable

#ifndef GOSSAMER_PORTABLE
namespace gossamer::wide {
#define GOSSAMER_LANES 16
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES
}  // namespace gossamer::wide
#endif

#ifdef GOSSAMER_X86
GOSSAMER_TARGET_PUSH("avx2,bmi,bmi2,fma,popcnt,lzcnt")
namespace gossamer::avx2 {
#define GOSSAMER_LANES 8
#define GOSSAMER_LANES_AVX2
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES_AVX2
#undef GOSSAMER_LANES
}  // namespace gossamer::avx2
GOSSAMER_TARGET_POP

GOSSAMER_TARGET_PUSH(
    "avx2,bmi,bmi2,fma,popcnt,lzcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni")
namespace gossamer::avx512 {
#define GOSSAMER_LANES 16
#define GOSSAMER_LANES_AVX512
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES_AVX512
#undef GOSSAMER_LANES
}  // namespace gossamer::avx512
GOSSAMER_TARGET_POP

#define GOSSAMER_PICK(level, f)                        \
  ((level) == gossamer::kAvx512 ? &gossamer::avx512::f \
   : (level) == gossamer::kAvx2 ? &gossamer::avx2::f   \
   : (level) == gossamer::kWide ? &gossamer::wide::f   \
                                : &gossamer::portable::f)
#elif defined(GOSSAMER_NEON)
namespace gossamer::neon {
#define GOSSAMER_LANES 4
#define GOSSAMER_LANES_NEON
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES_NEON
#undef GOSSAMER_LANES
}  // namespace gossamer::neon

#ifdef __clang__
GOSSAMER_TARGET_PUSH("dotprod")
#else
GOSSAMER_TARGET_PUSH("arch=armv8.2-a+dotprod")
#endif
namespace gossamer::neondot {
#define GOSSAMER_LANES 4
#define GOSSAMER_LANES_NEON
#define GOSSAMER_LANES_NEON_DOT
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES_NEON_DOT
#undef GOSSAMER_LANES_NEON
#undef GOSSAMER_LANES
}  // namespace gossamer::neondot
GOSSAMER_TARGET_POP

#define GOSSAMER_PICK(level, f)                          \
  ((level) == gossamer::kNeonDot ? &gossamer::neondot::f \
   : (level) == gossamer::kNeon  ? &gossamer::neon::f    \
   : (level) == gossamer::kWide  ? &gossamer::wide::f    \
                                 : &gossamer::portable::f)
#elif defined(GOSSAMER_PORTABLE)
#define GOSSAMER_PICK(level, f) ((void)(level), &gossamer::portable::f)
#else
#define GOSSAMER_PICK(level, f) \
  ((level) == gossamer::kWide ? &gossamer::wide::f : &gossamer::portable::f)
#endif
