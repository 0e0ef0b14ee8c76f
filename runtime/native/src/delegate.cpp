#include "delegate.h"

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/event_tracer_hooks_delegate.h>

#include <memory>
#include <utility>

#include "errors.h"
#include "part.h"

using executorch::runtime::BackendInterface;
using executorch::runtime::DelegateHandle;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;

namespace crayon {
namespace {

struct Handle {
  std::unique_ptr<Part> ours;  // null: XNNPACK computes it
  DelegateHandle* xnnpacks = nullptr;
};

class Delegate final : public BackendInterface {
 public:
  explicit Delegate(BackendInterface& xnnpack) : xnnpack_(xnnpack) {}

  bool is_available() const override { return xnnpack_.is_available(); }

  Result<DelegateHandle*> init(executorch::runtime::BackendInitContext& context, FreeableBuffer* processed,
                               executorch::runtime::ArrayRef<executorch::runtime::CompileSpec> specs) const override {
    const auto* graph = static_cast<const uint8_t*>(processed->data());
    auto handle = std::make_unique<Handle>();
    auto linear = make_linear_part(graph, processed->size(), context.get_named_data_map());
    if (!linear.ok()) return linear.error();
    handle->ours = std::move(*linear);
    if (handle->ours) {
      processed->Free();
      return handle.release();
    }
    handle->ours = make_elementwise_part(graph, processed->size());
    auto xnnpacks = xnnpack_.init(context, processed, specs);
    if (!xnnpacks.ok()) return xnnpacks.error();
    handle->xnnpacks = *xnnpacks;
    return handle.release();
  }

  Error execute(executorch::runtime::BackendExecutionContext& context, DelegateHandle* handle,
                Span<EValue*> arguments) const override {
    const auto& [ours, xnnpacks] = *static_cast<const Handle*>(handle);
    if (!ours || !ours->takes(arguments)) return xnnpack_.execute(context, xnnpacks, arguments);
    const auto timed = executorch::runtime::event_tracer_start_profiling_delegate(
        context.event_tracer(), ours->name(), executorch::runtime::kUnsetDelegateDebugIntId);
    const Error code = ours->run(arguments);
    executorch::runtime::event_tracer_end_profiling_delegate(context.event_tracer(), timed);
    return code;
  }

  void destroy(DelegateHandle* handle) const override {
    const std::unique_ptr<Handle> owned(static_cast<Handle*>(handle));
    if (owned && owned->xnnpacks) xnnpack_.destroy(owned->xnnpacks);
  }

 private:
  BackendInterface& xnnpack_;
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
