#include "instruction_set.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace crayon {
namespace {

#if defined(__x86_64__)
constexpr const char* names[] = {"avx512_vnni", "avx512", "avx2_vnni", "avx2", "baseline"};

// Not every compiler's __builtin_cpu_supports knows this name. The system keeps AVX registers where it says "avx2".
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(__aarch64__)
constexpr const char* names[] = {"dotprod", "neon"};
#else
constexpr const char* names[] = {"baseline"};
#endif
static_assert(sizeof names / sizeof *names == instruction_sets);

bool has(InstructionSet set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (set == InstructionSet::avx512_vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
  if (set == InstructionSet::avx512) return avx512;
  if (set == InstructionSet::avx2_vnni) return avx2 && has_avx_vnni();
  if (set == InstructionSet::avx2) return avx2;
#elif defined(__aarch64__)
  if (set == InstructionSet::dotprod) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  return set == InstructionSet::baseline;
}

// -1: none.
int find(const char* name) {
  for (int i = 0; i < instruction_sets; ++i) {
    if (has(static_cast<InstructionSet>(i)) && (!name || std::strcmp(names[i], name) == 0)) return i;
  }
  return -1;
}

std::atomic<int>& chosen() {
  static std::atomic<int> index = find(nullptr);
  return index;
}

}  // namespace

InstructionSet chosen_instruction_set() {
  return static_cast<InstructionSet>(chosen().load(std::memory_order_relaxed));
}

const char* instruction_set() { return names[chosen().load()]; }

bool use_instruction_set(const char* name) {
  const int found = find(name);
  if (found >= 0) chosen().store(found);
  return found >= 0;
}

}  // namespace crayon
