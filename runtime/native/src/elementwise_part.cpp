#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <map>
#include <memory>
#include <vector>

#include "elementwise.h"
#include "part.h"
#include "xnnpack_graph.h"

using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Span;

namespace crayon {
namespace {

// XNNPACK shares the work of more among threads.
constexpr ssize_t most_elements = 16384;

// Memory for what a part needs while it runs; all parts use the same.
float* room(size_t number, size_t elements) {
  thread_local std::vector<std::vector<float>> rooms;
  if (rooms.size() <= number) rooms.resize(number + 1);
  if (rooms[number].size() < elements) rooms[number].resize(elements);
  return rooms[number].data();
}

class ElementwisePart final : public Part {
 public:
  explicit ElementwisePart(const ElementwiseGraph& graph) : graph_(graph) {
    for (const auto* list : {&graph.inputs, &graph.outputs}) {
      for (const Argument& a : *list) values_[a.value].argument = static_cast<int>(a.index);
    }
    for (const ElementwiseNode& node : graph.nodes) {
      nodes_.push_back({node, &values_[node.first], &values_[node.second], &values_[node.output]});
    }
    size_t rooms = 0;
    for (auto& [_, value] : values_) {
      if (value.argument < 0) value.room = rooms++;
    }
  }

  const char* name() const override { return "elementwise"; }

  bool takes(Span<EValue*> arguments) const override {
    for (const Argument& a : graph_.inputs) {
      if (!floats(arguments, a)) return false;
      const Tensor& tensor = arguments[a.index]->toTensor();
      if (tensor.numel() > most_elements || tensor.numel() == 0 || tensor.dim() > Shape::most) return false;
    }
    for (const Argument& a : graph_.outputs) {
      if (!floats(arguments, a)) return false;
    }
    return true;
  }

  Error run(Span<EValue*> arguments) override {
    for (const Argument& a : graph_.inputs) {
      const Tensor& tensor = arguments[a.index]->toTensor();
      Value& value = values_.at(a.value);
      value.data = tensor.const_data_ptr<float>();
      value.shape = Shape{};
      value.shape.dims = static_cast<int>(tensor.dim());
      for (int d = 0; d < value.shape.dims; ++d) value.shape.sizes[d] = tensor.size(d);
    }
    for (const Node& node : nodes_) {
      Shape shape;
      if (node.does.concatenates) {
        if (!concatenated(*node.first, *node.second, node.does.axis, shape)) return Error::InvalidArgument;
      } else if (!broadcast_shape(node.first->shape, node.second->shape, shape)) {
        return Error::InvalidArgument;
      }
      float* out = nullptr;
      if (const Error code = place(*node.output, shape, arguments, out); code != Error::Ok) return code;
      if (node.does.concatenates) {
        concatenate(node.first->data, node.first->shape, node.second->data, node.second->shape, node.does.axis, out);
      } else {
        apply_elementwise(node.does.operation, node.first->data, node.first->shape, node.second->data,
                          node.second->shape, out, shape);
      }
      node.output->data = out;
      node.output->shape = shape;
    }
    return Error::Ok;
  }

 private:
  struct Value {
    int argument = -1;  // of the delegate's; -1: it is needed inside only
    const float* data = nullptr;
    Shape shape;
    size_t room = 0;
  };
  struct Node {
    ElementwiseNode does;
    Value *first, *second, *output;
  };

  static bool concatenated(const Value& a, const Value& b, int axis, Shape& shape) {
    if (axis < 0 || axis >= a.shape.dims || a.shape.dims != b.shape.dims) return false;
    shape = a.shape;
    for (int d = 0; d < shape.dims; ++d) {
      if (d != axis && a.shape.sizes[d] != b.shape.sizes[d]) return false;
    }
    shape.sizes[axis] += b.shape.sizes[axis];
    return true;
  }

  static Error place(Value& value, const Shape& shape, Span<EValue*> arguments, float*& out) {
    if (value.argument < 0) {
      out = room(value.room, static_cast<size_t>(shape.count()));
      return Error::Ok;
    }
    Tensor& tensor = arguments[value.argument]->toTensor();
    SizesType sizes[Shape::most];
    for (int d = 0; d < shape.dims; ++d) sizes[d] = static_cast<SizesType>(shape.sizes[d]);
    const Error code = executorch::runtime::resize_tensor(
        tensor, executorch::aten::ArrayRef<SizesType>(sizes, static_cast<size_t>(shape.dims)));
    out = tensor.mutable_data_ptr<float>();
    return code;
  }

  ElementwiseGraph graph_;
  std::map<uint32_t, Value> values_;
  std::vector<Node> nodes_;
};

// Whether every value is an input or computed before it is used.
bool is_ordered(const ElementwiseGraph& graph) {
  std::map<uint32_t, bool> known;
  for (const Argument& a : graph.inputs) known[a.value] = true;
  for (const ElementwiseNode& node : graph.nodes) {
    if (!known[node.first] || !known[node.second] || known[node.output]) return false;
    known[node.output] = true;
  }
  for (const Argument& a : graph.outputs) {
    if (!known[a.value]) return false;
  }
  return !graph.nodes.empty();
}

}  // namespace

std::unique_ptr<Part> make_elementwise_part(const uint8_t* data, size_t size) {
  const auto graph = read_elementwise_graph(data, size);
  if (!graph || !is_ordered(*graph)) return nullptr;
  return std::make_unique<ElementwisePart>(*graph);
}

}  // namespace crayon
