// Compiles the file GOSSAMER_BODY once for each instruction set, in a namespace of its own, over the
// lanes of lanes.h. No include guard: a module includes it once, with GOSSAMER_BODY defined.
// GOSSAMER_PICK(isa, f) is the address of f of the namespace that belongs to the level.
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#ifdef GOSSAMER_X86
#include <immintrin.h>
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

namespace gossamer::wide {
#define GOSSAMER_LANES 16
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES
}  // namespace gossamer::wide

#ifdef GOSSAMER_X86
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,popcnt,lzcnt")
namespace gossamer::avx2 {
#define GOSSAMER_LANES 8
#define GOSSAMER_LANES_AVX2
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES_AVX2
#undef GOSSAMER_LANES
}  // namespace gossamer::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,popcnt,lzcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni")
namespace gossamer::avx512 {
#define GOSSAMER_LANES 16
#define GOSSAMER_LANES_AVX512
#include "lanes.h"
#include GOSSAMER_BODY
#undef GOSSAMER_LANES_AVX512
#undef GOSSAMER_LANES
}  // namespace gossamer::avx512
#pragma GCC pop_options

#define GOSSAMER_PICK(level, f)                        \
  ((level) == gossamer::kAvx512 ? &gossamer::avx512::f \
   : (level) == gossamer::kAvx2 ? &gossamer::avx2::f   \
   : (level) == gossamer::kWide ? &gossamer::wide::f   \
                                : &gossamer::portable::f)
#else
#define GOSSAMER_PICK(level, f) \
  ((level) == gossamer::kWide ? &gossamer::wide::f : &gossamer::portable::f)
#endif
