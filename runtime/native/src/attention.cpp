#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_kernel.h"
#include "instruction_set.h"

namespace crayon {
namespace {

// Positions are split only where heads and rows alone would leave threads idle. A range shorter than this costs more to
// merge than it saves.
constexpr int64_t shortest_split = 128;
// More tasks than threads, so that a thread which another process holds up delays the others by little.
constexpr int64_t tasks_per_thread = 2;

// In the order of InstructionSet.
constexpr const AttentionKernels* all_kernels[] = {CRAYON_EACH(&attention_)};

const AttentionKernels& chosen_kernels() { return *all_kernels[static_cast<int>(chosen_instruction_set())]; }

// How the work of one call is cut: into chunks of query rows, into key-value heads, and into ranges of positions.
//
// A long decode is cut by positions, and a task reads all heads of its positions: they lie side by side in memory.
struct Plan {
  int64_t rows;  // query rows of a key-value head
  int64_t chunk_rows;
  int64_t chunks;
  int64_t task_heads;
  int64_t head_parts;
  int64_t splits;
  int64_t positions;

  Plan(const Attention& a, int threads, bool may_split)
      : rows(a.tokens * (a.query_heads / a.cache_heads)),
        chunk_rows(std::min(rows, rows_per_task)),
        chunks((rows + chunk_rows - 1) / chunk_rows),
        positions(a.visible) {
    const int64_t wanted = threads > 1 ? threads * tasks_per_thread : 1;
    const int64_t most_splits = may_split ? std::clamp<int64_t>(positions / shortest_split, 1, wanted) : 1;
    task_heads = std::min(a.cache_heads, std::max<int64_t>(1, rows_per_task / chunk_rows));
    const auto parts = [&] { return (a.cache_heads + task_heads - 1) / task_heads; };
    while (task_heads > 1 && parts() * chunks * most_splits < wanted) task_heads = (task_heads + 1) / 2;
    head_parts = parts();
    splits = std::clamp<int64_t>((wanted + head_parts * chunks - 1) / (head_parts * chunks), 1, most_splits);
  }

  int64_t tasks() const { return head_parts * chunks * splits; }
  int64_t partial_rows() const { return task_heads * chunk_rows; }
  int64_t partial_floats(const Attention& a) const { return partial_rows() * (a.head_size + 2); }
};

struct Job {
  const Attention& attention;
  const Plan& plan;
  const AttentionKernels& kernels;
  float* partials;  // null where positions are not split

  AttentionTask task(int64_t index) const {
    const Attention& a = attention;
    const int64_t split = index % plan.splits, chunk = index / plan.splits % plan.chunks;
    AttentionTask t{};
    t.attention = &a;
    t.first_head = index / plan.splits / plan.chunks * plan.task_heads;
    t.heads = std::min(plan.task_heads, a.cache_heads - t.first_head);
    t.first_row = chunk * plan.chunk_rows;
    t.rows = std::min(plan.chunk_rows, plan.rows - t.first_row);
    t.first_position = plan.positions * split / plan.splits;
    t.last_position = plan.positions * (split + 1) / plan.splits;
    if (partials) {
      t.partial_sums = partials + index * plan.partial_floats(a);
      t.partial_largest = t.partial_sums + plan.partial_rows() * a.head_size;
      t.partial_weights = t.partial_largest + plan.partial_rows();
    }
    return t;
  }

  static void run(void* state, int64_t index) {
    const Job& job = *static_cast<const Job*>(state);
    job.kernels.attend(job.task(index));
  }

  // The tasks `first`.. of one chunk, one for each split, become output.
  void merge(int64_t first) const {
    const Attention& a = attention;
    const AttentionTask whole = task(first);
    const int64_t group = a.query_heads / a.cache_heads, step = plan.partial_floats(a);
    for (int64_t r = 0; r < whole.heads * whole.rows; ++r) {
      float largest = whole.partial_largest[r], weight = 0.0f;
      for (int64_t s = 1; s < plan.splits; ++s) largest = std::max(largest, whole.partial_largest[s * step + r]);
      const int64_t row = whole.first_row + r % whole.rows, head = whole.first_head + r / whole.rows;
      float* to = a.output + (row / group * a.query_heads + head * group + row % group) * a.head_size;
      std::fill_n(to, a.head_size, 0.0f);
      for (int64_t s = 0; s < plan.splits; ++s) {
        const float factor = kernels.exp2(whole.partial_largest[s * step + r] - largest);
        const float* from = whole.partial_sums + s * step + r * a.head_size;
        weight += factor * whole.partial_weights[s * step + r];
        for (int64_t d = 0; d < a.head_size; ++d) to[d] += factor * from[d];
      }
      const float normalize = weight > 0.0f ? 1.0f / weight : 0.0f;
      for (int64_t d = 0; d < a.head_size; ++d) to[d] *= normalize;
    }
  }
};

Status check(const Attention& a) {
  if (a.tokens <= 0 || a.cache_heads <= 0 || a.query_heads <= 0 || a.head_size <= 0 ||
      a.query_heads % a.cache_heads != 0) {
    return Status::bad_shape;
  }
  if (a.keys.position_stride < a.head_size || a.values.position_stride < a.head_size) return Status::bad_shape;
  if (a.type == CacheType::int8 && !(a.keys.scales && a.values.scales)) return Status::bad_shape;
  if (a.mask && a.mask_stride < a.visible) return Status::bad_shape;
  if (a.head_size > largest_head_size) return Status::head_too_large;
  if (a.start < 0 || a.visible <= 0 || (a.causal && a.start + a.tokens > a.visible)) return Status::beyond_cache;
  return Status::ok;
}

}  // namespace

size_t attention_workspace(const Attention& attention, int threads) {
  if (check(attention) != Status::ok) return 0;
  const Plan plan(attention, threads, true);
  return plan.splits == 1 ? 0 : plan.tasks() * plan.partial_floats(attention) * sizeof(float);
}

Status attend(const Attention& attention, const ParallelFor& parallel, void* workspace, size_t workspace_bytes) {
  if (const Status status = check(attention); status != Status::ok) return status;
  const int threads = parallel.run ? parallel.threads : 1;
  const size_t wanted = attention_workspace(attention, threads);
  const Plan plan(attention, threads, workspace && workspace_bytes >= wanted);
  Job job{attention, plan, chosen_kernels(), plan.splits > 1 ? static_cast<float*>(workspace) : nullptr};
  const int64_t tasks = plan.tasks();
  if (threads > 1 && tasks > 1) {
    parallel.run(parallel.pool, tasks, &Job::run, &job);
  } else {
    for (int64_t i = 0; i < tasks; ++i) Job::run(&job, i);
  }
  if (plan.splits > 1) {
    for (int64_t first = 0; first < tasks; first += plan.splits) job.merge(first);
  }
  return Status::ok;
}

Status update_cache(const CacheSide& cache, CacheType type, const float* rows, int64_t tokens, int64_t heads,
                    int64_t head_size, int64_t start, int64_t capacity) {
  if (tokens <= 0 || heads <= 0 || head_size <= 0 || cache.position_stride < head_size) return Status::bad_shape;
  if (type == CacheType::int8 && !cache.scales) return Status::bad_shape;
  if (start < 0 || start > capacity - tokens) return Status::beyond_cache;
  const AttentionKernels& kernels = chosen_kernels();
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h, rows += head_size) {
      const int64_t at = (start + t) * cache.position_stride + h * cache.head_stride;
      if (type == CacheType::fp32) {
        std::memcpy(static_cast<float*>(cache.data) + at, rows, head_size * sizeof(float));
      } else if (type == CacheType::fp16) {
        kernels.to_half(rows, static_cast<uint16_t*>(cache.data) + at, head_size);
      } else {
        const int64_t scale_at = (start + t) * cache.scale_position_stride + h * cache.scale_head_stride;
        cache.scales[scale_at] = kernels.to_int8(rows, static_cast<int8_t*>(cache.data) + at, head_size);
        if (cache.zero_points) cache.zero_points[scale_at] = 0;
      }
    }
  }
  return Status::ok;
}

}  // namespace crayon
