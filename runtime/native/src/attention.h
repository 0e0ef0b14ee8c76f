// Attention over a KV cache, and the update of that cache, for one sequence on a CPU.
//
// A query attends to the keys and values of all positions so far. Query heads share key-value heads in groups (GQA),
// the softmax is computed online, block by block, and the work is split over heads, query rows and positions.
//
// Arithmetic is float32. With an int8 cache on CPUs that multiply bytes (VNNI, dotprod), scores and sums of values are
// exact integer sums of a query rounded to 1 / 32512 of its largest element and of weights rounded to 1 / 32512 of the
// largest in a block of 128 positions: results are within 2e-4 of the largest value of float64's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace crayon {

// How a cache stores its elements.
enum class CacheType : int32_t {
  fp32 = 0,
  fp16 = 1,
  int8 = 2,  // element = scale * (stored - zero point), one scale (and zero point) for each position and head
};

// The keys or the values of one layer, all positions of all heads. Strides count elements; a head's elements are
// contiguous.
struct CacheSide {
  void* data = nullptr;
  float* scales = nullptr;        // int8 only
  int8_t* zero_points = nullptr;  // int8 only; null: symmetric, all zero
  int64_t position_stride = 0;
  int64_t head_stride = 0;
  int64_t scale_position_stride = 0;  // of `scales` and `zero_points`
  int64_t scale_head_stride = 0;
};

// Runs task(state, i) for every i in [0, tasks), in any order and on any threads, and returns when all are done.
struct ParallelFor {
  void (*run)(void* pool, int64_t tasks, void (*task)(void* state, int64_t index), void* state) = nullptr;
  void* pool = nullptr;
  int threads = 1;
};

enum class Status : int32_t {
  ok = 0,
  bad_shape =
      1,  // a size is not positive, the query heads are no multiple of the key-value heads, or strides are short
  head_too_large = 2,  // head_size > largest_head_size
  beyond_cache = 3,    // a position outside the cache
  no_memory = 4,
};

constexpr int64_t largest_head_size = 256;

struct Attention {
  const float* query = nullptr;  // [tokens, query_heads, head_size], contiguous
  float* output = nullptr;       // the same shape; may not overlap `query`
  CacheSide keys;
  CacheSide values;
  CacheType type = CacheType::fp32;
  int64_t tokens = 0;
  int64_t query_heads = 0;
  int64_t cache_heads = 0;  // key-value heads; query head h reads head h / (query_heads / cache_heads)
  int64_t head_size = 0;
  int64_t start = 0;            // position of the first token of `query`
  int64_t visible = 0;          // positions that hold keys and values: start + tokens where it is causal
  float scale = 0.0f;           // of the scores; usually 1 / sqrt(head_size)
  bool causal = true;           // token t sees positions up to start + t
  const float* mask = nullptr;  // [tokens, visible] added to the scores, or null
  int64_t mask_stride = 0;
};

// Bytes of scratch memory that `attend` wants at `workspace` (64-byte aligned) to split positions over `threads`. Fewer
// (or none) is correct too: then it does not split positions.
size_t attention_workspace(const Attention& attention, int threads);

Status attend(const Attention& attention, const ParallelFor& parallel, void* workspace, size_t workspace_bytes);

// Writes `rows` ([tokens, heads, head_size], contiguous float32) to positions start..start + tokens - 1 of a cache of
// `capacity` positions. int8 rounds to nearest with scale = largest absolute value / 127 and zero point 0.
Status update_cache(const CacheSide& cache, CacheType type, const float* rows, int64_t tokens, int64_t heads,
                    int64_t head_size, int64_t start, int64_t capacity);

}  // namespace crayon
