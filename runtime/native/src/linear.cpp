#include "linear.h"

#include <algorithm>
#include <cstring>

#include "instruction_set.h"

namespace crayon {
namespace {

// In the order of InstructionSet.
constexpr const LinearKernels* all_kernels[] = {CRAYON_EACH(&linear_)};

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
  // Kernels read up to 32 bytes beyond a row; the one behind the last but one is as long only from here on.
  return rows > 0 && power_of_two && group_size >= 32 && width >= 64 && width % group_size == 0;
}

bool LinearWeights::copies_int8(int64_t rows, int64_t width) {
  constexpr int64_t most_rank = 256;
  return std::min(rows, width) <= most_rank;
}

std::unique_ptr<LinearWeights> LinearWeights::int4(const uint8_t* codes, const uint16_t* scales, int64_t rows,
                                                   int64_t width, int64_t group_size, std::shared_ptr<RowSums> sums) {
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
  sums->scaled.resize(static_cast<size_t>(rows));
  made->sums_ = std::move(sums);
  made->int4_.codes = codes;
  made->int4_.scales = scales;
  made->int4_.last_codes = made->last_codes_.data();
  made->int4_.last_scales = made->last_scales_.data();
  made->int4_.offsets = made->sums_->scaled.data();
  made->int4_.rows = rows;
  made->int4_.width = width;
  made->int4_.group_size = group_size;
  return made;
}

std::unique_ptr<LinearWeights> LinearWeights::int8(const int8_t* codes, const float* scales, int64_t rows,
                                                   int64_t width, std::shared_ptr<RowSums> sums) {
  const LinearKernels& kernels = chosen_kernels();
  auto made = std::make_unique<LinearWeights>();
  made->rows = rows;
  made->width = width;
  if (copies_int8(rows, width)) {
    const auto padded = static_cast<size_t>(round_up(rows, kernels.lanes));
    made->copied_codes_.resize(padded * static_cast<size_t>(round_up(width, 4)));
    made->copied_scales_.assign(scales, scales + rows);
    made->copied_scales_.resize(padded);
    sums->whole.resize(padded);
    kernels.interleave(codes, rows, width, made->copied_codes_.data(), sums->whole.data());
    made->interleaved_ = {made->copied_codes_.data(), made->copied_scales_.data(), sums->whole.data(), rows, width};
    sums->known = true;
  } else {
    made->last_codes_.assign(static_cast<size_t>(width + 4 * most_lanes), 0);
    std::memcpy(made->last_codes_.data(), codes + (rows - 1) * width, static_cast<size_t>(width));
    sums->whole.resize(static_cast<size_t>(rows));
    const auto* last = reinterpret_cast<const int8_t*>(made->last_codes_.data());
    made->int8_ = {codes, scales, last, sums->whole.data(), rows, width};
  }
  made->sums_ = std::move(sums);
  return made;
}

// The products of one call: their inputs, and their rows in pieces that threads take.
class LinearJob {
 public:
  LinearJob(const LinearCall* calls, size_t count, int64_t tokens) : kernels_(chosen_kernels()), tokens_(tokens) {
    inputs_.reserve(2 * count);
    for (size_t c = 0; c < count; ++c) {
      const LinearWeights& w = *calls[c].weights;
      const bool wants_ones = w.group_size && !w.sums_->known;
      products_.push_back({&calls[c], find(calls[c].in, w.width, w.group_size),
                           wants_ones ? find(nullptr, w.width, w.group_size) : nothing, !w.sums_->known, 0});
      bytes_ += w.bytes();
      rows_ += w.rows;
      panel_bytes_ = std::max(panel_bytes_, w.group_size ? kernels_.int4_workspace(w.width, w.group_size)
                                                         : kernels_.int8_workspace(w.width));
    }
  }

  void run(const ParallelFor& parallel) {
    const ParallelFor alone{};
    place_inputs();
    const auto inputs = static_cast<int64_t>(inputs_.size());
    share(tokens_ > 1 ? parallel : alone, tokens_ * inputs, [&](int64_t i) {
      Input& input = inputs_[static_cast<size_t>(i % inputs)];
      if (input.x) input.quantize(kernels_, i / inputs);
    });

    const int64_t step = kernels_.lanes, threads = parallel.run ? parallel.threads : 1;
    rows_per_task_ = std::clamp(round_up(rows_ / (threads * tasks_per_thread), step), step, 16 * step);
    int64_t tasks = 0;
    for (Product& product : products_) {
      product.first_task = tasks;
      tasks += (product.call->weights->rows + rows_per_task_ - 1) / rows_per_task_;
    }
    const bool few = bytes_ * static_cast<size_t>(tokens_) < alone_bytes;
    share(few ? alone : parallel, tasks, [&](int64_t i) { compute(i); });
    for (const Product& product : products_) product.call->weights->sums_->known = true;
  }

 private:
  static constexpr size_t nothing = ~size_t{0};
  struct Product {
    const LinearCall* call;
    size_t input, ones;  // of `inputs_`; `ones` to compute the sums of int4 rows with, where they are not known
    bool sums_rows;
    int64_t first_task;
  };

  // The place of an input; of a token of ones, if `x` is null. Groups of two sizes want it twice.
  size_t find(const float* x, int64_t width, int64_t group_size) {
    auto found = std::find_if(inputs_.begin(), inputs_.end(), [&](const Input& i) {
      return i.x == x && i.width == width && (i.group_size == group_size || !group_size || !i.group_size);
    });
    if (found == inputs_.end()) found = inputs_.insert(inputs_.end(), Input{.x = x, .width = width});
    if (group_size) found->group_size = group_size;
    return static_cast<size_t>(found - inputs_.begin());
  }

  void place_inputs() {
    static Workspace workspace;
    const auto place = [&](uint8_t* block) {
      Pieces pieces(block);
      for (Input& input : inputs_) input.place(pieces, kernels_, input.x ? tokens_ : 1);
      return pieces.used();
    };
    place(static_cast<uint8_t*>(workspace.reserve(place(nullptr))));
    for (Input& input : inputs_) {
      if (input.x) continue;
      for (int64_t i = 0; i < input.tokens.plain_stride; ++i) input.bytes[i] = i < input.width;
      kernels_.to_pairs(input.bytes, input.width, input.pairs, input.tokens.pairs_size, input.lane_sums);
    }
  }

  void compute(int64_t task) const {
    auto product = products_.end() - 1;
    while (product->first_task > task) --product;
    const LinearWeights& w = *product->call->weights;
    const int64_t first = (task - product->first_task) * rows_per_task_;
    const int64_t last = std::min(w.rows, first + rows_per_task_);
    const QuantizedTokens& x = inputs_[product->input].tokens;
    float* out = product->call->out;
    if (w.interleaved_.codes) return kernels_.interleaved_tokens(w.interleaved_, x, first, last, out);
    if (product->sums_rows && w.group_size) {
      kernels_.int4_offsets(w.int4_, inputs_[product->ones].tokens, first, last);
    } else if (product->sums_rows) {
      kernels_.int8_sums(w.int8_, first, last);
    }
    static thread_local Workspace panel;
    if (tokens_ == 1) {
      w.group_size ? kernels_.int4_token(w.int4_, x, first, last, out)
                   : kernels_.int8_token(w.int8_, x, first, last, out);
    } else if (w.group_size) {
      kernels_.int4_tokens(w.int4_, x, first, last, out, panel.reserve(panel_bytes_));
    } else {
      kernels_.int8_tokens(w.int8_, x, first, last, out, panel.reserve(panel_bytes_));
    }
  }

  template <typename Task>
  static void share(const ParallelFor& parallel, int64_t tasks, const Task& task) {
    if (parallel.run && parallel.threads > 1 && tasks > 1) {
      parallel.run(
          parallel.pool, tasks, [](void* state, int64_t i) { (*static_cast<const Task*>(state))(i); },
          const_cast<void*>(static_cast<const void*>(&task)));
    } else {
      for (int64_t i = 0; i < tasks; ++i) task(i);
    }
  }

  const LinearKernels& kernels_;
  int64_t tokens_, rows_ = 0, rows_per_task_ = 0;
  std::vector<Input> inputs_;
  std::vector<Product> products_;
  size_t bytes_ = 0, panel_bytes_ = 0;
};

void run_linears(const LinearCall* calls, size_t count, int64_t tokens, const ParallelFor& parallel) {
  LinearJob(calls, count, tokens).run(parallel);
}

}  // namespace crayon
