#include "crayon_native.h"

#include <executorch/devtools/etdump/etdump_flatcc.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "instruction_set.h"
#include "program.h"
#include "thread_pool.h"

using crayon::guarded;
using crayon::Memory;
using crayon::Method;
using crayon::Program;
using crayon::refuse;

namespace {

int open_programs = 0;

// Methods that a cache keeps ready: with and without the tap, of a base model and an adapter.
constexpr size_t kept_methods = 4;
constexpr int32_t most_threads = 1024;

void require(bool given) {
  if (!given) refuse(CRAYON_NATIVE_BAD_ARGUMENT, "a null pointer, or something that is closed");
}

}  // namespace

struct crayon_native_program {
  std::shared_ptr<const Program> program;
};

struct crayon_native_cache {
  std::shared_ptr<const Program> made_for;  // for what its memory was planned
  std::string planned_by;                   // the method
  std::shared_ptr<Memory> memory;
  std::vector<crayon::StateTensor> state;  // empty: the memory is one method's alone

  std::string trace_path;
  std::unique_ptr<executorch::etdump::ETDumpGen> tracer;  // null: nothing is recorded
  std::list<std::unique_ptr<Method>> methods;             // the one in use first; they end before the tracer
  std::vector<float> outputs[3];
};

namespace {

// Bytes for what outlives a step: the second buffer, or the only one.
size_t state_size(const Program& program, const std::string& method) {
  const auto sizes = program.planned(method);
  return sizes.empty() ? 0 : sizes[sizes.size() > 1 ? 1 : 0];
}

// Whether keys and values that the cache holds are where the method looks for them.
bool fits(const crayon_native_cache& cache, const Program& program, const std::string& method) {
  if (program.planned(method).size() > 1) return !cache.state.empty() && program.state(method) == cache.state;
  return &program == cache.made_for.get() && method == cache.planned_by;
}

using Shared = std::shared_ptr<const Program>;

// A method that fails to load leaves XNNPACK's weights cache in a state in which no method runs any more
// (xnn_status_invalid_state). One that loads ends that.
std::weak_ptr<const Program> loaded_last;
std::string loaded_method;

void repair_weights_cache() {
  const Shared program = loaded_last.lock();
  if (!program) return;
  try {
    Method(program, loaded_method, std::make_shared<Memory>(state_size(*program, loaded_method)), nullptr);
  } catch (...) {  // the error that is being handled is the one to be told
  }
}

std::unique_ptr<Method> load(const crayon_native_cache& cache, const Shared& program, const std::string& method) {
  try {
    auto made = std::make_unique<Method>(program, method, cache.memory, cache.tracer.get());
    loaded_last = program;
    loaded_method = method;
    return made;
  } catch (...) {
    repair_weights_cache();
    throw;
  }
}

// Makes the method the first of the cache's list.
void use(crayon_native_cache& cache, const std::shared_ptr<const Program>& program, const std::string& method) {
  const auto found = std::find_if(cache.methods.begin(), cache.methods.end(),
                                  [&](const auto& m) { return &m->program() == program.get() && m->name() == method; });
  if (found != cache.methods.end()) {
    cache.methods.splice(cache.methods.begin(), cache.methods, found);
    return;
  }
  cache.methods.push_front(load(cache, program, method));
  if (cache.methods.size() > kept_methods) cache.methods.pop_back();
}

// Loads the method in use again, recorded by another tracer or none. The others come back when they are used.
void exchange_tracer(crayon_native_cache& cache, std::unique_ptr<executorch::etdump::ETDumpGen> tracer) {
  std::shared_ptr<const Program> program;
  std::string method;
  if (!cache.methods.empty()) {
    program = cache.methods.front()->shared_program();
    method = cache.methods.front()->name();
  }
  cache.methods.clear();
  cache.tracer = std::move(tracer);
  if (program) use(cache, program, method);
}

void write_file(const std::string& path, const void* data, size_t size) {
  const std::string made = path + ".part";
  std::FILE* file = std::fopen(made.c_str(), "wb");
  const bool written = file && std::fwrite(data, 1, size, file) == size;
  if (!(file && std::fclose(file) == 0 && written && std::rename(made.c_str(), path.c_str()) == 0)) {
    std::remove(made.c_str());
    refuse(CRAYON_NATIVE_NO_FILE, "cannot write %s", path.c_str());
  }
}

}  // namespace

int32_t crayon_native_abi(void) { return CRAYON_NATIVE_ABI; }
const char* crayon_native_instruction_set(void) { return crayon::instruction_set(); }

int32_t crayon_native_threads(void) {
  int32_t count = 0;
  guarded(nullptr, [&] { count = crayon::threads(); });
  return count;
}

int32_t crayon_native_start(int32_t threads, crayon_native_error* error) {
  return guarded(error, [&] {
    if (threads < 0 || threads > most_threads) refuse(CRAYON_NATIVE_BAD_ARGUMENT, "%d threads", threads);
    if (crayon::threads_started()) {
      if (threads == 0 || threads == crayon::threads()) return;
      if (open_programs > 0) {
        refuse(CRAYON_NATIVE_BAD_ARGUMENT, "%d threads: there are %d already, and a program is open", threads,
               crayon::threads());
      }
    }
    if (!crayon::start_threads(threads)) refuse(CRAYON_NATIVE_FAILED, "the pool cannot have %d threads", threads);
  });
}

int32_t crayon_native_open(const crayon_native_options* options, crayon_native_program** program,
                           crayon_native_error* error) {
  return guarded(error, [&] {
    require(options && program && options->size >= sizeof(crayon_native_options) && options->program &&
            (options->data || options->data_count == 0));
    std::vector<std::string> data;
    for (size_t i = 0; i < options->data_count; ++i) {
      require(options->data[i]);
      data.emplace_back(options->data[i]);
    }
    auto made = std::make_unique<crayon_native_program>();
    made->program =
        std::make_shared<const Program>(options->program, options->program_bytes, options->program_size, data);
    *program = made.release();
    ++open_programs;
  });
}

void crayon_native_close(crayon_native_program* program) {
  if (!program) return;
  guarded(nullptr, [&] {
    delete program;
    --open_programs;
  });
}

int32_t crayon_native_methods(crayon_native_program* program, char* names, size_t bytes, crayon_native_error* error) {
  return guarded(error, [&] {
    require(program && names && bytes > 0);
    std::string all;
    for (const std::string& name : program->program->methods()) all += name + "\n";
    std::snprintf(names, bytes, "%s", all.c_str());
  });
}

int32_t crayon_native_constant(crayon_native_program* program, const char* method, int64_t* value,
                               crayon_native_error* error) {
  return guarded(error, [&] {
    require(program && method && value);
    *value = program->program->constant(method);
  });
}

int32_t crayon_native_new_cache(crayon_native_program* program, crayon_native_cache** cache,
                                crayon_native_error* error) {
  return guarded(error, [&] {
    require(program && cache);
    const Program& p = *program->program;
    auto made = std::make_unique<crayon_native_cache>();
    made->made_for = program->program;
    made->planned_by = p.language_method();
    made->memory = std::make_shared<Memory>(state_size(p, made->planned_by));
    if (p.planned(made->planned_by).size() > 1) made->state = p.state(made->planned_by);
    *cache = made.release();
  });
}

void crayon_native_free_cache(crayon_native_cache* cache) {
  if (cache) guarded(nullptr, [&] { delete cache; });
}

int32_t crayon_native_use(crayon_native_cache* cache, crayon_native_program* program, const char* method,
                          crayon_native_error* error) {
  return guarded(error, [&] {
    require(cache && program && method);
    const Program& p = *program->program;
    if (!p.has(method)) refuse(CRAYON_NATIVE_NO_METHOD, "%s has no method %s", p.path().c_str(), method);
    p.signature(method);
    if (!fits(*cache, p, method)) {
      refuse(CRAYON_NATIVE_BAD_PROGRAM,
             "%s: %s does not keep keys and values where the cache has them: it was made for %s", p.path().c_str(),
             method, cache->made_for->path().c_str());
    }
    if (!crayon::threads_started()) crayon::start_threads(0);
    use(*cache, program->program, method);
  });
}

int32_t crayon_native_step(crayon_native_cache* cache, const int64_t* tokens, int64_t count, int64_t position,
                           crayon_native_step_result* result, crayon_native_error* error) {
  return guarded(error, [&] {
    require(cache && tokens && result);
    if (cache->methods.empty()) refuse(CRAYON_NATIVE_BAD_ARGUMENT, "no method was chosen for the cache");
    Method& method = *cache->methods.front();
    const auto& [most, vocab_size, tap_size] = method.signature();
    const auto n = static_cast<long long>(count), at = static_cast<long long>(position);
    if (count <= 0 || position < 0) refuse(CRAYON_NATIVE_BAD_ARGUMENT, "%lld tokens at position %lld", n, at);
    if (count > most) {
      refuse(CRAYON_NATIVE_BAD_ARGUMENT, "%lld tokens: the program takes %lld at once", n,
             static_cast<long long>(most));
    }
    const int64_t context = method.program().context_length();
    if (context > 0 && count > context - position) {
      refuse(CRAYON_NATIVE_CACHE_FULL, "%lld tokens at position %lld in a cache of %lld", n, at,
             static_cast<long long>(context));
    }
    const int64_t vocab = vocab_size;
    const int64_t* outside = std::find_if(tokens, tokens + count, [&](int64_t t) { return t < 0 || t >= vocab; });
    if (outside != tokens + count) {
      refuse(CRAYON_NATIVE_BAD_ARGUMENT, "token %lld in a vocabulary of %lld", static_cast<long long>(*outside),
             static_cast<long long>(vocab));
    }
    const crayon::OnFastCores here;
    method.run(tokens, count, position, cache->outputs);
    const bool tap = tap_size > 0;
    *result = {cache->outputs[0].data(), vocab_size, tap ? cache->outputs[1].data() : nullptr,
               tap ? cache->outputs[2].data() : nullptr, tap_size};
  });
}

int32_t crayon_native_trace(crayon_native_cache* cache, const char* path, crayon_native_error* error) {
  return guarded(error, [&] {
    require(cache);
    if (path) {
      exchange_tracer(*cache, std::make_unique<executorch::etdump::ETDumpGen>());
      cache->trace_path = path;
    } else if (cache->tracer) {
      const auto dump = cache->tracer->get_etdump_data();
      const std::unique_ptr<void, void (*)(void*)> owner(dump.buf, std::free);
      const std::string to = cache->trace_path;
      exchange_tracer(*cache, nullptr);
      if (!dump.buf || dump.size == 0) refuse(CRAYON_NATIVE_FAILED, "nothing was recorded");
      write_file(to, dump.buf, dump.size);
    }
  });
}
