// Linear layers with quantized weights over tokens that are quantized while they run, on a CPU.
//
// Weights are used where they lie, in a mapped file: nothing is packed when a model is loaded, and a weight takes
// memory once. Those of adapters, in int8 and too narrow or too few for that, are put in another order first.
//
// A token is rounded to int8 with a scale and a zero point of its own, products and their sums within a group are
// exact; so results differ from XNNPACK's by the order in which groups are added up, in float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "linear_kernel.h"

namespace crayon {

// Memory that grows, for what is computed on the way; aligned for vectors.
class Workspace {
 public:
  void* reserve(size_t bytes);  // what was there before is lost

 private:
  std::unique_ptr<uint8_t[]> block_;
  size_t size_ = 0;
};

// The sums of the rows of a matrix, which what a token's zero point adds depends on: times their scales for int4, of
// the codes for int8. The first product with the matrix computes them on the way.
struct RowSums {
  std::vector<float> scaled;
  std::vector<int32_t> whole;
  bool known = false;
};

// A weight matrix [rows, width] for computing with.
class LinearWeights {
 public:
  // Codes two in a byte (see Int4Rows), bfloat16 scales [rows, width / group_size]. Neither is copied.
  static std::unique_ptr<LinearWeights> int4(const uint8_t* codes, const uint16_t* scales, int64_t rows, int64_t width,
                                             int64_t group_size, std::shared_ptr<RowSums> sums);
  // Whether there are kernels for such weights.
  static bool takes_int4(int64_t rows, int64_t width, int64_t group_size);
  // Codes [rows, width] and float32 scales [rows]. Both are copied where `copies_int8` says so.
  static std::unique_ptr<LinearWeights> int8(const int8_t* codes, const float* scales, int64_t rows, int64_t width,
                                             std::shared_ptr<RowSums> sums);
  static bool copies_int8(int64_t rows, int64_t width);

  int64_t rows = 0, width = 0, group_size = 0;  // 0: int8
  size_t bytes() const { return static_cast<size_t>(rows * width) / (group_size ? 2 : 1); }

 private:
  friend class LinearJob;
  Int4Rows int4_;
  Int8Rows int8_;
  InterleavedRows interleaved_;  // instead of `int8_`, if it has codes
  std::shared_ptr<RowSums> sums_;
  std::vector<uint8_t> last_codes_;
  std::vector<uint16_t> last_scales_;
  std::vector<int8_t> copied_codes_;
  std::vector<float> copied_scales_;
};

// One product: `out` [tokens, rows] of `in` [tokens, width], both contiguous.
struct LinearCall {
  LinearWeights* weights;
  const float* in;
  float* out;
};

// Computes products that do not need each other, with the threads sharing all of them. Calls with the same `in` round
// it once. One call at a time in a process.
void run_linears(const LinearCall* calls, size_t count, int64_t tokens, const ParallelFor& parallel);

}  // namespace crayon
