// Graphs that ExecuTorch compiled for XNNPACK, as far as we compute them ourselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "elementwise_kernel.h"

namespace crayon {

// One product: y [tokens, rows] = x [tokens, width] W^T, x rounded to int8 token by token.
struct LinearNode {
  uint32_t input, output;  // values of the graph
  int64_t rows, width;
  int64_t group_size;         // 0: int8 with one scale a row
  std::string codes, scales;  // names of the weights' data
};

struct Argument {
  uint32_t value;
  uint32_t index;  // among the delegate's arguments
};

struct LinearGraph {
  std::vector<Argument> inputs, outputs;
  std::vector<LinearNode> nodes;  // in the order of computation
};

// The graph, if it is nothing but such products. Throws Refusal (BAD_PROGRAM) where its tables are damaged.
std::optional<LinearGraph> read_linear_graph(const uint8_t* data, size_t size);

// One operation on arrays of float32 that are broadcast as numpy does.
struct ElementwiseNode {
  bool concatenates = false;  // instead of `operation`, along `axis`
  Elementwise operation = Elementwise::copy;
  uint32_t first = 0, second = 0, output = 0;  // values; operations on one have it twice
  int axis = 0;
};

struct ElementwiseGraph {
  std::vector<Argument> inputs, outputs;
  std::vector<ElementwiseNode> nodes;  // in the order of computation
};

// The graph, if it is nothing but such operations, without constants. Throws Refusal (BAD_PROGRAM).
std::optional<ElementwiseGraph> read_elementwise_graph(const uint8_t* data, size_t size);

}  // namespace crayon
