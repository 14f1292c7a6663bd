// Compiles a kernel once per instruction set.
//
// Define PYFLOCALITY_KERNEL as the name of a file and include this one (there is no include guard
// on purpose). The kernel file is compiled in the namespaces portable, avx2 and avx512, each with
// the vector type of simd/<namespace>.h, and for that instruction set only: it may not include
// anything itself, since what it included would be compiled for that set too. Only x86-64 has
// more than the portable namespace.

namespace pyflocality {
namespace portable {
#include "simd/portable.h"
#include PYFLOCALITY_KERNEL
}  // namespace portable
}  // namespace pyflocality

#if PYFLOCALITY_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace pyflocality {
namespace avx2 {
#include "simd/avx2.h"
#include PYFLOCALITY_KERNEL
}  // namespace avx2
}  // namespace pyflocality
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace pyflocality {
namespace avx512 {
#include "simd/avx512.h"
#include PYFLOCALITY_KERNEL
}  // namespace avx512
}  // namespace pyflocality
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // PYFLOCALITY_X86

#undef PYFLOCALITY_KERNEL
