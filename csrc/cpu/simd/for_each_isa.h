// Compiles the kernels of an operation once per instruction set, and calls them.
//
// Define PYFLOCALITY_KERNEL as the name of a file and include this one, after kernel.h (there is no
// include guard on purpose). The kernel file is compiled in the namespaces portable, avx2 and
// avx512, each with the vector type of simd/<namespace>.h, and for that instruction set only: it
// includes nothing but files that are made for this, since what it included would be compiled for
// that set too. It defines a struct Kernels, whose static functions dispatch() calls. Only x86-64
// has more than the portable namespace.

namespace pyflocality {
namespace portable {
namespace {
#include "simd/portable.h"
#include PYFLOCALITY_KERNEL
}  // namespace
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
namespace {
#include "simd/avx2.h"
#include PYFLOCALITY_KERNEL
}  // namespace
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
namespace {
#include "simd/avx512.h"
#include PYFLOCALITY_KERNEL
}  // namespace
}  // namespace avx512
}  // namespace pyflocality
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // PYFLOCALITY_X86

namespace pyflocality {
namespace {

// Calls run(kernels, pass) with the compilation that a pass asks for, and with the type of its
// images.
template <typename Run>
void dispatch(const Pass& pass, const Run& run) {
  const auto run_typed = [&](auto kernels) {
    if (pass.images.bytes != nullptr) {
      run(kernels, TypedPass<std::uint8_t>(pass, pass.images.bytes));
    } else {
      run(kernels, TypedPass<float>(pass, pass.images.floats));
    }
  };
  switch (pass.isa) {
#if PYFLOCALITY_X86
    case InstructionSet::kAvx512Vnni:
    case InstructionSet::kAvx512:
      return run_typed(avx512::Kernels());
    case InstructionSet::kAvx2:
      return run_typed(avx2::Kernels());
#endif
    default:
      return run_typed(portable::Kernels());
  }
}

}  // namespace
}  // namespace pyflocality

#undef PYFLOCALITY_KERNEL
