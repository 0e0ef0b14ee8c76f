// Elementwise operations; compiled once for each instruction set, named by CRAYON_KERNELS.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of such a function, and
// it could be the one compiled for instructions that the CPU does not have.
#include "elementwise_kernel.h"

#include "simd.h"

namespace crayon {
namespace {

inline Floats sigmoid(Floats x) {
  constexpr float log2_of_e = 1.44269504088896341f;
  // Beyond, it is 0 or 1; and 2^x is computed up to 127 only.
  const Floats limit = broadcast(87.0f), negative = x < 0.0f ? x : -x;
  const Floats power = exp2((negative < -limit ? -limit : negative) * log2_of_e);
  const Floats of_negative = power / (power + 1.0f);
  return x < 0.0f ? of_negative : 1.0f - of_negative;
}

inline Floats reciprocal_square_root(Floats x) {
  Floats root;
  for (int i = 0; i < lanes; ++i) root[i] = __builtin_sqrtf(x[i]);
  return 1.0f / root;
}

template <typename Operation>
inline void each(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t count, float* out,
                 Operation operation) {
  int64_t i = 0;
  const Floats same_a = a_step ? Floats{} : broadcast(*a), same_b = b_step ? Floats{} : broadcast(*b);
  for (; i + lanes <= count; i += lanes) {
    store(out + i, operation(a_step ? load(a + i) : same_a, b_step ? load(b + i) : same_b));
  }
  for (; i < count; ++i) out[i] = operation(broadcast(a[i * a_step]), broadcast(b[i * b_step]))[0];
}

void apply(Elementwise operation, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t count,
           float* out) {
  switch (operation) {
    case Elementwise::add:
      return each(a, a_step, b, b_step, count, out, [](Floats x, Floats y) { return x + y; });
    case Elementwise::subtract:
      return each(a, a_step, b, b_step, count, out, [](Floats x, Floats y) { return x - y; });
    case Elementwise::multiply:
      return each(a, a_step, b, b_step, count, out, [](Floats x, Floats y) { return x * y; });
    case Elementwise::negate:
      return each(a, a_step, a, a_step, count, out, [](Floats x, Floats) { return -x; });
    case Elementwise::square:
      return each(a, a_step, a, a_step, count, out, [](Floats x, Floats) { return x * x; });
    case Elementwise::sigmoid:
      return each(a, a_step, a, a_step, count, out, [](Floats x, Floats) { return sigmoid(x); });
    case Elementwise::reciprocal_square_root:
      return each(a, a_step, a, a_step, count, out, [](Floats x, Floats) { return reciprocal_square_root(x); });
    case Elementwise::copy:
      return each(a, a_step, a, a_step, count, out, [](Floats x, Floats) { return x; });
  }
}

}  // namespace

#define CRAYON_JOIN_(a, b) a##b
#define CRAYON_JOIN(a, b) CRAYON_JOIN_(a, b)
extern const ElementwiseKernels CRAYON_JOIN(elementwise_, CRAYON_KERNELS) = {apply};

}  // namespace crayon
