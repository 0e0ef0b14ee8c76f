// The flatbuffers in ExecuTorch's files, as far as its own classes do not show or do not check them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "errors.h"

namespace crayon {

// A table. Reading outside the buffer is refused, whatever the offsets in it say.
class Table {
 public:
  Table(const uint8_t* data, size_t size, size_t at, int32_t status)
      : data_(data), size_(size), at_(at), status_(status) {}
  // `status`: of the refusal.
  static Table root(const uint8_t* data, size_t size, int32_t status) {
    return {data, size, Table(data, size, 0, status).u32(0), status};
  }

  size_t field(int id) const {  // 0: absent
    const size_t vtable = at_ - static_cast<int32_t>(u32(at_));
    const size_t entry = 4 + 2 * static_cast<size_t>(id);
    if (entry + 2 > u16(vtable)) return 0;
    const uint16_t offset = u16(vtable + entry);
    return offset ? at_ + offset : 0;
  }
  Table table(int id) const { return {data_, size_, follow(field(id)), status_}; }
  uint32_t number(int id) const { return field(id) ? u32(field(id)) : 0; }
  int64_t long_number(int id) const {
    int64_t value = 0;
    if (field(id)) std::memcpy(&value, in(field(id), sizeof value), sizeof value);
    return value;
  }
  uint16_t short_number(int id) const { return field(id) ? u16(field(id)) : 0; }
  uint8_t byte(int id) const { return field(id) ? *in(field(id), 1) : 0; }
  std::string text(int id) const {
    const size_t at = follow(field(id)), length = u32(at);
    return {reinterpret_cast<const char*>(in(at + 4, length)), length};
  }
  size_t text_offset(int id) const { return follow(field(id)) + 4; }  // from the beginning of the buffer
  size_t count(int id) const { return field(id) ? u32(follow(field(id))) : 0; }
  uint8_t element_byte(int id, size_t i) const { return *in(follow(field(id)) + 4 + i, 1); }
  uint32_t element(int id, size_t i) const { return u32(follow(field(id)) + 4 + 4 * i); }
  Table element_table(int id, size_t i) const {
    const size_t at = follow(field(id)) + 4 + 4 * i;
    return {data_, size_, at + u32(at), status_};
  }

 private:
  const uint8_t* in(size_t at, size_t bytes) const {
    if (at > size_ || bytes > size_ - at) refuse(status_, "the file's tables are damaged");
    return data_ + at;
  }
  uint16_t u16(size_t at) const {
    uint16_t value;
    std::memcpy(&value, in(at, sizeof value), sizeof value);
    return value;
  }
  uint32_t u32(size_t at) const {
    uint32_t value;
    std::memcpy(&value, in(at, sizeof value), sizeof value);
    return value;
  }
  size_t follow(size_t at) const { return at + u32(at); }

  const uint8_t* data_;
  size_t size_, at_;
  int32_t status_;
};

}  // namespace crayon
