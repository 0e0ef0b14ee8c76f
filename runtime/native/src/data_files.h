// Weights in .ptd files.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace crayon {

// The files of a program, mapped, as one map of names. ExecuTorch's own trusts what is in a file; here names, places
// and shapes are checked when it is opened. The numbers are not.
class DataFiles final : public executorch::runtime::NamedDataMap {
 public:
  explicit DataFiles(const std::vector<std::string>& paths);  // throws Refusal (NO_FILE, BAD_DATA)
  ~DataFiles() override;
  DataFiles(const DataFiles&) = delete;
  DataFiles& operator=(const DataFiles&) = delete;

  executorch::runtime::Result<const executorch::runtime::TensorLayout> get_tensor_layout(
      std::string_view key) const override;
  executorch::runtime::Result<executorch::runtime::FreeableBuffer> get_data(std::string_view key) const override;
  executorch::runtime::Error load_data_into(std::string_view key, void* buffer, size_t size) const override;
  executorch::runtime::Result<uint32_t> get_num_keys() const override;
  executorch::runtime::Result<const char*> get_key(uint32_t index) const override;

 private:
  struct Entry {
    const uint8_t* data;
    size_t size;
    bool is_tensor;
    int8_t type;
    std::vector<int32_t> sizes;
    std::vector<uint8_t> order;
  };
  struct File {
    uint8_t* data;
    size_t size, reserved;
  };
  void map(const std::string& path);
  void read(const std::string& path, const File& file);
  const Entry* find(std::string_view key) const;

  std::vector<File> files_;
  std::unordered_map<std::string, Entry> entries_;
  std::vector<const char*> keys_;
};

}  // namespace crayon
