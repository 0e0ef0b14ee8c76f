// The loops of elementwise operations that are compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace crayon {

enum class Elementwise : int32_t { add, subtract, multiply, negate, square, sigmoid, reciprocal_square_root, copy };

struct ElementwiseKernels {
  // out[i] = a[i * a_step] op b[i * b_step] with steps of 0 or 1; of operations on one operand, op(a[i]). `out` may be
  // an operand.
  void (*apply)(Elementwise operation, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t count,
                float* out);
};

extern const ElementwiseKernels elementwise_baseline;
#if defined(__x86_64__)
extern const ElementwiseKernels elementwise_avx2;
extern const ElementwiseKernels elementwise_avx2_vnni;
extern const ElementwiseKernels elementwise_avx512;
extern const ElementwiseKernels elementwise_avx512_vnni;
#elif defined(__aarch64__)
extern const ElementwiseKernels elementwise_dotprod;
#endif

}  // namespace crayon
