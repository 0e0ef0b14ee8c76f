#include "xnnpack_graph.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>

#include "elementwise.h"
#include "linear.h"
#include "tables.h"

namespace crayon {
namespace {

// backends/xnnpack/serialization/schema.fbs of executorch 1.5.1: fields by their place, members of unions and
// enumerations by their number.
constexpr int graph_nodes = 1, graph_values = 2, graph_inputs = 4, graph_outputs = 5, graph_constants = 8;
constexpr int node_type = 0, node = 1, node_limits = 3;
constexpr uint8_t fully_connected = 2, convert = 18, concatenate_two = 32;
constexpr int convert_input = 0, convert_output = 1, convert_flags = 2;
constexpr int linear_input = 0, linear_filter = 1, linear_bias = 2, linear_output = 3, linear_flags = 4;
constexpr int unary_input = 0, unary_output = 1, unary_flags = 2;
constexpr int binary_first = 0, binary_second = 1, binary_output = 2, binary_flags = 3;
constexpr int concatenate_axis = 0, concatenate_first = 1, concatenate_second = 2, concatenate_output = 5,
              concatenate_flags = 6;
constexpr int any_value_type = 0, any_value = 1;
constexpr uint8_t plain_value = 1, quantized_value = 2;
constexpr int base_value = 0, parameters_type = 1, parameters = 2;
constexpr uint8_t per_channel = 1, per_token = 3, per_channel_group = 4;
constexpr int value_datatype = 0, value_dims = 2, value_constant = 3, value_argument = 4, value_id = 6;
constexpr int channel_scales = 2, channel_dim = 1, group_size = 2, group_scales = 4;
constexpr int constant_name = 2;
constexpr uint16_t fp32 = 1, qcint8 = 6, qdint8 = 9, qbint4 = 10;
constexpr uint32_t no_value = 0xFFFFFFFF;

// Behind XNNHeader, where there is one.
Table graph_table(const uint8_t* data, size_t size) {
  constexpr size_t header_size = 30;
  uint32_t offset = 0, length = 0;
  if (size >= header_size && std::memcmp(data + 4, "XH00", 4) == 0) {
    std::memcpy(&offset, data + 10, sizeof offset);
    std::memcpy(&length, data + 14, sizeof length);
    if (offset > size || length > size - offset) {
      refuse(CRAYON_NATIVE_BAD_PROGRAM, "a graph for XNNPACK reaches beyond its end");
    }
    return Table::root(data + offset, length, CRAYON_NATIVE_BAD_PROGRAM);
  }
  return Table::root(data, size, CRAYON_NATIVE_BAD_PROGRAM);
}

struct Value {
  uint16_t datatype = 0;
  std::vector<int64_t> dims;
  uint32_t constant = 0, argument = 0;
  uint8_t parameters = 0;
  uint32_t channel_dim = 0, group_size = 0, scales = 0;
};

std::map<uint32_t, Value> read_values(const Table& graph) {
  std::map<uint32_t, Value> values;
  for (size_t i = 0; i < graph.count(graph_values); ++i) {
    const Table entry = graph.element_table(graph_values, i);
    const uint8_t kind = entry.byte(any_value_type);
    if (kind != plain_value && kind != quantized_value) return {};
    const Table outer = entry.table(any_value);
    const Table tensor = kind == plain_value ? outer : outer.table(base_value);
    Value value;
    value.datatype = tensor.short_number(value_datatype);
    value.constant = tensor.number(value_constant);
    value.argument = tensor.number(value_argument);
    for (size_t d = 0; d < tensor.count(value_dims); ++d) value.dims.push_back(tensor.element(value_dims, d));
    if (kind == quantized_value) {
      value.parameters = outer.byte(parameters_type);
      if (value.parameters == per_channel || value.parameters == per_channel_group) {
        const Table quantization = outer.table(parameters);
        value.channel_dim = quantization.number(channel_dim);
        value.group_size = value.parameters == per_channel ? 0 : quantization.number(group_size);
        value.scales = quantization.number(value.parameters == per_channel ? channel_scales : group_scales);
      }
    }
    values[tensor.number(value_id)] = std::move(value);
  }
  return values;
}

void read_arguments(const Table& graph, const std::map<uint32_t, Value>& values, int field, std::vector<Argument>& to) {
  for (size_t i = 0; i < graph.count(field); ++i) {
    const auto found = values.find(graph.element(field, i));
    if (found == values.end()) {
      refuse(CRAYON_NATIVE_BAD_PROGRAM, "a graph for XNNPACK names a value that it does not have");
    }
    to.push_back({found->first, found->second.argument});
  }
}

struct Operation {
  uint8_t type;  // of the node
  Elementwise operation;
};
constexpr Operation unary_operations[] = {
    {4, Elementwise::sigmoid}, {27, Elementwise::negate},
    {28, Elementwise::square}, {40, Elementwise::reciprocal_square_root},
    {46, Elementwise::copy},
};
constexpr Operation binary_operations[] = {
    {1, Elementwise::add}, {15, Elementwise::multiply}, {16, Elementwise::subtract}};

// The name of a constant's data; empty: it has none.
std::string name_of(const Table& graph, uint32_t constant) {
  if (constant == 0 || constant >= graph.count(graph_constants)) return "";
  const Table entry = graph.element_table(graph_constants, constant);
  return entry.field(constant_name) ? entry.text(constant_name) : "";
}

}  // namespace

std::optional<LinearGraph> read_linear_graph(const uint8_t* data, size_t size) {
  const Table graph = graph_table(data, size);
  const auto values = read_values(graph);
  const auto find = [&](uint32_t id) -> const Value* {
    const auto found = values.find(id);
    return found == values.end() ? nullptr : &found->second;
  };
  LinearGraph made;
  std::map<uint32_t, uint32_t> rounded;  // of which value, a value of quantized tokens
  for (size_t i = 0; i < graph.count(graph_nodes); ++i) {
    const Table entry = graph.element_table(graph_nodes, i);
    if (entry.field(node_limits)) return std::nullopt;
    const Table body = entry.table(node);
    if (entry.byte(node_type) == convert) {
      const uint32_t from = body.number(convert_input), to = body.number(convert_output);
      const Value *source = find(from), *target = find(to);
      if (!source || !target || source->datatype != fp32 || target->datatype != qdint8 ||
          target->parameters != per_token || body.number(convert_flags) != 0) {
        return std::nullopt;
      }
      rounded[to] = from;
    } else if (entry.byte(node_type) == fully_connected) {
      const Value *filter = find(body.number(linear_filter)), *output = find(body.number(linear_output));
      const auto input = rounded.find(body.number(linear_input));
      if (!filter || !output || input == rounded.end() || output->datatype != fp32 || filter->dims.size() != 2 ||
          filter->channel_dim != 0 || body.number(linear_bias) != no_value || body.number(linear_flags) != 0) {
        return std::nullopt;
      }
      const Value& source = *find(input->second);
      LinearNode linear{input->second,
                        body.number(linear_output),
                        filter->dims[0],
                        filter->dims[1],
                        filter->group_size,
                        name_of(graph, filter->constant),
                        name_of(graph, filter->scales)};
      const bool int4 = filter->datatype == qbint4 && filter->parameters == per_channel_group &&
                        LinearWeights::takes_int4(linear.rows, linear.width, linear.group_size);
      const bool int8 =
          filter->datatype == qcint8 && filter->parameters == per_channel && linear.rows > 0 && linear.width > 0;
      if (!(int4 || int8) || linear.codes.empty() || linear.scales.empty() || source.dims.empty() ||
          source.dims.back() != linear.width || output->dims.empty() || output->dims.back() != linear.rows) {
        return std::nullopt;
      }
      made.nodes.push_back(std::move(linear));
    } else {
      return std::nullopt;
    }
  }
  read_arguments(graph, values, graph_inputs, made.inputs);
  read_arguments(graph, values, graph_outputs, made.outputs);
  if (made.nodes.empty()) return std::nullopt;
  return made;
}

std::optional<ElementwiseGraph> read_elementwise_graph(const uint8_t* data, size_t size) {
  const Table graph = graph_table(data, size);
  const auto values = read_values(graph);
  if (values.empty()) return std::nullopt;
  for (const auto& [id, value] : values) {
    if (value.datatype != fp32 || value.constant != 0 || value.dims.size() > Shape::most) return std::nullopt;
  }
  ElementwiseGraph made;
  for (size_t i = 0; i < graph.count(graph_nodes); ++i) {
    const Table entry = graph.element_table(graph_nodes, i);
    if (entry.field(node_limits)) return std::nullopt;
    const Table body = entry.table(node);
    const uint8_t type = entry.byte(node_type);
    const auto is_this = [&](const Operation& o) { return o.type == type; };
    const auto unary = std::find_if(std::begin(unary_operations), std::end(unary_operations), is_this);
    const auto binary = std::find_if(std::begin(binary_operations), std::end(binary_operations), is_this);
    ElementwiseNode made_node;
    uint32_t flags = 0;
    if (unary != std::end(unary_operations)) {
      made_node.operation = unary->operation;
      made_node.first = made_node.second = body.number(unary_input);
      made_node.output = body.number(unary_output);
      flags = body.number(unary_flags);
    } else if (binary != std::end(binary_operations)) {
      made_node.operation = binary->operation;
      made_node.first = body.number(binary_first);
      made_node.second = body.number(binary_second);
      made_node.output = body.number(binary_output);
      flags = body.number(binary_flags);
    } else if (type == concatenate_two) {
      made_node.concatenates = true;
      made_node.axis = static_cast<int>(body.number(concatenate_axis));
      made_node.first = body.number(concatenate_first);
      made_node.second = body.number(concatenate_second);
      made_node.output = body.number(concatenate_output);
      flags = body.number(concatenate_flags);
    } else {
      return std::nullopt;
    }
    if (flags != 0) return std::nullopt;
    made.nodes.push_back(made_node);
  }
  read_arguments(graph, values, graph_inputs, made.inputs);
  read_arguments(graph, values, graph_outputs, made.outputs);
  return made;
}

}  // namespace crayon
