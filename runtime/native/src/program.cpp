#include "program.h"

#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>

#include <algorithm>

#include "delegate.h"
#include "errors.h"
#include "operators.h"
#include "tables.h"

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace crayon {
namespace {

constexpr int plan_name = 0, plan_values = 2, plan_delegates = 7, value_type = 0, value = 1;

constexpr int program_plans = 1, delegate_id = 0;

Table tables(const ProgramFile& file) { return Table::root(file.data(), file.bytes(), CRAYON_NATIVE_BAD_PROGRAM); }

Table find_plan(const ProgramFile& file, const std::string& method) {
  const Table program = tables(file);
  constexpr int plans = program_plans;
  for (size_t i = 0; i < program.count(plans); ++i) {
    const Table plan = program.element_table(plans, i);
    if (plan.text(plan_name) == method) return plan;
  }
  refuse(CRAYON_NATIVE_NO_METHOD, "no method %s", method.c_str());
}

std::string of(const Program& program, const std::string& method) { return program.path() + ": " + method; }

// Where the program's delegates of XNNPACK's are named, our name is written.
void take_delegates(ProgramFile& file) {
  const Table program = tables(file);
  for (size_t p = 0; p < program.count(program_plans); ++p) {
    const Table plan = program.element_table(program_plans, p);
    for (size_t d = 0; d < plan.count(plan_delegates); ++d) {
      const Table delegate = plan.element_table(plan_delegates, d);
      if (delegate.text(delegate_id) == xnnpack_name) {
        file.write(delegate.text_offset(delegate_id), delegate_name, sizeof delegate_name - 1);
      }
    }
  }
}

}  // namespace

Program::Program(const char* path, const uint8_t* bytes, size_t size, const std::vector<std::string>& data)
    : path_(path) {
  register_delegate();
  file_ = bytes ? std::make_unique<ProgramFile>(bytes, size) : std::make_unique<ProgramFile>(path_);
  // Full verification: it reads only the program's tables, and a damaged one must not be run.
  auto program =
      executorch::runtime::Program::load(file_.get(), executorch::runtime::Program::Verification::InternalConsistency);
  if (!program.ok()) refuse(program.error(), CRAYON_NATIVE_BAD_PROGRAM, path_);
  program_ = std::make_unique<executorch::runtime::Program>(std::move(*program));
  take_delegates(*file_);
  if (!data.empty()) data_ = std::make_unique<DataFiles>(data);
  if (has("get_max_context_len")) context_length_ = constant("get_max_context_len");
}

std::vector<std::string> Program::methods() const {
  std::vector<std::string> names;
  for (size_t i = 0; i < program_->num_methods(); ++i) {
    const auto name = program_->get_method_name(i);
    if (!name.ok()) refuse(name.error(), CRAYON_NATIVE_BAD_PROGRAM, path_);
    names.emplace_back(*name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool Program::has(const std::string& method) const {
  const auto names = methods();
  return std::find(names.begin(), names.end(), method) != names.end();
}

int64_t Program::constant(const std::string& method) const {
  if (!has(method)) refuse(CRAYON_NATIVE_NO_METHOD, "%s has no method %s", path_.c_str(), method.c_str());
  const Table plan = find_plan(*file_, method);
  // It is one of the method's values: nothing has to run.
  constexpr int inputs = 3, outputs = 4;
  if (plan.count(inputs) == 0 && plan.count(outputs) == 1 && plan.element(outputs, 0) < plan.count(plan_values)) {
    const Table entry = plan.element_table(plan_values, plan.element(outputs, 0));
    constexpr uint8_t is_int = 2, is_bool = 3;
    if (entry.byte(value_type) == is_int) return entry.table(value).long_number(0);
    if (entry.byte(value_type) == is_bool) return entry.table(value).byte(0) != 0;
  }
  refuse(CRAYON_NATIVE_BAD_PROGRAM, "%s: %s does not return one integer", path_.c_str(), method.c_str());
}

Signature Program::signature(const std::string& method) const {
  const auto meta = program_->method_meta(method.c_str());
  if (!meta.ok()) refuse(meta.error(), CRAYON_NATIVE_BAD_PROGRAM, of(*this, method));
  Signature found;
  const size_t outputs = meta->num_outputs();
  bool fits = meta->num_inputs() == 2 && (outputs == 1 || outputs == 3);
  for (size_t i = 0; fits && i < 2; ++i) {
    const auto input = meta->input_tensor_meta(i);
    fits = input.ok() && input->scalar_type() == ScalarType::Long && input->sizes().size() == 2 - i;
    if (fits && i == 0) found.max_tokens = input->sizes()[1];
  }
  for (size_t i = 0; fits && i < outputs; ++i) {
    const auto output = meta->output_tensor_meta(i);
    fits = output.ok() && output->scalar_type() == ScalarType::Float && !output->sizes().empty();
    if (!fits) break;
    const int64_t size = output->sizes()[output->sizes().size() - 1];
    fits = size > 0 && (i < 2 || size == found.tap_size);
    (i == 0 ? found.vocab_size : found.tap_size) = size;
  }
  if (!fits || found.max_tokens <= 0) {
    refuse(CRAYON_NATIVE_BAD_PROGRAM,
           "%s: %s is not a method (tokens, position) -> logits, or with the tap's sum and last", path_.c_str(),
           method.c_str());
  }
  return found;
}

std::string Program::language_method() const {
  if (has("forward")) {
    signature("forward");
    return "forward";
  }
  for (const std::string& name : methods()) {
    const auto meta = program_->method_meta(name.c_str());
    if (!meta.ok() || meta->num_inputs() == 0) continue;
    signature(name);
    return name;
  }
  refuse(CRAYON_NATIVE_BAD_PROGRAM, "%s has no method (tokens, position) -> logits", path_.c_str());
}

std::vector<size_t> Program::planned(const std::string& method) const {
  const auto meta = program_->method_meta(method.c_str());
  if (!meta.ok()) refuse(meta.error(), CRAYON_NATIVE_BAD_PROGRAM, of(*this, method));
  std::vector<size_t> sizes;
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto size = meta->memory_planned_buffer_size(i);
    if (!size.ok() || *size < 0) refuse(CRAYON_NATIVE_BAD_PROGRAM, "%s: no plan of memory", of(*this, method).c_str());
    sizes.push_back(static_cast<size_t>(*size));
  }
  return sizes;
}

std::vector<StateTensor> Program::state(const std::string& method) const {
  const Table plan = find_plan(*file_, method);
  constexpr int scalar_type = 0, sizes = 2, allocation = 6, memory_id = 0, offset_low = 1, offset_high = 2;
  constexpr uint8_t is_tensor = 5;
  std::vector<StateTensor> found;
  for (size_t v = 0; v < plan.count(plan_values); ++v) {
    const Table entry = plan.element_table(plan_values, v);
    if (entry.byte(value_type) != is_tensor) continue;
    const Table tensor = entry.table(value);
    if (!tensor.field(allocation) || tensor.table(allocation).number(memory_id) != 2) continue;
    const Table place = tensor.table(allocation);
    StateTensor made{place.number(offset_low) | uint64_t{place.number(offset_high)} << 32,
                     static_cast<int8_t>(tensor.byte(scalar_type)),
                     {}};
    for (size_t d = 0; d < tensor.count(sizes); ++d)
      made.sizes.push_back(static_cast<int32_t>(tensor.element(sizes, d)));
    found.push_back(std::move(made));
  }
  std::sort(found.begin(), found.end(), [](const StateTensor& a, const StateTensor& b) { return a.offset < b.offset; });
  return found;
}

Method::Method(std::shared_ptr<const Program> program, std::string name, std::shared_ptr<Memory> state,
               executorch::runtime::EventTracer* tracer)
    : program_(std::move(program)), name_(std::move(name)), signature_(program_->signature(name_)) {
  const auto sizes = program_->planned(name_);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool is_state = sizes.size() == 1 || i == 1;
    if (is_state && (!state || state->size() < sizes[i])) {
      refuse(CRAYON_NATIVE_BAD_PROGRAM, "%s: needs more memory than the cache has", of(*program_, name_).c_str());
    }
    memory_.push_back(is_state ? state : i == 0 ? shared_scratch(sizes[i]) : std::make_shared<Memory>(sizes[i]));
    buffers_.push_back({memory_[i]->data(), sizes[i]});
  }
  planned_ = std::make_unique<executorch::runtime::HierarchicalAllocator>(
      executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(buffers_.data(), buffers_.size()));
  static std::weak_ptr<KernelMemory> kernel_memory;
  kernel_memory_ = kernel_memory.lock();
  if (!kernel_memory_) kernel_memory = kernel_memory_ = std::make_shared<KernelMemory>();
  manager_ = std::make_unique<executorch::runtime::MemoryManager>(&structures_, planned_.get(), kernel_memory_.get());

  // XNNPACK packs a weight once for all methods that name it, and computes in memory that all methods share.
  executorch::runtime::BackendOptions<2> options;
  executorch::runtime::LoadBackendOptionsMap map;
  constexpr int one_workspace = 2;  // WorkspaceSharingMode::Global
  Error code = options.set_option("weight_cache_enabled", true);
  if (code == Error::Ok) code = options.set_option("workspace_sharing_mode", one_workspace);
  if (code == Error::Ok) code = map.set_options(delegate_name, options.view());
  if (code != Error::Ok) refuse(code, CRAYON_NATIVE_FAILED, "XNNPACK's options");

  static const auto kernels = llama_operators();
  auto loaded = program_->executorch().load_method(
      name_.c_str(), manager_.get(), tracer, program_->data(), &map,
      executorch::runtime::Span<const executorch::runtime::Kernel>(kernels.data(), kernels.size()));
  if (!loaded.ok()) {
    // NotFound is a name here that no file holds, InvalidState that there are no files; for the program itself they
    // would have been found before.
    const Error error = loaded.error();
    const bool data = error == Error::NotFound || (error == Error::InvalidState && !program_->data());
    refuse(error, data ? CRAYON_NATIVE_BAD_DATA : CRAYON_NATIVE_BAD_PROGRAM, of(*program_, name_));
  }
  method_ = std::make_unique<executorch::runtime::Method>(std::move(*loaded));
}

void Method::run(const int64_t* tokens, int64_t count, int64_t position, std::vector<float> (&outputs)[3]) {
  const auto ids = executorch::extension::from_blob(const_cast<int64_t*>(tokens), {1, static_cast<SizesType>(count)},
                                                    ScalarType::Long);
  const auto at = executorch::extension::from_blob(&position, {1}, ScalarType::Long);
  Error code = method_->set_input(EValue(ids), 0);
  if (code == Error::Ok) code = method_->set_input(EValue(at), 1);
  if (code == Error::Ok) code = method_->execute();
  if (code != Error::Ok) refuse(code, CRAYON_NATIVE_FAILED, of(*program_, name_));
  for (int i = 0; i < (signature_.tap_size > 0 ? 3 : 1); ++i) {
    const auto size = static_cast<size_t>(i == 0 ? signature_.vocab_size : signature_.tap_size);
    const EValue& output = method_->get_output(i);
    if (!output.isTensor() || output.toTensor().scalar_type() != ScalarType::Float ||
        static_cast<size_t>(output.toTensor().numel()) < size) {
      refuse(CRAYON_NATIVE_BAD_PROGRAM, "%s returned something else than it says", of(*program_, name_).c_str());
    }
    const auto& tensor = output.toTensor();
    // A program that returns the logits of every token ends with those of the last.
    const float* end = tensor.const_data_ptr<float>() + tensor.numel();
    outputs[i].assign(end - size, end);
  }
}

}  // namespace crayon
