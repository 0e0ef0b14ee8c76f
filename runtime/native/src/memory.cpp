#include "memory.h"

#include <sys/mman.h>

#include <new>

#include "errors.h"

namespace crayon {

Memory::Memory(size_t size) : size_(size) {
  if (size == 0) return;
  void* made = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) refuse(CRAYON_NATIVE_NO_MEMORY, "no memory: %zu bytes", size);
  data_ = static_cast<uint8_t*>(made);
}

Memory::~Memory() {
  if (data_) munmap(data_, size_);
}

std::shared_ptr<Memory> shared_scratch(size_t size) {
  static std::weak_ptr<Memory> last;
  if (const auto memory = last.lock(); memory && memory->size() >= size) return memory;
  const auto memory = std::make_shared<Memory>(size);
  last = memory;
  return memory;
}

KernelMemory::~KernelMemory() = default;

void* KernelMemory::allocate(size_t size, size_t alignment) {
  if (alignment == 0 || (alignment & (alignment - 1)) != 0 || size > SIZE_MAX / 2 || alignment > size_t{1} << 20) {
    return nullptr;
  }
  wanted_ += size + alignment;
  const auto aligned = [alignment](uint8_t* p) {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + alignment - 1) & ~(alignment - 1));
  };
  if (size + alignment <= size_ - used_) {
    uint8_t* at = aligned(block_.get() + used_);
    used_ = static_cast<size_t>(at + size - block_.get());
    return at;
  }
  std::unique_ptr<uint8_t[]> chunk(new (std::nothrow) uint8_t[size + alignment]);
  if (!chunk) return nullptr;
  more_.push_back(std::move(chunk));
  return aligned(more_.back().get());
}

void KernelMemory::reset() {
  if (!more_.empty()) {
    more_.clear();
    block_.reset(new (std::nothrow) uint8_t[wanted_]);
    size_ = block_ ? wanted_ : 0;
  }
  used_ = wanted_ = 0;
}

}  // namespace crayon
