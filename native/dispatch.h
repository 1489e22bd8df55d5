// Run-time choice of instruction set, shared by every kernel.
// GOSSAMER_ISA=scalar|wide|avx2|avx512|neon|neondot lowers (never raises) the level, so that tests
// cover every path. "wide" is portable code over 16 lanes, where a kernel is written over lanes
// (each_isa.h): it tests the logic of AVX-512 on any processor.
// GOSSAMER_PORTABLE, defined, leaves the portable path alone: smaller, and compiled sooner.
#pragma once
#include <cstdlib>
#include <cstring>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gossamer {

enum Isa { kWide = -1, kScalar = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3, kNeonDot = 4 };

#if defined(GOSSAMER_PORTABLE)
#elif defined(__x86_64__) && defined(__GNUC__)
#define GOSSAMER_X86 1
#define GOSSAMER_AVX2 __attribute__((target("avx2,bmi,bmi2,fma,popcnt,lzcnt")))
// AVX-512 here means the set of Ice Lake / Zen 4 and later.
#define GOSSAMER_AVX512                                                                      \
  __attribute__((target("avx2,bmi,bmi2,fma,popcnt,lzcnt,avx512f,avx512bw,avx512vl,avx512dq," \
                        "avx512vbmi,avx512vbmi2,avx512vnni")))
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__AARCH64EB__)
#define GOSSAMER_NEON 1
#endif

inline Isa detected_isa() {
#ifdef GOSSAMER_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("fma"))
    return kAvx2;
#endif
#ifdef GOSSAMER_NEON
#if defined(__APPLE__)
  return kNeonDot;  // every Apple processor of 64 bits since 2019
#elif defined(__linux__)
  if (getauxval(AT_HWCAP) & (1ul << 20)) return kNeonDot;  // HWCAP_ASIMDDP
#endif
  return kNeon;  // part of every aarch64
#endif
  return kScalar;
}

// Read at each call, so that one process can test every path.
inline Isa isa() {
  Isa best = detected_isa();
  const char* want = std::getenv("GOSSAMER_ISA");
  if (!want) return best;
  if (!std::strcmp(want, "scalar")) return kScalar;
#ifndef GOSSAMER_PORTABLE
  if (!std::strcmp(want, "wide")) return kWide;
#endif
#ifdef GOSSAMER_X86
  if (!std::strcmp(want, "avx2")) return best < kAvx2 ? best : kAvx2;
#endif
#ifdef GOSSAMER_NEON
  if (!std::strcmp(want, "neon")) return best < kNeon ? best : kNeon;
#endif
  return best;
}

// Whether four products of bytes and their sum are one instruction here.
inline bool dot_products() {
  const Isa level = isa();
  return level == kAvx512 || level == kNeonDot;
}

}  // namespace gossamer
