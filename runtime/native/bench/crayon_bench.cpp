// How fast a program runs on this device, as JSON with llama-bench's field names; needs nothing but the library.
//
// Every measurement is repeated, and all of them take turns, so that a machine that slows down does so for all of them.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "crayon_native.h"

namespace {

namespace fs = std::filesystem;

constexpr const char* usage = R"(crayon-bench [OPTIONS] BUNDLE
crayon-bench [OPTIONS] --program FILE.pte --data FILE.ptd

  Measures prefill and decode, and prints JSON. BUNDLE is a folder with model.pte and model.ptd.

  --program FILE      the program, if not BUNDLE's
  --data FILE         its weights; repeatable
  --adapter FOLDER    measure with this adapter too: a folder with adapter.pte and adapter.ptd
  --threads N         default: as many as there are fast cores
  --prompt N,N,...    tokens of a prefill, from position 0 (default 128; 0: none)
  --decode N          tokens of a decode (default 64; 0: none)
  --position N,N,...  where decodes begin (default 16,2000)
  --repeat N          (default 5)
  --cold              have the system forget the files before they are loaded
)";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  fs::path program;
  std::vector<fs::path> data;
  fs::path adapter;
  int32_t threads = 0;
  std::vector<int64_t> prompts = {128};
  int64_t decode = 64;
  std::vector<int64_t> positions = {16, 2000};
  int64_t repeat = 5;
  bool cold = false;
};

int64_t number(std::string_view text, int64_t least) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > 1 << 20) {
    throw UsageError("not a number of " + std::to_string(least) + " or more: " + std::string(text));
  }
  return value;
}

std::vector<int64_t> numbers(std::string_view text) {
  std::vector<int64_t> all;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    all.push_back(number(text.substr(at, comma - at), 0));
    at = comma + 1;
  }
  return all;
}

Options parse(const std::vector<std::string_view>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string_view name = arguments[i];
    if (!name.starts_with("-")) {
      const fs::path bundle(name);
      options.program = bundle / "model.pte";
      if (fs::exists(bundle / "model.ptd")) options.data.push_back(bundle / "model.ptd");
      continue;
    }
    if (name == "--cold") {
      options.cold = true;
      continue;
    }
    if (i + 1 == arguments.size()) throw UsageError("nothing follows " + std::string(name));
    const std::string_view value = arguments[++i];
    if (name == "--program") {
      options.program = value;
    } else if (name == "--data") {
      options.data.emplace_back(value);
    } else if (name == "--adapter") {
      options.adapter = value;
    } else if (name == "--threads") {
      options.threads = static_cast<int32_t>(number(value, 1));
    } else if (name == "--prompt") {
      options.prompts = numbers(value);
    } else if (name == "--decode") {
      options.decode = number(value, 0);
    } else if (name == "--position") {
      options.positions = numbers(value);
    } else if (name == "--repeat") {
      options.repeat = number(value, 1);
    } else {
      throw UsageError("no such option: " + std::string(name));
    }
  }
  if (options.program.empty()) throw UsageError("name a bundle or a program");
  return options;
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void check(int32_t status, const crayon_native_error& error) {
  if (status != CRAYON_NATIVE_OK) throw std::runtime_error(error.message);
}

struct Close {
  void operator()(crayon_native_program* program) const { crayon_native_close(program); }
  void operator()(crayon_native_cache* cache) const { crayon_native_free_cache(cache); }
};
using Program = std::unique_ptr<crayon_native_program, Close>;
using Cache = std::unique_ptr<crayon_native_cache, Close>;

Program open(const fs::path& program, const std::vector<fs::path>& data) {
  std::vector<const char*> paths;
  for (const fs::path& path : data) paths.push_back(path.c_str());
  crayon_native_options options{};
  options.size = sizeof(options);
  options.program = program.c_str();
  options.data = paths.data();
  options.data_count = paths.size();
  crayon_native_program* opened = nullptr;
  crayon_native_error error{};
  check(crayon_native_open(&options, &opened, &error), error);
  return Program(opened);
}

int64_t constant(const Program& program, const char* method) {
  int64_t value = 0;
  crayon_native_error error{};
  check(crayon_native_constant(program.get(), method, &value, &error), error);
  return value;
}

// One sequence, and what to compute on it.
class Model {
 public:
  Model(const Program& program, const char* method)
      : context(constant(program, "get_max_context_len")), chunk_(constant(program, "get_max_seq_len")) {
    crayon_native_cache* cache = nullptr;
    crayon_native_error error{};
    check(crayon_native_new_cache(program.get(), &cache, &error), error);
    cache_.reset(cache);
    use(program, method);
  }

  void first_token() { step(1, 0); }

  void use(const Program& program, const char* method) {
    crayon_native_error error{};
    check(crayon_native_use(cache_.get(), program.get(), method, &error), error);
  }

  void prefill(int64_t tokens, int64_t position) {
    for (const int64_t end = position + tokens; position < end;) {
      const int64_t count = std::min(chunk_, end - position);
      step(count, position);
      position += count;
    }
  }

  // The time of each token is added to `times`, in nanoseconds.
  void decode(int64_t tokens, int64_t position, std::vector<double>& times) {
    int64_t before = now();
    for (int64_t i = 0; i < tokens; ++i) {
      step(1, position + i);
      const int64_t after = now();
      times.push_back(static_cast<double>(after - before));
      before = after;
    }
  }

  // Computes what lies before `position`: untouched memory of a cache reads as zeros faster than memory in use.
  void fill(int64_t position) {
    prefill(std::max<int64_t>(position - filled_, 0), filled_);
    filled_ = std::max(filled_, position);
  }

  const int64_t context;

 private:
  void step(int64_t count, int64_t position) {
    tokens_.resize(count);
    for (int64_t i = 0; i < count; ++i) tokens_[i] = (position + i) * 7919 % vocab_size_;
    crayon_native_step_result result{};
    crayon_native_error error{};
    check(crayon_native_step(cache_.get(), tokens_.data(), count, position, &result, &error), error);
    vocab_size_ = result.vocab_size;
  }

  Cache cache_;
  std::vector<int64_t> tokens_;
  int64_t vocab_size_ = 1;
  int64_t filled_ = 0;
  int64_t chunk_;
};

struct Measurement {
  int64_t prompt = 0;
  int64_t decode = 0;
  int64_t position = 0;
  bool adapted = false;
  // Nanoseconds: of all, of each token of each decode, of those before anything counts.
  std::vector<double> samples = {};
  std::vector<std::vector<double>> tokens = {};
  std::vector<double> warmup = {};
};

std::vector<Measurement> plan(const Options& options, int64_t context) {
  std::vector<Measurement> all;
  const auto add = [&](Measurement measurement) {
    if (measurement.prompt + measurement.decode == 0) return;
    if (measurement.position + measurement.prompt + measurement.decode > context) {
      std::fprintf(stderr, "crayon-bench: left out, the context ends at %lld: %lld tokens at %lld\n",
                   static_cast<long long>(context), static_cast<long long>(measurement.prompt + measurement.decode),
                   static_cast<long long>(measurement.position));
      return;
    }
    all.push_back(measurement);
    if (options.adapter.empty()) return;
    measurement.adapted = true;
    all.push_back(measurement);
  };
  for (const int64_t prompt : options.prompts) add({.prompt = prompt});
  for (const int64_t position : options.positions) add({.decode = options.decode, .position = position});
  return all;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double deviation(const std::vector<double>& values) {
  if (values.size() < 2) return 0.0;
  double squares = 0.0;
  for (const double value : values) squares += std::pow(value - mean(values), 2);
  return std::sqrt(squares / static_cast<double>(values.size() - 1));
}

std::string json_string(std::string_view text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') json += '\\';
    if (static_cast<unsigned char>(c) >= ' ') json += c;
  }
  return json + '"';
}

std::string list(const std::vector<std::string>& values) {
  std::string json = "[";
  for (const std::string& value : values) json += (json.size() > 1 ? ", " : "") + value;
  return json + "]";
}

std::string list(const std::vector<double>& values, const char* format) {
  std::vector<std::string> texts;
  for (const double value : values) {
    char text[40];
    std::snprintf(text, sizeof(text), format, value);
    texts.emplace_back(text);
  }
  return list(texts);
}

std::string list(const std::vector<std::vector<double>>& rows, const char* format) {
  std::vector<std::string> texts;
  for (const std::vector<double>& row : rows) texts.push_back(list(row, format));
  return list(texts);
}

// A field of /proc/self/smaps_rollup in bytes, as JSON; null where the kernel does not say.
std::string memory(std::string_view field) {
  std::ifstream rollup("/proc/self/smaps_rollup");
  for (std::string name; rollup >> name;) {
    if (name == field) {
      long long kilobytes = 0;
      rollup >> kilobytes;
      return std::to_string(kilobytes * 1024);
    }
  }
  return "null";
}

// Have the system forget what it has of files; how many bytes it keeps all the same, as of a file system in memory.
int64_t drop_page_cache(const std::vector<fs::path>& files) {
  int64_t kept = 0;
  const int64_t page = sysconf(_SC_PAGESIZE);
  for (const fs::path& path : files) {
    const size_t size = fs::file_size(path);
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0 || size == 0) throw std::runtime_error("cannot be read: " + path.string());
    fsync(file);  // pages that are still to be written are not dropped
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    void* mapped = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    std::vector<unsigned char> resident((static_cast<int64_t>(size) + page - 1) / page);
    if (mapped == MAP_FAILED || mincore(mapped, size, resident.data()) != 0) {
      throw std::runtime_error("the page cache does not say what it has of " + path.string());
    }
    munmap(mapped, size);
    kept += page * std::count_if(resident.begin(), resident.end(), [](unsigned char flags) { return flags & 1; });
  }
  return kept;
}

// The processor's name; of a board, whose kernel does not name it, the board's.
std::string processor() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.starts_with("model name")) return line.substr(std::min(line.find(": ") + 2, line.size()));
  }
  std::ifstream board("/proc/device-tree/model");
  std::string name;
  std::getline(board, name, '\0');
  return name;
}

struct Loaded {
  int64_t model_ns;
  int64_t adapter_ns;
  int64_t first_token_ns;
  std::string cached_bytes = "null";  // before it was loaded, where that was asked for
};

void print(const Options& options, const Loaded& loaded, const std::vector<Measurement>& measurements) {
  uintmax_t size = fs::file_size(options.program);
  for (const fs::path& data : options.data) size += fs::file_size(data);
  const std::time_t time = std::time(nullptr);
  char when[32];
  std::strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&time));
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const std::string rss = memory("Rss:"), pss = memory("Pss:");
  const char* separator = "[\n";
  for (const Measurement& m : measurements) {
    const double tokens = static_cast<double>(m.prompt + m.decode);
    std::vector<double> speeds;
    for (const double sample : m.samples) speeds.push_back(tokens * 1e9 / sample);
    std::printf(
        "%s  {\"cpu_info\": %s, \"backends\": \"crayon_native\", \"instruction_set\": %s, \"model_filename\": %s, "
        "\"model_size\": %llu, \"adapter\": %s, \"n_threads\": %d, \"n_prompt\": %lld, \"n_gen\": %lld, "
        "\"n_depth\": %lld, \"test_time\": \"%s\", \"load_ns\": %lld, \"cached_bytes\": %s, "
        "\"first_token_ns\": %lld, \"rss_bytes\": %s, \"pss_bytes\": %s, \"max_rss_kb\": %ld, "
        "\"avg_ns\": %.0f, \"stddev_ns\": %.0f, \"avg_ts\": %.3f, \"stddev_ts\": %.3f, "
        "\"warmup_ns\": %s, \"samples_ns\": %s, \"samples_ts\": %s, \"token_ns\": %s}",
        separator, json_string(processor()).c_str(), json_string(crayon_native_instruction_set()).c_str(),
        json_string(options.program.string()).c_str(), static_cast<unsigned long long>(size),
        m.adapted ? json_string(options.adapter.string()).c_str() : "null", crayon_native_threads(),
        static_cast<long long>(m.prompt), static_cast<long long>(m.decode), static_cast<long long>(m.position), when,
        static_cast<long long>(m.adapted ? loaded.adapter_ns : loaded.model_ns), loaded.cached_bytes.c_str(),
        static_cast<long long>(loaded.first_token_ns), rss.c_str(), pss.c_str(), used.ru_maxrss, mean(m.samples),
        deviation(m.samples), mean(speeds), deviation(speeds), list(m.warmup, "%.0f").c_str(),
        list(m.samples, "%.0f").c_str(), list(speeds, "%.3f").c_str(), list(m.tokens, "%.0f").c_str());
    separator = ",\n";
  }
  std::printf("%s]\n", measurements.empty() ? "[" : "\n");
}

void run(const Options& options) {
  crayon_native_error error{};
  check(crayon_native_start(options.threads, &error), error);
  Loaded loaded{};
  if (options.cold) {
    std::vector<fs::path> files = options.data;
    files.push_back(options.program);
    loaded.cached_bytes = std::to_string(drop_page_cache(files));
  }
  int64_t began = now();
  const Program base = open(options.program, options.data);
  Model model(base, "forward");
  loaded.model_ns = now() - began;
  began = now();
  model.first_token();
  loaded.first_token_ns = now() - began;

  Program adapter;
  if (!options.adapter.empty()) {
    std::vector<fs::path> data = options.data;
    data.push_back(options.adapter / "adapter.ptd");
    began = now();
    adapter = open(options.adapter / "adapter.pte", data);
    model.use(adapter, "lora_forward");
    model.first_token();
    loaded.adapter_ns = now() - began;
  }

  std::vector<Measurement> measurements = plan(options, model.context);
  for (const Measurement& m : measurements) model.fill(m.position + m.prompt + m.decode);
  for (int64_t round = -1; round < options.repeat; ++round) {  // the first one warms up
    for (Measurement& m : measurements) {
      m.adapted ? model.use(adapter, "lora_forward") : model.use(base, "forward");
      std::vector<double> times;
      times.reserve(m.decode);
      began = now();
      model.prefill(m.prompt, m.position);
      model.decode(m.decode, m.position, times);
      (round < 0 ? m.warmup : m.samples).push_back(static_cast<double>(now() - began));
      if (round >= 0 && m.decode > 0) m.tokens.push_back(times);
    }
  }
  print(options, loaded, measurements);
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string_view> arguments(values + 1, values + count);
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    std::fputs(usage, stdout);
    return 0;
  }
  try {
    run(parse(arguments));
    return std::fflush(stdout) == 0 ? 0 : 1;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "crayon-bench: %s\n\n%s", error.what(), usage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "crayon-bench: %s\n", error.what());
    return 1;
  }
}
