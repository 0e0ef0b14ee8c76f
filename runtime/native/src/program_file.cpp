#include "program_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "errors.h"

using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;

namespace crayon {

ProgramFile::ProgramFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    if (fd >= 0) close(fd);
    refuse(CRAYON_NATIVE_NO_FILE, "cannot read %s", path.c_str());
  }
  size_ = static_cast<size_t>(info.st_size);
  // Pages are private to this process once it writes to them: a few of the tables', whatever lies behind them.
  void* made = size_ ? mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0) : MAP_FAILED;
  close(fd);
  if (size_ == 0) refuse(CRAYON_NATIVE_BAD_PROGRAM, "%s is empty", path.c_str());
  if (made == MAP_FAILED) refuse(CRAYON_NATIVE_NO_MEMORY, "cannot map %s: %zu bytes", path.c_str(), size_);
  data_ = static_cast<uint8_t*>(made);
}

ProgramFile::ProgramFile(const uint8_t* bytes, size_t size) : size_(size) {
  void* made = size ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
  if (size == 0) refuse(CRAYON_NATIVE_BAD_PROGRAM, "the program is empty");
  if (made == MAP_FAILED) refuse(CRAYON_NATIVE_NO_MEMORY, "no memory for a program of %zu bytes", size);
  data_ = static_cast<uint8_t*>(made);
  std::memcpy(data_, bytes, size);
}

ProgramFile::~ProgramFile() { munmap(data_, size_); }

void ProgramFile::write(size_t offset, const char* bytes, size_t count) {
  if (offset > size_ || count > size_ - offset) refuse(CRAYON_NATIVE_BAD_PROGRAM, "the file's tables are damaged");
  std::memcpy(data_ + offset, bytes, count);
}

Result<FreeableBuffer> ProgramFile::load(size_t offset, size_t size, const SegmentInfo&) const {
  if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
  return FreeableBuffer(data_ + offset, size, nullptr);
}

Error ProgramFile::load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer) const {
  if (!buffer || offset > size_ || size > size_ - offset) return Error::InvalidArgument;
  std::memcpy(buffer, data_ + offset, size);
  return Error::Ok;
}

}  // namespace crayon
