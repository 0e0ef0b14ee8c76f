// The operators of ExecuTorch's LLaMA exports, llama::*, on our own attention.
#pragma once

#include <executorch/runtime/kernel/operator_registry.h>

#include <vector>

namespace crayon {

// For Module::load_method. They are not registered for the whole process: a second library with operators of these
// names, as ExecuTorch's Python package has one, would end it.
std::vector<executorch::runtime::Kernel> llama_operators();

}  // namespace crayon
