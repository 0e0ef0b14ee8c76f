// The bytes of a .pte, mapped so that its tables can be changed in memory.
#pragma once

#include <executorch/runtime/core/data_loader.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace crayon {

class ProgramFile final : public executorch::runtime::DataLoader {
 public:
  explicit ProgramFile(const std::string& path);   // throws Refusal (NO_FILE, BAD_PROGRAM, NO_MEMORY)
  ProgramFile(const uint8_t* bytes, size_t size);  // copies them; throws Refusal (BAD_PROGRAM, NO_MEMORY)
  ~ProgramFile() override;
  ProgramFile(const ProgramFile&) = delete;
  ProgramFile& operator=(const ProgramFile&) = delete;

  const uint8_t* data() const { return data_; }
  // The same for the file and all that computes with this object: nobody else sees what `write` changes.
  void write(size_t offset, const char* bytes, size_t count);

  size_t bytes() const { return size_; }
  executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(size_t offset, size_t size,
                                                                        const SegmentInfo& info) const override;
  executorch::runtime::Error load_into(size_t offset, size_t size, const SegmentInfo& info,
                                       void* buffer) const override;
  executorch::runtime::Result<size_t> size() const override { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace crayon
