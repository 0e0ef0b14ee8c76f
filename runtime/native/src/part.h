// Parts of a method that we compute in XNNPACK's place.
#pragma once

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/core/result.h>
#include <executorch/runtime/core/span.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "xnnpack_graph.h"

namespace crayon {

class Part {
 public:
  virtual ~Part() = default;
  virtual const char* name() const = 0;  // for traces
  // Whether it computes arguments of these sizes, or leaves them to XNNPACK.
  virtual bool takes(executorch::runtime::Span<executorch::runtime::EValue*> arguments) const = 0;
  virtual executorch::runtime::Error run(executorch::runtime::Span<executorch::runtime::EValue*> arguments) = 0;
};

// Whether there is an argument of float32.
inline bool floats(executorch::runtime::Span<executorch::runtime::EValue*> arguments, const Argument& a) {
  return a.index < arguments.size() && arguments[a.index]->isTensor() &&
         arguments[a.index]->toTensor().scalar_type() == executorch::aten::ScalarType::Float;
}

// Of a compiled graph that is nothing but linear layers of quantized tokens; null of any other. It takes whatever
// comes.
executorch::runtime::Result<std::unique_ptr<Part>> make_linear_part(const uint8_t* data, size_t size,
                                                                    const executorch::runtime::NamedDataMap* map);

// Of a compiled graph that is nothing but elementwise operations; null of any other. It takes few elements: calling
// XNNPACK takes longer than computing with them.
std::unique_ptr<Part> make_elementwise_part(const uint8_t* data, size_t size);

}  // namespace crayon
