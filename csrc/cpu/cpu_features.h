// Which instructions this processor has, asked at run time: one build serves every machine.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

// Kernels with intrinsics are compiled function by function for their instruction set
// (PYFLOCALITY_TARGET), so the rest of the extension runs on any x86-64.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PYFLOCALITY_X86 1
#define PYFLOCALITY_TARGET(features) __attribute__((target(features)))
#else
#define PYFLOCALITY_X86 0
#endif

// Compilers join a product and a sum in one rounding where they see both: bits of a kernel must not
// depend on what else is compiled beside it.
#if defined(__GNUC__) || defined(__clang__)
#define PYFLOCALITY_INLINE inline __attribute__((always_inline))
#else
#define PYFLOCALITY_INLINE inline
#endif

namespace pyflocality {

enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Vnni };

struct NamedInstructionSet {
  const char* name;
  InstructionSet value;
  bool available;
};

// Every instruction set kernels are written for, best first; the portable one always runs.
inline std::vector<NamedInstructionSet> known_instruction_sets() {
  bool avx2 = false, avx512 = false, avx512vnni = false;
#if PYFLOCALITY_X86
  __builtin_cpu_init();
  avx2 = __builtin_cpu_supports("avx2");
  avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return {{"avx512vnni", InstructionSet::kAvx512Vnni, avx512vnni},
          {"avx512", InstructionSet::kAvx512, avx512},
          {"avx2", InstructionSet::kAvx2, avx2},
          {"portable", InstructionSet::kPortable, true}};
}

// Names of the instruction sets this machine can run, best first.
inline std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const NamedInstructionSet& known : known_instruction_sets()) {
    if (known.available) names.emplace_back(known.name);
  }
  return names;
}

// The instruction set of that name, or the best available for an empty name.
inline InstructionSet choose_instruction_set(const std::string& name) {
  std::string names;
  for (const NamedInstructionSet& known : known_instruction_sets()) {
    if (known.available && (name.empty() || name == known.name)) return known.value;
    if (known.available) names += (names.empty() ? "" : ", ") + std::string(known.name);
  }
  throw std::invalid_argument("`isa` must be one of " + names + " on this machine, got " + name);
}

}  // namespace pyflocality
