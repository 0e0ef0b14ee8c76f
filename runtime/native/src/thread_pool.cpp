#include "thread_pool.h"

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#endif

// The wheel ships libexecutorch_threadpool.so without the headers of these (1.5.1).
struct pthreadpool;
extern "C" {
void pthreadpool_parallelize_1d(pthreadpool* pool, void (*task)(void*, size_t), void* state, size_t range,
                                uint32_t flags);
size_t pthreadpool_get_threads_count(pthreadpool* pool);
}
namespace executorch::extension::threadpool {
class ThreadPool final {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
pthreadpool* get_pthreadpool();
}  // namespace executorch::extension::threadpool

namespace crayon {
namespace {

using namespace executorch::extension::threadpool;

struct Call {
  void (*task)(void*, int64_t);
  void* state;
};

void run(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* state) {
  Call call{task, state};
  pthreadpool_parallelize_1d(
      static_cast<pthreadpool*>(pool),
      [](void* c, size_t index) {
        const Call& call = *static_cast<const Call*>(c);
        call.task(call.state, static_cast<int64_t>(index));
      },
      &call, static_cast<size_t>(tasks), 0);
}

bool started = false;

#if defined(__linux__)
struct Cores {
  cpu_set_t allowed, fast;
  int fast_cores = 0;
  bool slow_ones = false;
};

Cores find_cores() {
  Cores found;
  CPU_ZERO(&found.fast);
  if (sched_getaffinity(0, sizeof found.allowed, &found.allowed) != 0) return found;
  double speed[CPU_SETSIZE] = {};
  double fastest = 0;
  const auto folder = [](int cpu) { return "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/"; };
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &found.allowed)) continue;
    // The kernel's measure of a core on Arm; elsewhere its highest frequency.
    for (const char* file : {"cpu_capacity", "cpufreq/cpuinfo_max_freq"}) {
      if (std::ifstream(folder(cpu) + file) >> speed[cpu]) break;
    }
    fastest = std::max(fastest, speed[cpu]);
  }
  std::set<std::string> cores;  // hyperthreads of a core have one entry
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &found.allowed)) continue;
    // A Cortex-A55 has about half the capacity of the A76 beside it, the middle cores of a phone 0.8 of the best.
    if (speed[cpu] < 0.6 * fastest) {
      found.slow_ones = true;
      continue;
    }
    CPU_SET(cpu, &found.fast);
    std::string siblings;
    std::ifstream(folder(cpu) + "topology/thread_siblings_list") >> siblings;
    cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
  }
  found.fast_cores = static_cast<int>(cores.size());
  return found;
}

const Cores& cores() {
  static const Cores found = find_cores();
  return found;
}
#endif

}  // namespace

#if defined(__linux__)
OnFastCores::OnFastCores() {
  moved_ = cores().slow_ones && sched_setaffinity(0, sizeof(cpu_set_t), &cores().fast) == 0;
}
OnFastCores::~OnFastCores() {
  if (moved_) sched_setaffinity(0, sizeof(cpu_set_t), &cores().allowed);
}
#else
OnFastCores::OnFastCores() = default;
OnFastCores::~OnFastCores() = default;
#endif

bool start_threads(int count) {
#if defined(__linux__)
  if (count == 0) count = cores().fast_cores;
#endif
  // New threads inherit the cores that their maker may run on.
  const OnFastCores here;
  started = true;
  if (count == 0 || count == static_cast<int>(pthreadpool_get_threads_count(get_pthreadpool()))) {
    // The pool that ExecuTorch made by itself has threads everywhere.
#if defined(__linux__)
    if (!cores().slow_ones) return true;
#else
    return true;
#endif
  }
  return get_threadpool()->_unsafe_reset_threadpool(static_cast<uint32_t>(count));
}

bool threads_started() { return started; }

int threads() { return static_cast<int>(pthreadpool_get_threads_count(get_pthreadpool())); }

ParallelFor thread_pool() { return {run, get_pthreadpool(), threads()}; }

}  // namespace crayon
