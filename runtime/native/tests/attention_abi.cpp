// attention.h as C functions, for the tests in Python.
#include <cstdlib>
#include <thread>
#include <vector>

#include "../src/attention.h"

namespace {

// A thread for each slice: slow, and enough to find work that two tasks write to.
void run_on_threads(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* state) {
  const int64_t threads = *static_cast<const int*>(pool);
  std::vector<std::thread> all;
  for (int64_t t = 0; t < threads; ++t) {
    all.emplace_back([=] {
      for (int64_t i = t; i < tasks; i += threads) task(state, i);
    });
  }
  for (std::thread& thread : all) thread.join();
}

}  // namespace

extern "C" {

int32_t test_attend(const crayon::Attention* attention, int threads, int workspace) {
  const size_t bytes = workspace ? crayon::attention_workspace(*attention, threads) : 0;
  void* memory = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
  const crayon::ParallelFor parallel{run_on_threads, &threads, threads};
  const auto status = crayon::attend(*attention, parallel, memory, bytes);
  std::free(memory);
  return static_cast<int32_t>(status);
}

int32_t test_update_cache(const crayon::CacheSide* cache, int32_t type, const float* rows, int64_t tokens,
                          int64_t heads, int64_t head_size, int64_t start, int64_t capacity) {
  return static_cast<int32_t>(crayon::update_cache(*cache, static_cast<crayon::CacheType>(type), rows, tokens, heads,
                                                   head_size, start, capacity));
}

int32_t test_use(const char* name) { return static_cast<int32_t>(crayon::use_instruction_set(name)); }
const char* test_instruction_set() { return crayon::instruction_set(); }

}  // extern "C"
