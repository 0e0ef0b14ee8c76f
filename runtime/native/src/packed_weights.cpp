#include "packed_weights.h"

#include <executorch/runtime/backend/options.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <system_error>
#include <tuple>
#include <vector>

#include "errors.h"
#include "thread_pool.h"

namespace crayon {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  int fd_;
};

// XNNPACK's file (XNNWeightsCache.cpp, executorch 1.5.1): packed weights, each on pages of its own; an index of them
// (length of the name: u32, name, offset: u64, size: u64, seed: u32); a footer. Bytes between index and footer are not
// read: our seal is there, the sum of everything before it.
struct Footer {
  uint64_t index;
  uint32_t entries, magic, version;
};
constexpr size_t footer_size = 20, seal_size = 16;
constexpr uint32_t footer_magic = 0x58505743, footer_version = 2;
constexpr char seal_mark[8] = {'c', 'r', 'a', 'y', 'o', 'n', '0', '1'};

template <typename T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Finds accidents, not attacks. This is xxHash's way (XXH3, XXH_accumulate): one multiplication of 32 bits for 8 bytes.
uint64_t sum_part(const uint8_t* data, size_t size) {
  constexpr int lanes = 8;
  constexpr uint64_t prime = 0x9E3779B97F4A7C15;
  uint64_t acc[lanes], key[lanes];
  for (int i = 0; i < lanes; ++i) {
    acc[i] = prime * (i + 1);
    key[i] = prime * (i + 11) ^ 0x165667919E3779F9;
  }
  size_t at = 0;
  for (int stripe = 0; at + 8 * lanes <= size; at += 8 * lanes) {
    for (int i = 0; i < lanes; ++i) {
      const uint64_t value = read<uint64_t>(data + at + 8 * i), keyed = value ^ key[i];
      acc[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32) + (value << 32 | value >> 32);
    }
    if (++stripe % 16 == 0) {
      for (int i = 0; i < lanes; ++i) acc[i] = (acc[i] ^ acc[i] >> 47 ^ key[i]) * 0x9E3779B1;
    }
  }
  uint64_t all = size;
  for (; at < size; ++at) all = (all ^ data[at]) * prime;
  for (const uint64_t lane : acc) all = ((all ^ lane) * prime) ^ (all >> 31);
  return all;
}

// The file is as large as the weights: all threads read it.
uint64_t sum(const uint8_t* data, size_t size) {
  constexpr size_t part = size_t{4} << 20;
  std::vector<uint64_t> sums((size + part - 1) / part);
  const auto task = [&](int64_t i) {
    const size_t at = static_cast<size_t>(i) * part;
    sums[static_cast<size_t>(i)] = sum_part(data + at, std::min(part, size - at));
  };
  const ParallelFor pool = thread_pool();
  pool.run(
      pool.pool, static_cast<int64_t>(sums.size()), [](void* t, int64_t i) { (*static_cast<decltype(task)*>(t))(i); },
      const_cast<void*>(static_cast<const void*>(&task)));
  return sum_part(reinterpret_cast<const uint8_t*>(sums.data()), sums.size() * sizeof(uint64_t));
}

class Mapped {
 public:
  explicit Mapped(int fd) {
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0 || info.st_size <= 0) return;
    void* made = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
    if (made == MAP_FAILED) return;
    data = static_cast<const uint8_t*>(made);
    size = static_cast<size_t>(info.st_size);
  }
  ~Mapped() {
    if (data) munmap(const_cast<uint8_t*>(data), size);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  const uint8_t* data = nullptr;
  size_t size = 0;
};

std::optional<Footer> footer(const Mapped& file) {
  if (!file.data || file.size < footer_size) return std::nullopt;
  const uint8_t* at = file.data + file.size - footer_size;
  const Footer f{read<uint64_t>(at), read<uint32_t>(at + 8), read<uint32_t>(at + 12), read<uint32_t>(at + 16)};
  if (f.magic != footer_magic || f.version != footer_version || f.entries == 0 || f.index > file.size - footer_size) {
    return std::nullopt;
  }
  return f;
}

// Where the index ends; 0 if its entries do not fit the file.
size_t index_end(const Mapped& file, const Footer& f) {
  const size_t end = file.size - footer_size;
  size_t at = f.index;
  for (uint32_t i = 0; i < f.entries; ++i) {
    if (end - at < 24) return 0;
    const auto name = read<uint32_t>(file.data + at);
    if (name > end - at - 24) return 0;
    at += 4 + name;
    const auto offset = read<uint64_t>(file.data + at), size = read<uint64_t>(file.data + at + 8);
    if (offset > f.index || size > f.index - offset) return 0;
    at += 20;
  }
  return at;
}

bool sealed(const std::string& path) {
  const Descriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  // A file is read through once in a process; nobody changes it.
  static std::set<std::tuple<dev_t, ino_t, off_t, time_t, long>> seen;
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0) return false;
  const std::tuple id(info.st_dev, info.st_ino, info.st_size, info.st_mtim.tv_sec, info.st_mtim.tv_nsec);
  if (seen.count(id)) return true;
  const Mapped file(fd);
  const auto f = footer(file);
  const size_t end = f ? index_end(file, *f) : 0;
  if (end == 0 || file.size - footer_size - end != seal_size) return false;
  const bool whole = std::memcmp(file.data + end, seal_mark, sizeof seal_mark) == 0 &&
                     read<uint64_t>(file.data + end + sizeof seal_mark) == sum(file.data, end);
  if (whole) seen.insert(id);
  return whole;
}

// Ends a file that XNNPACK has written with our seal, and gives it its name.
bool publish(const std::string& made, const std::string& path, int folder) {
  const Descriptor fd(open(made.c_str(), O_RDWR | O_CLOEXEC));
  size_t end = 0;
  uint8_t tail[seal_size + footer_size];
  {
    const Mapped file(fd);
    const auto f = footer(file);
    end = f ? index_end(file, *f) : 0;
    if (end == 0) return false;
    const uint64_t total = sum(file.data, end);
    std::memcpy(tail, seal_mark, sizeof seal_mark);
    std::memcpy(tail + sizeof seal_mark, &total, sizeof total);
    std::memcpy(tail + seal_size, file.data + file.size - footer_size, footer_size);
  }
  return pwrite(fd, tail, sizeof tail, static_cast<off_t>(end)) == static_cast<ssize_t>(sizeof tail) &&
         ftruncate(fd, static_cast<off_t>(end + sizeof tail)) == 0 && fsync(fd) == 0 && fchmod(fd, 0444) == 0 &&
         rename(made.c_str(), path.c_str()) == 0 && fsync(folder) == 0;
}

// XNNPACK keeps the file open to add to it, and locked. Its descriptor is exchanged for one that can only read: other
// processes get in, and weights that are not in the file are packed in memory.
void take_write_access(const std::string& path) {
  const Descriptor own(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat wanted, found;
  if (own < 0 || fstat(own, &wanted) != 0) return;
  std::error_code unreadable;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", unreadable)) {
    const int fd = std::atoi(entry.path().filename().c_str());
    if (fd == own || fstat(fd, &found) != 0) continue;
    if (found.st_ino == wanted.st_ino && found.st_dev == wanted.st_dev && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR) {
      dup2(own, fd);
    }
  }
}

}  // namespace

void with_packed_weights(const std::string& path, size_t size, const Load& pack, const Load& load) {
  const std::string made = path + ".part";  // one that a dead process left is made anew
  // XNNPACK takes no longer ones.
  if (made.size() >= executorch::runtime::kMaxOptionValueLength) return load("");
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const Descriptor lock(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (lock < 0 || flock(lock, LOCK_EX) != 0) return load("");
  if (!sealed(path)) {
    unlink(made.c_str());
    // XNNPACK writes through a mapping: a full disk would end the process.
    struct statvfs disk;
    if (fstatvfs(lock, &disk) != 0 || disk.f_bavail * disk.f_frsize < size + size / 4 + (size_t{16} << 20)) {
      return load("");
    }
    pack(made);
    if (!publish(made, path, lock)) {
      unlink(made.c_str());
      return load("");
    }
  }
  load(path);
  take_write_access(path);
}

}  // namespace crayon
