// Which of the instruction sets that kernels are compiled for this process computes with.
#pragma once

// A name for each of them, the best first: CRAYON_EACH(linear_) is linear_avx512_vnni, linear_avx512 and so on.
#if defined(__x86_64__)
#define CRAYON_EACH(prefix) prefix##avx512_vnni, prefix##avx512, prefix##avx2_vnni, prefix##avx2, prefix##baseline
#elif defined(__aarch64__)
#define CRAYON_EACH(prefix) prefix##dotprod, prefix##baseline
#else
#define CRAYON_EACH(prefix) prefix##baseline
#endif

namespace crayon {

enum class InstructionSet : int { CRAYON_EACH() };

constexpr int instruction_sets = static_cast<int>(InstructionSet::baseline) + 1;

InstructionSet chosen_instruction_set();

// "avx512_vnni", "avx512", "avx2_vnni", "avx2" or "baseline"; "dotprod" or "neon".
const char* instruction_set();

// Overrides the choice, for tests and measurements; null: the best that the CPU has. False: this CPU does not have it,
// or this build has no code for it. What was computed by another may lie in memory in another order: not while a
// program is open.
bool use_instruction_set(const char* name);

}  // namespace crayon
