#include "errors.h"

#include <executorch/runtime/platform/platform.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

using executorch::runtime::Error;

namespace crayon {
namespace {

// What ExecuTorch says of an error goes to a log; here it is kept for the message.
thread_local std::string last_log;

void keep_log(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message,
              size_t length) {
  if (level != kError && level != kFatal) return;
  if (last_log.size() < 600) last_log.append(last_log.empty() ? "" : "; ").append(message, length);
}

// ExecuTorch ends the process where a check of its own fails, as damaged files make some do. On a thread that called us
// the failure becomes an exception instead; what the abandoned frames held is lost.
struct Aborted : std::exception {};
thread_local bool inside_call = false;

[[noreturn]] void stop() {
  if (inside_call) throw Aborted();
  std::abort();  // a thread of the pool: nobody could catch it
}

void start_executorch() {
  static std::once_flag once;
  std::call_once(once, [] {
    executorch::runtime::pal_init();
    executorch::runtime::register_pal(
        executorch::runtime::PalImpl::create(nullptr, stop, nullptr, nullptr, keep_log, nullptr, nullptr, __FILE__));
  });
}

int32_t fill(crayon_native_error* error, int32_t status, int32_t executorch, const char* message) {
  if (error) {
    error->status = status;
    error->executorch = executorch;
    std::snprintf(error->message, sizeof error->message, "%s", message);
  }
  return status;
}

int32_t status_of(Error code, int32_t otherwise) {
  switch (code) {
    case Error::MemoryAllocationFailed:
    case Error::DelegateMemoryAllocationFailed:
      return CRAYON_NATIVE_NO_MEMORY;
    case Error::OperatorMissing:
      return CRAYON_NATIVE_NO_OPERATOR;
    case Error::AccessFailed:
      return CRAYON_NATIVE_NO_FILE;
    case Error::InvalidExternalData:
      return CRAYON_NATIVE_BAD_DATA;
    case Error::InvalidProgram:
    case Error::DelegateInvalidCompatibility:
      return CRAYON_NATIVE_BAD_PROGRAM;
    default:
      return otherwise;
  }
}

}  // namespace

void refuse(int32_t status, const char* format, ...) {
  char message[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Refusal(status, message);
}

void refuse(Error code, int32_t otherwise, const std::string& what) {
  std::string message = what + ": " + executorch::runtime::to_string(code);
  if (!last_log.empty()) message += ": " + last_log;
  throw Refusal(status_of(code, otherwise), message, static_cast<int32_t>(code));
}

int32_t guarded(crayon_native_error* error, void (*body)(void*), void* state) noexcept {
  static std::mutex one_at_a_time;
  struct Inside {
    Inside() { inside_call = true; }
    ~Inside() { inside_call = false; }
  };
  try {
    const std::lock_guard lock(one_at_a_time);
    start_executorch();
    last_log.clear();
    const Inside inside;
    body(state);
    return CRAYON_NATIVE_OK;
  } catch (const Refusal& e) {
    return fill(error, e.status, e.executorch, e.message.c_str());
  } catch (const Aborted&) {
    return fill(error, CRAYON_NATIVE_BAD_PROGRAM, 0, last_log.empty() ? "ExecuTorch gave up" : last_log.c_str());
  } catch (const std::bad_alloc&) {
    return fill(error, CRAYON_NATIVE_NO_MEMORY, 0, "no memory");
  } catch (const std::exception& e) {
    return fill(error, CRAYON_NATIVE_FAILED, 0, e.what());
  } catch (...) {
    return fill(error, CRAYON_NATIVE_FAILED, 0, "an unknown exception");
  }
}

}  // namespace crayon
