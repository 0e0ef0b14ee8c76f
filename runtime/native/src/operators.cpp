#include "operators.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/event_tracer_hooks.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "attention.h"
#include "thread_pool.h"

namespace crayon {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using OptionalTensor = std::optional<Tensor>;
// For traces; the names are in the form of ExecuTorch's own kernels.
using Timed = executorch::runtime::internal::EventTracerProfileOpScope;

Tensor& refuse(KernelRuntimeContext& context, Tensor& out, const char* why) {
  ET_LOG(Error, "%s", why);
  context.fail(Error::InvalidArgument);
  return out;
}

// Copies value [1, tokens, heads, n] to cache [1, capacity, heads, n] at a position; also used for the scales and zero
// points of an int8 cache, where n is 1. What `out` holds is never read.
Tensor& update_cache_out(KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t start,
                         Tensor& out) {
  const Timed timed(context.internal_event_tracer(), "native_call_update_cache.out");
  if (value.dim() != 4 || cache.dim() != 4 || value.size(0) != 1 || cache.size(0) != 1 ||
      value.size(2) != cache.size(2) || value.size(3) != cache.size(3) || value.scalar_type() != cache.scalar_type()) {
    return refuse(context, out, "update_cache: the new rows do not have the shape or type of the cache");
  }
  if (start < 0 || start > cache.size(1) - value.size(1)) {
    return refuse(context, out, "update_cache: the position is outside the cache");
  }
  const size_t row = static_cast<size_t>(cache.size(2) * cache.size(3)) * cache.element_size();
  if (value.nbytes() > 0) {
    std::memcpy(static_cast<char*>(cache.mutable_data_ptr()) + start * row, value.const_data_ptr(), value.nbytes());
  }
  return out;
}

// A side [1, capacity, heads, size] of a cache, or with `heads_first` [1, heads, capacity, size].
CacheSide side(const Tensor& cache, bool heads_first) {
  CacheSide s;
  s.data = const_cast<void*>(cache.const_data_ptr());
  s.position_stride = heads_first ? cache.size(3) : cache.size(2) * cache.size(3);
  s.head_stride = heads_first ? cache.size(2) * cache.size(3) : cache.size(3);
  return s;
}

void set_scales(CacheSide& s, const Tensor& scales, const Tensor& zero_points, bool heads_first) {
  s.scales = const_cast<float*>(scales.const_data_ptr<float>());
  s.zero_points = const_cast<int8_t*>(zero_points.const_data_ptr<int8_t>());
  s.scale_position_stride = heads_first ? 1 : scales.size(2);
  s.scale_head_stride = heads_first ? scales.size(2) : 1;
}

// Everything but the query and the cache's type, which the two operators have in different forms.
bool describe(Attention& a, const Tensor& query, const Tensor& key, const Tensor& value, int64_t start,
              const OptionalTensor& mask, bool causal, const std::optional<double>& scale, bool heads_first) {
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4 || query.size(0) != 1 || key.size(0) != 1) return false;
  const int positions = heads_first ? 2 : 1, heads = heads_first ? 1 : 2;
  if (key.scalar_type() != value.scalar_type() || key.size(3) != query.size(3)) return false;
  for (int d = 1; d < 4; ++d) {
    if (key.size(d) != value.size(d)) return false;
  }
  a.tokens = query.size(1);
  a.query_heads = query.size(2);
  a.head_size = query.size(3);
  a.cache_heads = key.size(heads);
  a.start = start;
  a.causal = causal && !mask;
  a.scale = scale ? static_cast<float>(*scale) : 1.0f / std::sqrt(static_cast<float>(a.head_size));
  a.keys = side(key, heads_first);
  a.values = side(value, heads_first);
  a.visible = start + a.tokens;
  if (mask) {
    if (mask->dim() != 2 || mask->scalar_type() != ScalarType::Float || mask->size(0) != a.tokens) return false;
    a.mask = mask->const_data_ptr<float>();
    a.mask_stride = a.visible = mask->size(1);
  }
  return start >= 0 && a.visible <= key.size(positions);
}

Tensor& run(KernelRuntimeContext& context, const Attention& a, Tensor& out) {
  const ParallelFor pool = thread_pool();
  size_t bytes = attention_workspace(a, pool.threads);
  void* workspace = nullptr;
  if (bytes > 0) {
    auto memory = context.allocate_temp(bytes, 64);
    workspace = memory.ok() ? *memory : nullptr;
    bytes = memory.ok() ? bytes : 0;
  }
  if (attend(a, pool, workspace, bytes) != Status::ok)
    return refuse(context, out, "attention: a shape that it cannot compute");
  return out;
}

Tensor& custom_sdpa_out(KernelRuntimeContext& context, const Tensor& query, const Tensor& key, const Tensor& value,
                        int64_t start, const OptionalTensor mask, double /*dropout*/, bool causal,
                        const std::optional<double> scale, Tensor& out) {
  const Timed timed(context.internal_event_tracer(), "native_call_custom_sdpa.out");
  Attention a;
  if (!describe(a, query, key, value, start, mask, causal, scale, false)) {
    return refuse(context, out, "custom_sdpa: shapes that do not belong together, or a position outside the cache");
  }
  if (query.scalar_type() != ScalarType::Float) return refuse(context, out, "custom_sdpa: the query must be float32");
  if (key.scalar_type() == ScalarType::Half) {
    a.type = CacheType::fp16;
  } else if (key.scalar_type() != ScalarType::Float) {
    return refuse(context, out, "custom_sdpa: the cache must be float32 or float16");
  }
  if (executorch::runtime::resize_tensor(out, query.sizes()) != Error::Ok) {
    return refuse(context, out, "custom_sdpa: the output has no room");
  }
  a.query = query.const_data_ptr<float>();
  a.output = out.mutable_data_ptr<float>();
  return run(context, a, out);
}

Tensor& custom_quantized_sdpa_out(KernelRuntimeContext& context, const Tensor& query, const Tensor& key,
                                  const Tensor& value, int64_t start, const OptionalTensor mask, double /*dropout*/,
                                  bool causal, const std::optional<double> scale,
                                  const OptionalTensor query_zero_points, const OptionalTensor query_scales,
                                  const OptionalTensor key_zero_points, const OptionalTensor key_scales,
                                  const OptionalTensor value_zero_points, const OptionalTensor value_scales,
                                  bool heads_first, Tensor& out) {
  const Timed timed(context.internal_event_tracer(), "native_call_custom_quantized_sdpa.out");
  Attention a;
  // The flag says so of the query too.
  if (heads_first) return refuse(context, out, "custom_quantized_sdpa: heads before positions is not supported");
  if (!describe(a, query, key, value, start, mask, causal, scale, heads_first)) {
    return refuse(context, out,
                  "custom_quantized_sdpa: shapes that do not belong together, or a position outside the cache");
  }
  if (!query_zero_points || !query_scales || !key_zero_points || !key_scales || !value_zero_points || !value_scales) {
    return refuse(context, out, "custom_quantized_sdpa: scales or zero points are missing");
  }
  if (query.scalar_type() != ScalarType::Char || key.scalar_type() != ScalarType::Char) {
    return refuse(context, out, "custom_quantized_sdpa: query and cache must be int8");
  }
  if (executorch::runtime::resize_tensor(out, query.sizes()) != Error::Ok) {
    return refuse(context, out, "custom_quantized_sdpa: the output has no room");
  }
  a.type = CacheType::int8;
  set_scales(a.keys, *key_scales, *key_zero_points, heads_first);
  set_scales(a.values, *value_scales, *value_zero_points, heads_first);

  auto floats = context.allocate_temp(query.numel() * sizeof(float), 64);
  if (!floats.ok()) return refuse(context, out, "custom_quantized_sdpa: no memory");
  float* to = static_cast<float*>(*floats);
  const int8_t* from = query.const_data_ptr<int8_t>();
  const float* scales = query_scales->const_data_ptr<float>();
  const int8_t* zero_points = query_zero_points->const_data_ptr<int8_t>();
  for (int64_t row = 0; row < a.tokens * a.query_heads; ++row) {
    for (int64_t d = 0; d < a.head_size; ++d, ++from, ++to) *to = (*from - zero_points[row]) * scales[row];
  }
  a.query = static_cast<const float*>(*floats);
  a.output = out.mutable_data_ptr<float>();
  return run(context, a, out);
}

// Template arguments: they need a place of their own.
constexpr const char update_cache_name[] = "llama::update_cache.out";
constexpr const char custom_sdpa_name[] = "llama::custom_sdpa.out";
constexpr const char custom_quantized_sdpa_name[] = "llama::custom_quantized_sdpa.out";

}  // namespace

std::vector<executorch::runtime::Kernel> llama_operators() {
  using executorch::extension::make_boxed_kernel;
  return {
      make_boxed_kernel(update_cache_name, EXECUTORCH_FN(update_cache_out, update_cache_name)),
      make_boxed_kernel(custom_sdpa_name, EXECUTORCH_FN(custom_sdpa_out, custom_sdpa_name)),
      make_boxed_kernel(custom_quantized_sdpa_name,
                        EXECUTORCH_FN(custom_quantized_sdpa_out, custom_quantized_sdpa_name)),
  };
}

}  // namespace crayon
