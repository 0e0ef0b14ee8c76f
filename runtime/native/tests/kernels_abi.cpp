// The kernels as C functions, for the tests in Python.
#include <cstdlib>
#include <thread>
#include <vector>

#include "../src/attention.h"
#include "../src/elementwise.h"
#include "../src/instruction_set.h"
#include "../src/linear.h"

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

// Products of the same tokens with matrices of int4 groups, and with int8 rows where the group size is 0.
void test_linears(int32_t count, const uint8_t* const* codes, const void* const* scales, const int64_t* rows,
                  const int64_t* group_sizes, int64_t width, const float* in, int64_t tokens, float* const* out,
                  int threads, int repetitions) {
  std::vector<std::unique_ptr<crayon::LinearWeights>> weights;
  std::vector<crayon::LinearCall> calls;
  for (int32_t i = 0; i < count; ++i) {
    weights.push_back(group_sizes[i]
                          ? crayon::LinearWeights::int4(codes[i], static_cast<const uint16_t*>(scales[i]), rows[i],
                                                        width, group_sizes[i], std::make_shared<crayon::RowSums>())
                          : crayon::LinearWeights::int8(reinterpret_cast<const int8_t*>(codes[i]),
                                                        static_cast<const float*>(scales[i]), rows[i], width,
                                                        std::make_shared<crayon::RowSums>()));
    calls.push_back({weights.back().get(), in, out[i]});
  }
  const crayon::ParallelFor parallel{run_on_threads, &threads, threads};
  for (int i = 0; i < repetitions; ++i) crayon::run_linears(calls.data(), calls.size(), tokens, parallel);
}

int32_t test_elementwise(int32_t operation, const float* a, const crayon::Shape* a_shape, const float* b,
                         const crayon::Shape* b_shape, float* out, crayon::Shape* out_shape) {
  if (!crayon::broadcast_shape(*a_shape, *b_shape, *out_shape)) return 1;
  crayon::apply_elementwise(static_cast<crayon::Elementwise>(operation), a, *a_shape, b, *b_shape, out, *out_shape);
  return 0;
}

void test_concatenate(const float* a, const crayon::Shape* a_shape, const float* b, const crayon::Shape* b_shape,
                      int32_t axis, float* out) {
  crayon::concatenate(a, *a_shape, b, *b_shape, axis, out);
}

int32_t test_use(const char* name) { return crayon::use_instruction_set(name) ? 0 : 5; }
const char* test_instruction_set() { return crayon::instruction_set(); }

}  // extern "C"
