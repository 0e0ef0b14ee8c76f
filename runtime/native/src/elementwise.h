// Elementwise operations on few numbers, as a token's between two linear layers: what they cost is the call.
#pragma once

#include <cstdint>
#include <vector>

#include "elementwise_kernel.h"

namespace crayon {

// A contiguous array of up to four dimensions.
struct Shape {
  static constexpr int most = 4;
  int64_t sizes[most] = {1, 1, 1, 1};
  int dims = 0;

  int64_t count() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }  // all of `sizes` beyond `dims` are 1
  int64_t from_end(int d) const { return d < dims ? sizes[dims - 1 - d] : 1; }
};

// The shape of a result whose operands have these, as numpy broadcasts; false: they do not fit.
bool broadcast_shape(const Shape& a, const Shape& b, Shape& out);

void apply_elementwise(Elementwise operation, const float* a, const Shape& a_shape, const float* b,
                       const Shape& b_shape, float* out, const Shape& out_shape);

// Puts two arrays, which differ in the size of one dimension at most, one after the other there.
void concatenate(const float* a, const Shape& a_shape, const float* b, const Shape& b_shape, int axis, float* out);

}  // namespace crayon
