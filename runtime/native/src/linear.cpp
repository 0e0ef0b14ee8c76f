#include "linear.h"

#include <algorithm>
#include <cstring>

#include "instruction_set.h"

namespace crayon {
namespace {

// In the order of InstructionSet.
constexpr const LinearKernels* all_kernels[] = {
#if defined(__x86_64__)
    &linear_avx512_vnni, &linear_avx512, &linear_avx2_vnni, &linear_avx2,
#elif defined(__aarch64__)
    &linear_dotprod,
#endif
    &linear_baseline,
};
static_assert(sizeof all_kernels / sizeof *all_kernels == instruction_sets);

const LinearKernels& chosen_kernels() { return *all_kernels[static_cast<int>(chosen_instruction_set())]; }

// Waking the other threads takes as long as reading about so many bytes.
constexpr size_t alone_bytes = size_t{96} << 10;
// More tasks than threads, so that a thread which another process holds up delays the others by little.
constexpr int64_t tasks_per_thread = 16;

constexpr int64_t most_lanes = 16;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Hands out pieces of a block, each aligned for vectors; counts first, then gives.
class Pieces {
 public:
  explicit Pieces(uint8_t* block) : at_(block) {}
  template <typename T>
  T* take(int64_t count) {
    uint8_t* piece = at_ + used_;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return at_ ? reinterpret_cast<T*>(piece) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* at_;
  size_t used_ = 0;
};

// An input and its rounded forms.
struct Input {
  const float* x;
  int64_t width;
  int64_t group_size = 0;  // 0: no int4 weights want it

  float *scales = nullptr, *inverse_scales = nullptr;
  int32_t *zero_points = nullptr, *plain_sums = nullptr, *lane_sums = nullptr, *group_sums = nullptr;
  int8_t *bytes = nullptr, *pairs = nullptr, *tiles = nullptr;
  QuantizedTokens tokens{};

  void place(Pieces& pieces, const LinearKernels& kernels, int64_t count) {
    const int64_t plain_stride = round_up(width, 64), pairs_size = round_up(width, 8 * kernels.lanes);
    scales = pieces.take<float>(count);
    inverse_scales = pieces.take<float>(count);
    zero_points = pieces.take<int32_t>(count);
    plain_sums = pieces.take<int32_t>(count);
    bytes = pieces.take<int8_t>(count * plain_stride);
    tokens.tokens = count;
    tokens.width = width;
    tokens.scales = scales;
    tokens.zero_points = zero_points;
    tokens.plain = bytes;
    tokens.plain_stride = plain_stride;
    tokens.plain_sums = plain_sums;
    if (group_size == 0) return;
    pairs = pieces.take<int8_t>(count * pairs_size);
    lane_sums = pieces.take<int32_t>(count * pairs_size / 8);
    tokens.pairs = pairs;
    tokens.pairs_size = pairs_size;
    tokens.lane_sums = lane_sums;
    if (count == 1) return;
    const int64_t tiled = round_up(count, kernels.tile_tokens);
    tiles = pieces.take<int8_t>(tiled * width);
    group_sums = pieces.take<int32_t>(tiled * (width / group_size));
    tokens.tiles = tiles;
    tokens.group_sums = group_sums;
  }

  void quantize(const LinearKernels& kernels, int64_t t) {
    const float* from = x + t * width;
    int8_t* to = bytes + t * tokens.plain_stride;
    kernels.measure(from, width, scales + t, inverse_scales + t, zero_points + t);
    kernels.to_plain(from, width, inverse_scales[t], zero_points[t], to, tokens.plain_stride, plain_sums + t);
    if (group_size == 0) return;
    int8_t* paired = pairs + t * tokens.pairs_size;
    int32_t* sums = lane_sums + t * tokens.pairs_size / 8;
    kernels.to_pairs(to, width, paired, tokens.pairs_size, sums);
    if (tokens.tokens == 1) return;
    const int64_t groups = width / group_size, each = group_size / 8;
    const int64_t tile = t / kernels.tile_tokens * kernels.tile_tokens, place = t % kernels.tile_tokens;
    kernels.to_tile(paired, width, tiles + tile * width + 4 * place);
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int64_t i = 0; i < each; ++i) sum += sums[g * each + i];
      group_sums[tile * groups + g * kernels.tile_tokens + place] = sum;
    }
  }
};

}  // namespace

void* Workspace::reserve(size_t bytes) {
  if (bytes + 64 > size_) {
    block_.reset();
    block_.reset(new uint8_t[bytes + 64]);
    size_ = bytes + 64;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block_.get()) + 63) / 64 * 64);
}

bool LinearWeights::takes_int4(int64_t rows, int64_t width, int64_t group_size) {
  const bool power_of_two = group_size > 0 && (group_size & (group_size - 1)) == 0;
  return rows > 0 && power_of_two && group_size >= 32 && width > 0 && width % group_size == 0;
}

bool LinearWeights::takes_int8(int64_t rows, int64_t width) {
  constexpr int64_t most_rank = 256;
  return rows > 0 && width > 0 && std::min(rows, width) <= most_rank;
}

std::unique_ptr<LinearWeights> LinearWeights::int4(const uint8_t* codes, const uint16_t* scales, int64_t rows,
                                                   int64_t width, int64_t group_size,
                                                   std::shared_ptr<RowOffsets> offsets) {
  auto made = std::make_unique<LinearWeights>();
  made->rows = rows;
  made->width = width;
  made->group_size = group_size;
  // Kernels read whole vectors, beyond the end of a row: of the last one, a copy with room behind it.
  const int64_t bytes = width / 2, groups = width / group_size;
  made->last_codes_.assign(static_cast<size_t>(bytes + 4 * most_lanes), 0);
  made->last_scales_.assign(static_cast<size_t>(groups + most_lanes), 0);
  std::memcpy(made->last_codes_.data(), codes + (rows - 1) * bytes, static_cast<size_t>(bytes));
  std::memcpy(made->last_scales_.data(), scales + (rows - 1) * groups, static_cast<size_t>(2 * groups));
  offsets->values.resize(static_cast<size_t>(rows));
  made->offsets_ = std::move(offsets);
  made->int4_ = {
      codes, scales,    made->last_codes_.data(), made->last_scales_.data(), made->offsets_->values.data(), rows,
      width, group_size};
  return made;
}

std::unique_ptr<LinearWeights> LinearWeights::int8(const int8_t* codes, const float* scales, int64_t rows,
                                                   int64_t width) {
  const LinearKernels& kernels = chosen_kernels();
  auto made = std::make_unique<LinearWeights>();
  made->rows = rows;
  made->width = width;
  const auto padded = static_cast<size_t>(round_up(rows, kernels.lanes));
  made->codes_.resize(padded * static_cast<size_t>(round_up(width, 4)));
  made->sums_.resize(padded);
  made->scales_.assign(scales, scales + rows);
  made->scales_.resize(padded);
  kernels.interleave_int8(codes, rows, width, made->codes_.data(), made->sums_.data());
  made->int8_ = {made->codes_.data(), made->scales_.data(), made->sums_.data(), rows, width};
  return made;
}

// Rows of the products of one call, in pieces that threads take.
struct LinearJob {
  const LinearKernels& kernels;
  const LinearCall* calls;
  size_t count;
  const std::vector<const Input*>& inputs;  // of the calls
  const std::vector<const Input*>& ones;    // of the calls; null where offsets are known
  int64_t tokens, rows_per_task;
  size_t panel_bytes;

  int64_t tasks_of(const LinearCall& call) const { return (call.weights->rows + rows_per_task - 1) / rows_per_task; }

  void run(int64_t index) const {
    size_t c = 0;
    for (; index >= tasks_of(calls[c]); ++c) index -= tasks_of(calls[c]);
    const LinearWeights& w = *calls[c].weights;
    const int64_t first = index * rows_per_task, last = std::min(w.rows, first + rows_per_task);
    const QuantizedTokens& x = inputs[c]->tokens;
    if (w.group_size == 0) return kernels.int8_tokens(w.int8_, x, first, last, calls[c].out);
    if (ones[c]) kernels.int4_offsets(w.int4_, ones[c]->tokens, first, last);
    if (tokens == 1) return kernels.int4_token(w.int4_, x, first, last, calls[c].out);
    static thread_local Workspace panel;
    kernels.int4_tokens(w.int4_, x, first, last, calls[c].out, panel.reserve(panel_bytes));
  }
};

namespace {

template <typename Task>
void run_tasks(const ParallelFor& parallel, int64_t tasks, const Task& task) {
  if (parallel.run && parallel.threads > 1 && tasks > 1) {
    parallel.run(
        parallel.pool, tasks, [](void* state, int64_t i) { (*static_cast<const Task*>(state))(i); },
        const_cast<void*>(static_cast<const void*>(&task)));
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
}

}  // namespace

void run_linears(const LinearCall* calls, size_t count, int64_t tokens, const ParallelFor& parallel) {
  const LinearKernels& kernels = chosen_kernels();
  static Workspace workspace;

  // What is to be rounded: each input once for every size of groups.
  std::vector<Input> distinct;
  distinct.reserve(2 * count);
  std::vector<size_t> which(count), which_ones(count);
  constexpr size_t none = ~size_t{0};
  size_t bytes = 0, panel_bytes = 0;
  const auto find = [&](const float* x, int64_t width, int64_t group_size) {
    const auto same = [&](const Input& i) {
      return i.x == x && i.width == width && (i.group_size == group_size || group_size == 0 || i.group_size == 0);
    };
    auto found = std::find_if(distinct.begin(), distinct.end(), same);
    if (found == distinct.end()) found = distinct.insert(distinct.end(), Input{.x = x, .width = width});
    if (group_size) found->group_size = group_size;
    return static_cast<size_t>(found - distinct.begin());
  };
  for (size_t c = 0; c < count; ++c) {
    const LinearWeights& w = *calls[c].weights;
    bytes += w.bytes();
    which[c] = find(calls[c].in, w.width, w.group_size);
    which_ones[c] = w.group_size && !w.offsets_->known ? find(nullptr, w.width, w.group_size) : none;
    if (w.group_size) panel_bytes = std::max(panel_bytes, kernels.int4_workspace(w.width, w.group_size));
  }
  const auto place = [&](uint8_t* block) {
    Pieces pieces(block);
    for (Input& input : distinct) input.place(pieces, kernels, input.x ? tokens : 1);
    return pieces.used();
  };
  place(static_cast<uint8_t*>(workspace.reserve(place(nullptr))));
  for (Input& input : distinct) {
    if (input.x) continue;
    // Tokens of ones: products with them are the sums of rows.
    for (int64_t i = 0; i < input.tokens.plain_stride; ++i) input.bytes[i] = i < input.width;
    kernels.to_pairs(input.bytes, input.width, input.pairs, input.tokens.pairs_size, input.lane_sums);
  }
  std::vector<Input*> rounded;
  for (Input& input : distinct) {
    if (input.x) rounded.push_back(&input);
  }
  const auto inputs_of_tokens = static_cast<int64_t>(rounded.size());
  const auto quantize = [&](int64_t i) { rounded[i % inputs_of_tokens]->quantize(kernels, i / inputs_of_tokens); };
  const ParallelFor alone{};
  run_tasks(tokens > 1 ? parallel : alone, tokens * inputs_of_tokens, quantize);

  std::vector<const Input*> inputs(count), ones(count);
  int64_t rows = 0;
  for (size_t c = 0; c < count; ++c) {
    inputs[c] = &distinct[which[c]];
    ones[c] = which_ones[c] == none ? nullptr : &distinct[which_ones[c]];
    rows += calls[c].weights->rows;
  }
  const int64_t step = kernels.lanes;
  const int64_t threads = parallel.run ? parallel.threads : 1;
  const int64_t rows_per_task = std::clamp(round_up(rows / (threads * tasks_per_thread), step), step, 16 * step);
  LinearJob job{kernels, calls, count, inputs, ones, tokens, rows_per_task, panel_bytes};
  int64_t tasks = 0;
  for (size_t c = 0; c < count; ++c) tasks += job.tasks_of(calls[c]);
  const bool small = bytes * static_cast<size_t>(tokens) < alone_bytes;
  run_tasks(small ? alone : parallel, tasks, [&](int64_t i) { job.run(i); });
  for (size_t c = 0; c < count; ++c) {
    if (calls[c].weights->offsets_) calls[c].weights->offsets_->known = true;
  }
}

}  // namespace crayon
