// The loops of elementwise operations that are compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace crayon {

enum class Elementwise : int32_t { add, subtract, multiply, negate, square, sigmoid, reciprocal_square_root, copy };

struct ElementwiseKernels {
  // out[i] = a[i * a_step] op b[i * b_step] with steps of 0 or 1; of operations on one operand, op(a[i]). `out` may be
  // an operand.
  void (*apply)(Elementwise operation, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t count,
                float* out);
};

extern const ElementwiseKernels CRAYON_EACH(elementwise_);

}  // namespace crayon
