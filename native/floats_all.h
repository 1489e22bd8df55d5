// What floats.cpp compiles for each instruction set.
#include "exponential_body.h"
#include "floats_body.h"
