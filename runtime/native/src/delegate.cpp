#include "delegate.h"

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/event_tracer_hooks_delegate.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "linear.h"
#include "thread_pool.h"
#include "xnnpack_graph.h"

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;

namespace crayon {
namespace {

// By the names of the weights, which say what they are: methods and programs over the same weights share them.
std::shared_ptr<RowOffsets> offsets_of(const std::string& codes, const std::string& scales) {
  static std::map<std::pair<std::string, std::string>, std::weak_ptr<RowOffsets>> known;
  std::weak_ptr<RowOffsets>& entry = known[{codes, scales}];
  std::shared_ptr<RowOffsets> found = entry.lock();
  if (!found) entry = found = std::make_shared<RowOffsets>();
  return found;
}

// A part of a method: one of ours, or one of XNNPACK's.
struct Part {
  executorch::runtime::DelegateHandle* xnnpacks = nullptr;

  LinearGraph graph;
  std::vector<std::unique_ptr<LinearWeights>> weights;  // of the graph's nodes
  std::vector<FreeableBuffer> data;
  std::vector<size_t> stages;      // nodes before each of these need no result of each other
  std::map<uint32_t, int> places;  // of a value among the arguments; -1: it is needed inside only
  std::string name;                // for traces

  const float* in(uint32_t value, Span<EValue*> arguments, const std::map<uint32_t, std::vector<float>>& inside) const {
    const int place = places.at(value);
    return place < 0 ? inside.at(value).data() : arguments[place]->toTensor().const_data_ptr<float>();
  }
};

// A weight's data of this many bytes.
Result<FreeableBuffer> take(const executorch::runtime::NamedDataMap& map, const std::string& name, size_t bytes) {
  auto found = map.get_data(name);
  if (!found.ok()) {
    ET_LOG(Error, "no data for the weight %s", name.c_str());
  } else if (found->size() != bytes) {
    ET_LOG(Error, "the weight %s has %zu bytes instead of %zu", name.c_str(), found->size(), bytes);
    return Error::InvalidExternalData;
  }
  return found;
}

Error make_weights(const executorch::runtime::NamedDataMap* map, Part& part) {
  if (!map) return Error::InvalidState;
  for (const LinearNode& node : part.graph.nodes) {
    const auto elements = static_cast<size_t>(node.rows * node.width);
    const bool int4 = node.group_size > 0;
    const size_t scales_bytes =
        int4 ? 2 * elements / static_cast<size_t>(node.group_size) : 4 * static_cast<size_t>(node.rows);
    auto codes = take(*map, node.codes, int4 ? elements / 2 : elements);
    if (!codes.ok()) return codes.error();
    auto scales = take(*map, node.scales, scales_bytes);
    if (!scales.ok()) return scales.error();
    if (int4) {
      part.weights.push_back(LinearWeights::int4(static_cast<const uint8_t*>(codes->data()),
                                                 static_cast<const uint16_t*>(scales->data()), node.rows, node.width,
                                                 node.group_size, offsets_of(node.codes, node.scales)));
      part.data.push_back(std::move(*codes));
      part.data.push_back(std::move(*scales));
    } else {
      part.weights.push_back(LinearWeights::int8(static_cast<const int8_t*>(codes->data()),
                                                 static_cast<const float*>(scales->data()), node.rows, node.width));
    }
  }
  return Error::Ok;
}

// Cuts the nodes into stages and finds where values are; false: a value is neither an argument nor computed before.
bool arrange(Part& part) {
  for (const auto* list : {&part.graph.inputs, &part.graph.outputs}) {
    for (const Argument& a : *list) part.places[a.value] = static_cast<int>(a.index);
  }
  std::map<uint32_t, size_t> made;  // by which node, counted from 1; 0: by nobody here
  for (const Argument& a : part.graph.inputs) made[a.value] = 0;
  size_t stage = 0;
  for (size_t n = 0; n < part.graph.nodes.size(); ++n) {
    const LinearNode& node = part.graph.nodes[n];
    const auto from = made.find(node.input);
    if (from == made.end()) return false;
    if (from->second > stage) {
      part.stages.push_back(n);
      stage = n;
    }
    part.places.emplace(node.output, -1);
    made[node.output] = n + 1;
    part.name += (n ? " " : "linear ") + std::to_string(node.rows) + "x" + std::to_string(node.width);
  }
  part.stages.push_back(part.graph.nodes.size());
  for (const Argument& a : part.graph.outputs) {
    if (!made.count(a.value)) return false;
  }
  return true;
}

Error compute(const Part& part, Span<EValue*> arguments) {
  const auto is_floats = [&](const Argument& a) {
    return a.index < arguments.size() && arguments[a.index]->isTensor() &&
           arguments[a.index]->toTensor().scalar_type() == ScalarType::Float;
  };
  for (const auto* list : {&part.graph.inputs, &part.graph.outputs}) {
    for (const Argument& a : *list) {
      if (!is_floats(a)) return Error::InvalidArgument;
    }
  }
  const Tensor& first = arguments[part.graph.inputs.front().index]->toTensor();
  const int64_t width = part.graph.nodes.front().width;
  if (first.dim() < 1 || first.size(first.dim() - 1) != width) return Error::InvalidArgument;
  const int64_t tokens = first.numel() / width;
  if (tokens == 0) return Error::InvalidArgument;

  static std::map<uint32_t, std::vector<float>> inside;
  std::vector<LinearCall> calls;
  for (size_t n = 0; n < part.graph.nodes.size(); ++n) {
    const LinearNode& node = part.graph.nodes[n];
    const int place = part.places.at(node.output), from = part.places.at(node.input);
    if (from >= 0 && arguments[from]->toTensor().numel() != tokens * node.width) return Error::InvalidArgument;
    float* out = nullptr;
    if (place < 0) {
      std::vector<float>& room = inside[node.output];
      room.resize(static_cast<size_t>(tokens * node.rows));
      out = room.data();
    } else {
      const Tensor& tensor = arguments[place]->toTensor();
      SizesType sizes[executorch::runtime::kTensorDimensionLimit];
      const auto dims = static_cast<size_t>(first.dim());
      for (size_t d = 0; d < dims; ++d) sizes[d] = first.size(static_cast<ssize_t>(d));
      sizes[dims - 1] = static_cast<SizesType>(node.rows);
      const Error code = executorch::runtime::resize_tensor(const_cast<Tensor&>(tensor),
                                                            executorch::aten::ArrayRef<SizesType>(sizes, dims));
      if (code != Error::Ok) return code;
      out = tensor.mutable_data_ptr<float>();
    }
    calls.push_back({part.weights[n].get(), nullptr, out});
  }
  size_t done = 0;
  for (const size_t end : part.stages) {
    for (size_t n = done; n < end; ++n) calls[n].in = part.in(part.graph.nodes[n].input, arguments, inside);
    run_linears(calls.data() + done, end - done, tokens, thread_pool());
    done = end;
  }
  return Error::Ok;
}

class Delegate final : public executorch::runtime::BackendInterface {
 public:
  explicit Delegate(executorch::runtime::BackendInterface& xnnpack) : xnnpack_(xnnpack) {}

  bool is_available() const override { return xnnpack_.is_available(); }

  Result<executorch::runtime::DelegateHandle*> init(
      executorch::runtime::BackendInitContext& context, FreeableBuffer* processed,
      executorch::runtime::ArrayRef<executorch::runtime::CompileSpec> specs) const override {
    auto part = std::make_unique<Part>();
    auto graph = read_linear_graph(static_cast<const uint8_t*>(processed->data()), processed->size());
    if (graph) {
      part->graph = std::move(*graph);
      if (arrange(*part)) {
        const Error code = make_weights(context.get_named_data_map(), *part);
        if (code != Error::Ok) return code;
        processed->Free();
        return part.release();
      }
    }
    auto theirs = xnnpack_.init(context, processed, specs);
    if (!theirs.ok()) return theirs.error();
    part->xnnpacks = *theirs;
    return part.release();
  }

  Error execute(executorch::runtime::BackendExecutionContext& context, executorch::runtime::DelegateHandle* handle,
                Span<EValue*> arguments) const override {
    const Part& part = *static_cast<const Part*>(handle);
    if (part.xnnpacks) return xnnpack_.execute(context, part.xnnpacks, arguments);
    const auto timed = executorch::runtime::event_tracer_start_profiling_delegate(
        context.event_tracer(), part.name.c_str(), executorch::runtime::kUnsetDelegateDebugIntId);
    const Error code = compute(part, arguments);
    executorch::runtime::event_tracer_end_profiling_delegate(context.event_tracer(), timed);
    return code;
  }

  void destroy(executorch::runtime::DelegateHandle* handle) const override {
    const std::unique_ptr<Part> part(static_cast<Part*>(handle));
    if (part && part->xnnpacks) xnnpack_.destroy(part->xnnpacks);
  }

 private:
  executorch::runtime::BackendInterface& xnnpack_;
};

}  // namespace

void register_delegate() {
  static const bool done = [] {
    auto* xnnpack = executorch::runtime::get_backend_class(xnnpack_name);
    if (!xnnpack) refuse(CRAYON_NATIVE_NO_OPERATOR, "this build has no %s", xnnpack_name);
    static Delegate delegate(*xnnpack);
    const Error code = executorch::runtime::register_backend({delegate_name, &delegate});
    if (code != Error::Ok) refuse(code, CRAYON_NATIVE_FAILED, "the delegate of linear layers");
    return true;
  }();
  static_cast<void>(done);
}

}  // namespace crayon
