// How fast attention reads its KV cache: bench_attention [query_heads cache_heads head_size [threads]]; default
// TinyLlama-1.1B.
//
// Twenty-two layers' caches are read in turn, as a decoded token does. Before every pass the CPU's caches are filled
// with something else, as the model's weights do between two layers' attention: keys and values come from memory. The
// probe is what the same threads reach when they only sum floats.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "attention.h"
#include "instruction_set.h"

namespace {

using Clock = std::chrono::steady_clock;

// Threads that spin while there is work soon to come; the caller is one of them.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    stop_ = true;
    round_.fetch_add(1);
    for (std::thread& w : workers_) w.join();
  }

  static void run(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* state) {
    static_cast<Pool*>(pool)->go(tasks, task, state);
  }

 private:
  void go(int64_t tasks, void (*task)(void*, int64_t), void* state) {
    tasks_ = tasks, task_ = task, state_ = state;
    next_ = 0;
    busy_ = static_cast<int>(workers_.size());
    round_.fetch_add(1, std::memory_order_release);
    drain();
    while (busy_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }
  void drain() {
    for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) task_(state_, i);
  }
  void work() {
    for (int64_t seen = 0;; ++seen) {
      while (round_.load(std::memory_order_acquire) == seen) std::this_thread::yield();
      if (stop_) return;
      drain();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::atomic<int64_t> round_ = 0, next_ = 0;
  std::atomic<int> busy_ = 0;
  std::atomic<bool> stop_ = false;
  int64_t tasks_ = 0;
  void (*task_)(void*, int64_t) = nullptr;
  void* state_ = nullptr;
};

struct Times {
  double median;
  double best;  // what the machine can do when its neighbours let it
};

Times measure(int repetitions, const std::function<void()>& f, const std::function<void()>& before = [] {}) {
  std::vector<double> seconds;
  f();
  for (int i = 0; i < repetitions; ++i) {
    before();
    const auto start = Clock::now();
    f();
    seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds[repetitions / 2], seconds[0]};
}

// Bytes per second that `threads` reach when they sum `floats`.
double probe(const crayon::ParallelFor& parallel, const std::vector<float>& floats) {
  struct State {
    const std::vector<float>& floats;
    int64_t parts;
    std::vector<float> sums;
  } state{floats, 64, std::vector<float>(64 * 16)};
  const Times seconds = measure(5, [&] {
    parallel.run(
        parallel.pool, state.parts,
        [](void* s, int64_t part) {
          State& state = *static_cast<State*>(s);
          typedef float Wide __attribute__((vector_size(64), aligned(4), may_alias));
          const size_t length = state.floats.size() / state.parts;
          const float* from = state.floats.data() + part * length;
          Wide sums[4] = {};
          for (size_t i = 0; i + 64 <= length; i += 64) {
            for (size_t j = 0; j < 4; ++j) sums[j] += *reinterpret_cast<const Wide*>(from + i + j * 16);
          }
          sums[0] += sums[1] + sums[2] + sums[3];
          state.sums[part * 16] = sums[0][0];
        },
        &state);
  });
  return floats.size() * sizeof(float) / seconds.median;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t heads = argc > 1 ? std::atoi(argv[1]) : 32, cache_heads = argc > 2 ? std::atoi(argv[2]) : 4;
  const int64_t size = argc > 3 ? std::atoi(argv[3]) : 64, context = 2048, layers = 22;
  const int threads = argc > 4 ? std::atoi(argv[4]) : 2;
  Pool pool(threads);
  const crayon::ParallelFor parallel{&Pool::run, &pool, threads};

  std::vector<float> big(1 << 26, 1.0f);
  std::printf("%s, %d threads, %ld query heads, %ld key-value heads, head size %ld; memory read at %.1f GB/s\n",
              crayon::instruction_set(), threads, long(heads), long(cache_heads), long(size),
              probe(parallel, big) / 1e9);

  const int64_t row = cache_heads * size;
  std::vector<float> query(512 * heads * size), output(query.size()), rows(context * row);
  unsigned seed = 1;
  const auto noise = [&] { return (seed = seed * 1664525u + 1013904223u) / 2147483648.0f - 1.0f; };
  for (float& x : query) x = noise();
  for (float& x : rows) x = noise();

  const char* names[] = {"fp32", "fp16", "int8"};
  for (int type = 0; type < 3; ++type) {
    const int64_t bytes = type == 0 ? 4 : type == 1 ? 2 : 1;
    std::vector<char> data(2 * layers * context * row * bytes);
    std::vector<float> scales(2 * layers * context * cache_heads);
    std::vector<int8_t> zero_points(scales.size());  // as the official int8 cache has them
    std::vector<crayon::Attention> calls(layers);
    for (int64_t l = 0; l < layers; ++l) {
      crayon::Attention& a = calls[l];
      for (int side = 0; side < 2; ++side) {
        crayon::CacheSide& cache = side ? a.values : a.keys;
        cache.data = data.data() + (2 * l + side) * context * row * bytes;
        cache.scales = scales.data() + (2 * l + side) * context * cache_heads;
        cache.zero_points = zero_points.data() + (2 * l + side) * context * cache_heads;
        cache.position_stride = row, cache.head_stride = size;
        cache.scale_position_stride = cache_heads, cache.scale_head_stride = 1;
        crayon::update_cache(cache, static_cast<crayon::CacheType>(type), rows.data(), context, cache_heads, size, 0,
                             context);
      }
      a.query = query.data(), a.output = output.data(), a.type = static_cast<crayon::CacheType>(type);
      a.query_heads = heads, a.cache_heads = cache_heads, a.head_size = size, a.scale = 0.125f;
    }
    std::vector<char> workspace;
    for (const auto& [tokens, start] :
         {std::pair<int64_t, int64_t>{1, 16}, {1, 128}, {1, 512}, {1, 2000}, {128, 0}, {512, 0}}) {
      for (crayon::Attention& a : calls) a.tokens = tokens, a.start = start, a.visible = start + tokens;
      workspace.resize(crayon::attention_workspace(calls[0], threads) + 64);
      void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
      const auto pass = [&] {
        for (const crayon::Attention& a : calls) crayon::attend(a, parallel, aligned, workspace.size() - 64);
      };
      const auto evict = [&] {
        for (size_t i = 0; i < big.size(); i += 16) big[i] += 1.0f;
      };
      const Times seconds = measure(tokens > 1 ? 5 : 41, pass, evict);
      const double read = 2.0 * layers * (start + tokens) * (row * bytes + (type == 2 ? 5 * cache_heads : 0));
      const double sums = 4.0 * layers * heads * size * tokens * (start + (tokens + 1) / 2.0);
      std::printf(
          "%s  %4ld token(s) at %4ld: median %8.3f ms, best %8.3f ms a pass of %ld layers; at best %6.1f GB/s of "
          "cache, %6.1f GFLOP/s\n",
          names[type], long(tokens), long(start), seconds.median * 1e3, seconds.best * 1e3, long(layers),
          read / seconds.best / 1e9, sums / seconds.best / 1e9);
    }
  }
}
