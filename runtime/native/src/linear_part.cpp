#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "linear.h"
#include "part.h"
#include "thread_pool.h"
#include "xnnpack_graph.h"

using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Result;
using executorch::runtime::Span;

namespace crayon {
namespace {

// By the names of the weights, which say what they are: methods and programs over the same weights share them.
std::shared_ptr<RowSums> sums_of(const std::string& codes, const std::string& scales) {
  static std::map<std::pair<std::string, std::string>, std::weak_ptr<RowSums>> known;
  std::weak_ptr<RowSums>& entry = known[{codes, scales}];
  std::shared_ptr<RowSums> found = entry.lock();
  if (!found) entry = found = std::make_shared<RowSums>();
  return found;
}

// A weight's data of this many bytes.
Result<FreeableBuffer> take(const NamedDataMap& map, const std::string& name, size_t bytes) {
  auto found = map.get_data(name);
  if (!found.ok()) {
    ET_LOG(Error, "no data for the weight %s", name.c_str());
  } else if (found->size() != bytes) {
    ET_LOG(Error, "the weight %s has %zu bytes instead of %zu", name.c_str(), found->size(), bytes);
    return Error::InvalidExternalData;
  }
  return found;
}

class LinearPart final : public Part {
 public:
  // False: a value is neither an argument nor computed before it is used.
  bool arrange(LinearGraph graph);
  Error load(const NamedDataMap* map);

  const char* name() const override { return name_.c_str(); }
  bool takes(Span<EValue*>) const override { return true; }
  Error run(Span<EValue*> arguments) override;

 private:
  // Where a value is: an argument, or (-1) memory of ours.
  struct Place {
    int argument;
    std::vector<float> room;
  };

  LinearGraph graph_;
  std::vector<std::unique_ptr<LinearWeights>> weights_;  // of the graph's nodes
  std::vector<FreeableBuffer> data_;
  std::vector<size_t> stages_;  // nodes before each of these need no result of each other
  std::map<uint32_t, Place> places_;
  std::string name_;
};

bool LinearPart::arrange(LinearGraph graph) {
  graph_ = std::move(graph);
  for (const auto* list : {&graph_.inputs, &graph_.outputs}) {
    for (const Argument& a : *list) places_[a.value] = {static_cast<int>(a.index), {}};
  }
  std::map<uint32_t, size_t> made;  // by which node, counted from 1; 0: by nobody here
  for (const Argument& a : graph_.inputs) made[a.value] = 0;
  size_t stage = 0;
  for (size_t n = 0; n < graph_.nodes.size(); ++n) {
    const LinearNode& node = graph_.nodes[n];
    const auto from = made.find(node.input);
    if (from == made.end()) return false;
    if (from->second > stage) {
      stages_.push_back(n);
      stage = n;
    }
    places_.emplace(node.output, Place{-1, {}});
    made[node.output] = n + 1;
    name_ += (n ? " " : "linear ") + std::to_string(node.rows) + "x" + std::to_string(node.width);
  }
  stages_.push_back(graph_.nodes.size());
  for (const Argument& a : graph_.outputs) {
    if (!made.count(a.value)) return false;
  }
  return !graph_.inputs.empty();
}

Error LinearPart::load(const NamedDataMap* map) {
  if (!map) return Error::InvalidState;
  for (const LinearNode& node : graph_.nodes) {
    const auto elements = static_cast<size_t>(node.rows * node.width);
    const bool int4 = node.group_size > 0;
    const size_t scales_bytes =
        int4 ? 2 * elements / static_cast<size_t>(node.group_size) : 4 * static_cast<size_t>(node.rows);
    auto codes = take(*map, node.codes, int4 ? elements / 2 : elements);
    if (!codes.ok()) return codes.error();
    auto scales = take(*map, node.scales, scales_bytes);
    if (!scales.ok()) return scales.error();
    auto sums = sums_of(node.codes, node.scales);
    if (int4) {
      weights_.push_back(LinearWeights::int4(static_cast<const uint8_t*>(codes->data()),
                                             static_cast<const uint16_t*>(scales->data()), node.rows, node.width,
                                             node.group_size, std::move(sums)));
    } else {
      weights_.push_back(LinearWeights::int8(static_cast<const int8_t*>(codes->data()),
                                             static_cast<const float*>(scales->data()), node.rows, node.width,
                                             std::move(sums)));
      if (LinearWeights::copies_int8(node.rows, node.width)) continue;
    }
    data_.push_back(std::move(*codes));
    data_.push_back(std::move(*scales));
  }
  return Error::Ok;
}

Error LinearPart::run(Span<EValue*> arguments) {
  for (const auto* list : {&graph_.inputs, &graph_.outputs}) {
    for (const Argument& a : *list) {
      if (!floats(arguments, a)) return Error::InvalidArgument;
    }
  }
  const Tensor& first = arguments[graph_.inputs.front().index]->toTensor();
  const int64_t width = graph_.nodes.front().width, tokens = first.numel() / width;
  if (first.dim() < 1 || first.size(first.dim() - 1) != width || tokens == 0) return Error::InvalidArgument;

  std::vector<LinearCall> calls;
  for (size_t n = 0; n < graph_.nodes.size(); ++n) {
    const LinearNode& node = graph_.nodes[n];
    Place &to = places_.at(node.output), &from = places_.at(node.input);
    const float* in = from.room.data();
    if (from.argument >= 0) {
      const Tensor& tensor = arguments[from.argument]->toTensor();
      if (tensor.numel() != tokens * node.width) return Error::InvalidArgument;
      in = tensor.const_data_ptr<float>();
    }
    float* out = nullptr;
    if (to.argument < 0) {
      to.room.resize(static_cast<size_t>(tokens * node.rows));
      out = to.room.data();
    } else {
      SizesType sizes[executorch::runtime::kTensorDimensionLimit];
      const auto dims = static_cast<size_t>(first.dim());
      for (size_t d = 0; d < dims; ++d) sizes[d] = first.size(static_cast<ssize_t>(d));
      sizes[dims - 1] = static_cast<SizesType>(node.rows);
      Tensor& tensor = arguments[to.argument]->toTensor();
      const Error code = executorch::runtime::resize_tensor(tensor, executorch::aten::ArrayRef<SizesType>(sizes, dims));
      if (code != Error::Ok) return code;
      out = tensor.mutable_data_ptr<float>();
    }
    calls.push_back({weights_[n].get(), in, out});
  }
  size_t done = 0;
  for (const size_t end : stages_) {
    run_linears(calls.data() + done, end - done, tokens, thread_pool());
    done = end;
  }
  return Error::Ok;
}

}  // namespace

Result<std::unique_ptr<Part>> make_linear_part(const uint8_t* data, size_t size, const NamedDataMap* map) {
  auto graph = read_linear_graph(data, size);
  auto part = std::make_unique<LinearPart>();
  if (!graph || !part->arrange(std::move(*graph))) return std::unique_ptr<Part>();
  const Error code = part->load(map);
  if (code != Error::Ok) return code;
  return std::unique_ptr<Part>(std::move(part));
}

}  // namespace crayon
