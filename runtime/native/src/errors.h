// How errors travel inside the library: as exceptions, until the C functions turn them into statuses.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>
#include <exception>
#include <string>

#include "crayon_native.h"

namespace crayon {

struct Refusal : std::exception {
  Refusal(int32_t status, std::string message, int32_t executorch = 0)
      : status(status), executorch(executorch), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }

  int32_t status, executorch;
  std::string message;
};

[[noreturn]] __attribute__((format(printf, 2, 3))) void refuse(int32_t status, const char* format, ...);

// With what ExecuTorch wrote to its log. `otherwise` is the status of codes that do not say what kind they are of.
[[noreturn]] void refuse(executorch::runtime::Error code, int32_t otherwise, const std::string& what);

// Runs `body` and turns every way in which it can fail into a status and a message. One call at a time: ExecuTorch's
// methods and XNNPACK's caches are not safe for threads, and two computations would only share the cores.
int32_t guarded(crayon_native_error* error, void (*body)(void*), void* state) noexcept;

template <typename Body>
int32_t guarded(crayon_native_error* error, Body&& body) noexcept {
  return guarded(error, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
}

}  // namespace crayon
