// Calls a kernel in the compilation for the instruction set that was chosen.
#pragma once

#include "cpu_features.h"

#if PYFLOCALITY_X86
#define PYFLOCALITY_DISPATCH(isa, kernel, ...) \
  switch (isa) {                               \
    case InstructionSet::kAvx512Vnni:          \
    case InstructionSet::kAvx512:              \
      avx512::kernel(__VA_ARGS__);             \
      break;                                   \
    case InstructionSet::kAvx2:                \
      avx2::kernel(__VA_ARGS__);               \
      break;                                   \
    case InstructionSet::kPortable:            \
      portable::kernel(__VA_ARGS__);           \
      break;                                   \
  }
#else
#define PYFLOCALITY_DISPATCH(isa, kernel, ...) \
  static_cast<void>(isa);                      \
  portable::kernel(__VA_ARGS__)
#endif
