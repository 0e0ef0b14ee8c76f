// Which of the instruction sets that kernels are compiled for this process computes with.
#pragma once

namespace crayon {

// In the order of the tables of kernels: the best first.
enum class InstructionSet : int {
#if defined(__x86_64__)
  avx512_vnni,
  avx512,
  avx2_vnni,
  avx2,
#elif defined(__aarch64__)
  dotprod,
#endif
  baseline,
};

constexpr int instruction_sets = static_cast<int>(InstructionSet::baseline) + 1;

InstructionSet chosen_instruction_set();

// "avx512_vnni", "avx512", "avx2_vnni", "avx2" or "baseline"; "dotprod" or "neon".
const char* instruction_set();

// Overrides the choice, for tests and measurements; null: the best that the CPU has. False: this CPU does not have it,
// or this build has no code for it. What was computed by another may lie in memory in another order: not while a
// program is open.
bool use_instruction_set(const char* name);

}  // namespace crayon
