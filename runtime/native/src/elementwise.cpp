#include "elementwise.h"

#include <algorithm>
#include <cstring>

#include "instruction_set.h"

namespace crayon {
namespace {

// In the order of InstructionSet.
constexpr const ElementwiseKernels* all_kernels[] = {CRAYON_EACH(&elementwise_)};

}  // namespace

bool broadcast_shape(const Shape& a, const Shape& b, Shape& out) {
  out = Shape{};
  out.dims = std::max(a.dims, b.dims);
  for (int d = 0; d < out.dims; ++d) {
    const int64_t x = a.from_end(d), y = b.from_end(d);
    if (x != y && x != 1 && y != 1) return false;
    out.sizes[out.dims - 1 - d] = x == 1 ? y : x;
  }
  return true;
}

void apply_elementwise(Elementwise operation, const float* a, const Shape& a_shape, const float* b,
                       const Shape& b_shape, float* out, const Shape& out_shape) {
  const ElementwiseKernels& kernels = *all_kernels[static_cast<int>(chosen_instruction_set())];
  // The steps of the operands in each dimension from the end; dimensions that both go through alike become one.
  int64_t sizes[Shape::most + 1] = {1}, a_steps[Shape::most + 1] = {}, b_steps[Shape::most + 1] = {};
  int dims = 0;
  int64_t a_step = 1, b_step = 1;
  for (int d = 0; d < out_shape.dims; ++d) {
    const int64_t size = out_shape.from_end(d), x = a_shape.from_end(d), y = b_shape.from_end(d);
    if (size == 1) continue;
    const int64_t a_here = x == 1 ? 0 : a_step, b_here = y == 1 ? 0 : b_step;
    a_step *= x;
    b_step *= y;
    if (dims > 0 && a_here == a_steps[dims - 1] * sizes[dims - 1] && b_here == b_steps[dims - 1] * sizes[dims - 1]) {
      sizes[dims - 1] *= size;
      continue;
    }
    sizes[dims] = size;
    a_steps[dims] = a_here;
    b_steps[dims] = b_here;
    ++dims;
  }
  int64_t outer = 1;
  for (int d = 1; d < dims; ++d) outer *= sizes[d];
  for (int64_t i = 0; i < outer; ++i, out += sizes[0]) {
    int64_t a_at = 0, b_at = 0, rest = i;
    for (int d = 1; d < dims; ++d) {
      a_at += rest % sizes[d] * a_steps[d];
      b_at += rest % sizes[d] * b_steps[d];
      rest /= sizes[d];
    }
    kernels.apply(operation, a + a_at, a_steps[0], b + b_at, b_steps[0], sizes[0], out);
  }
}

void concatenate(const float* a, const Shape& a_shape, const float* b, const Shape& b_shape, int axis, float* out) {
  int64_t outer = 1, a_inner = 1, b_inner = 1;
  for (int d = 0; d < a_shape.dims; ++d) {
    (d < axis ? outer : a_inner) *= a_shape.sizes[d];
    if (d >= axis) b_inner *= b_shape.sizes[d];
  }
  for (int64_t i = 0; i < outer; ++i) {
    std::memcpy(out, a + i * a_inner, static_cast<size_t>(a_inner) * sizeof(float));
    std::memcpy(out + a_inner, b + i * b_inner, static_cast<size_t>(b_inner) * sizeof(float));
    out += a_inner + b_inner;
  }
}

}  // namespace crayon
