// A program's files, what they plan, and methods made ready to run.
#pragma once

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data_files.h"
#include "memory.h"
#include "program_file.h"

namespace crayon {

// A tensor that outlives a step: keys, values, or their scales.
struct StateTensor {
  uint64_t offset;
  int8_t type;
  std::vector<int32_t> sizes;
  bool operator==(const StateTensor&) const = default;
};

// (int64 [1, tokens], int64 [1]) -> float32 [1, vocab_size] of the last token, or with two [1, tap_size] after it.
struct Signature {
  int64_t max_tokens = 0, vocab_size = 0, tap_size = 0;
};

class Program {
 public:
  // `bytes`: of the program, if it is not in the file `path`; they are copied.
  Program(const char* path, const uint8_t* bytes, size_t size, const std::vector<std::string>& data);

  const std::string& path() const { return path_; }
  int64_t context_length() const { return context_length_; }  // 0: the program does not say
  const executorch::runtime::Program& executorch() const { return *program_; }
  const executorch::runtime::NamedDataMap* data() const { return data_.get(); }  // null: there is none

  std::vector<std::string> methods() const;
  bool has(const std::string& method) const;
  int64_t constant(const std::string& method) const;
  Signature signature(const std::string& method) const;
  // `forward`, or another method of this signature.
  std::string language_method() const;
  // The method's memory: one buffer for everything, or the second for what the methods share, its keys and values.
  std::vector<size_t> planned(const std::string& method) const;
  // What lies in the second buffer.
  std::vector<StateTensor> state(const std::string& method) const;

 private:
  std::string path_;
  int64_t context_length_ = 0;
  // In the order in which they need each other.
  std::unique_ptr<ProgramFile> file_;
  std::unique_ptr<executorch::runtime::Program> program_;
  std::unique_ptr<DataFiles> data_;
};

// A method over memory that somebody else may use as well.
class Method {
 public:
  // `state`: memory for what outlives a step.
  Method(std::shared_ptr<const Program> program, std::string name, std::shared_ptr<Memory> state,
         executorch::runtime::EventTracer* tracer);

  const Program& program() const { return *program_; }
  const std::shared_ptr<const Program>& shared_program() const { return program_; }
  const std::string& name() const { return name_; }
  const Signature& signature() const { return signature_; }

  // Copies the outputs: logits, and with a tap its sum and last.
  void run(const int64_t* tokens, int64_t count, int64_t position, std::vector<float> (&outputs)[3]);

 private:
  std::shared_ptr<const Program> program_;
  std::string name_;
  Signature signature_;
  std::vector<std::shared_ptr<Memory>> memory_;
  std::vector<executorch::runtime::Span<uint8_t>> buffers_;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned_;
  executorch::extension::MallocMemoryAllocator structures_;
  std::shared_ptr<KernelMemory> kernel_memory_;
  std::unique_ptr<executorch::runtime::MemoryManager> manager_;
  std::unique_ptr<executorch::runtime::Method> method_;
};

}  // namespace crayon
