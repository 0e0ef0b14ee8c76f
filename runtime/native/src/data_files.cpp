#include "data_files.h"

#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "errors.h"
#include "tables.h"

using executorch::aten::ScalarType;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::TensorLayout;

namespace crayon {
namespace {

template <typename T>
T read_as(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Whoever asked has copied the weight and needs it no more: its pages need not count as this process's.
void let_go(void*, void* data, size_t size) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

DataFiles::DataFiles(const std::vector<std::string>& paths) {
  try {
    for (const std::string& path : paths) map(path);
  } catch (...) {
    for (const File& file : files_) munmap(file.data, file.reserved);
    throw;
  }
}

DataFiles::~DataFiles() {
  for (const File& file : files_) munmap(file.data, file.reserved);
}

void DataFiles::map(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    if (fd >= 0) close(fd);
    refuse(CRAYON_NATIVE_NO_FILE, "cannot read %s", path.c_str());
  }
  const auto size = static_cast<size_t>(info.st_size);
  if (size < 64) {
    close(fd);
    refuse(CRAYON_NATIVE_BAD_DATA, "%s: too short for a .ptd file", path.c_str());
  }
  // XNNPACK takes a weight to be as large as its program says. Zeros follow the file, so that even the last one, which
  // a damaged table made too small, is not read outside of what is mapped.
  const size_t reserved = 2 * size;
  void* made = mmap(nullptr, reserved, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const bool mapped = made != MAP_FAILED && mmap(made, size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
  close(fd);
  if (made != MAP_FAILED) files_.push_back({static_cast<uint8_t*>(made), size, reserved});
  if (!mapped) refuse(CRAYON_NATIVE_NO_MEMORY, "cannot map %s: %zu bytes", path.c_str(), size);
  read(path, files_.back());
}

// The header and tables of a FlatTensor (flat_tensor.fbs, flat_tensor_header.h).
void DataFiles::read(const std::string& path, const File& file) {
  const auto damaged = [&](const char* what) { refuse(CRAYON_NATIVE_BAD_DATA, "%s: %s", path.c_str(), what); };
  if (std::memcmp(file.data + 4, "FT01FH01", 8) != 0) damaged("not a .ptd file");
  const auto tables = read_as<uint64_t>(file.data + 16), tables_size = read_as<uint64_t>(file.data + 24);
  const auto segments_at = read_as<uint64_t>(file.data + 32), segments_size = read_as<uint64_t>(file.data + 40);
  if (tables > file.size || tables_size > file.size - tables || segments_at < tables + tables_size ||
      segments_at > file.size || segments_size > file.size - segments_at) {
    damaged("cut off, or damaged");
  }
  constexpr int segments = 1, named = 2, offset = 0, length = 1, key = 0, segment = 1, layout = 2;
  constexpr int scalar_type = 0, sizes = 1, dim_order = 2;
  const Table root = Table::root(file.data, tables + tables_size, CRAYON_NATIVE_BAD_DATA);
  for (size_t i = 0; i < root.count(named); ++i) {
    const Table name = root.element_table(named, i);
    if (name.number(segment) >= root.count(segments)) damaged("a weight has no place");
    const Table place = root.element_table(segments, name.number(segment));
    const auto at = static_cast<uint64_t>(place.long_number(offset)),
               bytes = static_cast<uint64_t>(place.long_number(length));
    if (at > segments_size || bytes > segments_size - at || (segments_at + at) % 16 != 0) {
      damaged("a weight lies outside the file");
    }
    Entry entry{file.data + segments_at + at, static_cast<size_t>(bytes), name.field(layout) != 0, 0, {}, {}};
    if (entry.is_tensor) {
      const Table tensor = name.table(layout);
      entry.type = static_cast<int8_t>(tensor.byte(scalar_type));
      if (!executorch::runtime::isValid(static_cast<ScalarType>(entry.type))) damaged("a weight has no type");
      uint64_t expected = executorch::runtime::elementSize(static_cast<ScalarType>(entry.type));
      for (size_t d = 0; d < tensor.count(sizes); ++d) {
        entry.sizes.push_back(static_cast<int32_t>(tensor.element(sizes, d)));
        if (entry.sizes.back() < 0 || __builtin_mul_overflow(expected, entry.sizes.back(), &expected)) {
          damaged("a weight has no shape");
        }
      }
      for (size_t d = 0; d < tensor.count(dim_order); ++d) entry.order.push_back(tensor.element_byte(dim_order, d));
      if (entry.order.size() != entry.sizes.size() || expected > bytes) damaged("a weight does not fit its shape");
    }
    const auto [made, is_new] = entries_.emplace(name.text(key), std::move(entry));
    if (!is_new) damaged("it has a weight that another one has as well");
    keys_.push_back(made->first.c_str());
  }
}

const DataFiles::Entry* DataFiles::find(std::string_view key) const {
  const auto found = entries_.find(std::string(key));
  return found == entries_.end() ? nullptr : &found->second;
}

Result<const TensorLayout> DataFiles::get_tensor_layout(std::string_view key) const {
  const Entry* entry = find(key);
  if (!entry || !entry->is_tensor) return Error::NotFound;
  return TensorLayout::create(Span<const int32_t>(entry->sizes.data(), entry->sizes.size()),
                              Span<const uint8_t>(entry->order.data(), entry->order.size()),
                              static_cast<ScalarType>(entry->type));
}

Result<FreeableBuffer> DataFiles::get_data(std::string_view key) const {
  const Entry* entry = find(key);
  if (!entry) return Error::NotFound;
  return FreeableBuffer(entry->data, entry->size, let_go);
}

Error DataFiles::load_data_into(std::string_view key, void* buffer, size_t size) const {
  const Entry* entry = find(key);
  if (!entry) return Error::NotFound;
  if (size > entry->size) return Error::InvalidArgument;
  std::memcpy(buffer, entry->data, size);
  return Error::Ok;
}

Result<uint32_t> DataFiles::get_num_keys() const { return static_cast<uint32_t>(keys_.size()); }

Result<const char*> DataFiles::get_key(uint32_t index) const {
  if (index >= keys_.size()) return Error::InvalidArgument;
  return keys_[index];
}

}  // namespace crayon
