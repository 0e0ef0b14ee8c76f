// Memory that ExecuTorch computes in.
#pragma once

#include <executorch/runtime/core/memory_allocator.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace crayon {

// Zeros from the system, which take no room before they are written.
class Memory {
 public:
  explicit Memory(size_t size);  // throws Refusal (NO_MEMORY)
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Memory for what a method computes on the way. All methods can have the same, since one runs at a time.
std::shared_ptr<Memory> shared_scratch(size_t size);

// What kernels ask for while they run. ExecuTorch resets it after each of them, so the block is kept between calls.
class KernelMemory final : public executorch::runtime::MemoryAllocator {
 public:
  KernelMemory() : MemoryAllocator(0, nullptr) {}
  ~KernelMemory() override;
  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override;
  void reset() override;

 private:
  std::unique_ptr<uint8_t[]> block_;
  size_t size_ = 0, used_ = 0, wanted_ = 0;
  std::vector<std::unique_ptr<uint8_t[]>> more_;
};

}  // namespace crayon
