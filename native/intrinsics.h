// The processor's vector instructions, where this is an x86.
#pragma once
#include "dispatch.h"
#ifdef GOSSAMER_X86
#if !defined(__clang__)
// GCC 12 takes the intrinsics' own undefined vectors for a mistake of ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
