// Graphs that ExecuTorch compiled for XNNPACK, as far as they are linear layers of quantized tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

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

}  // namespace crayon
