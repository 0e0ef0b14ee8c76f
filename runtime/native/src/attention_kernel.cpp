// Attention for one AttentionTask; compiled once for each instruction set, named by CRAYON_KERNELS.
//
// Positions come in blocks that fit the first-level cache. The keys of a block are transposed once for all query rows
// that share them, so that a vector holds the scores of one row at several positions: no sums across lanes, and a
// softmax of whole vectors. Where few rows share the keys, transposing costs more than sums across lanes do.
//
// With an int8 cache and instructions for products of bytes, scores and sums of values are computed in integers,
// exactly: query and weights are whole numbers of 15 and 14 bits then, in two bytes ("planes"), coarse * 128 + fine.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of such a function, and
// it could be the one compiled for instructions that the CPU does not have.
#include "attention_kernel.h"

#include "simd.h"

namespace crayon {
namespace {

constexpr int64_t most_positions = 128;  // of a block
constexpr float nothing_seen = -1e30f;   // finite, so that differences of it are numbers
constexpr float masked = -__builtin_inff();
constexpr float log2_of_e = 1.44269504088896341f;
constexpr bool many_registers = registers == 32;

// Tiles are functions of their own: inlined into one large function they spill registers.
#define CRAYON_APART __attribute__((noinline))
// Loops over registers must be unrolled, or the compiler puts the registers into memory.
#define CRAYON_UNROLL _Pragma("GCC unroll 16")

// to[i] = from[i] * factor, as many as `count`; up to `width`, zeros.
inline void copy_row(const float* from, float factor, int64_t count, float* to, int64_t width) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i) * factor);
  for (; i < count; ++i) to[i] = from[i] * factor;
  for (; i < width; ++i) to[i] = 0.0f;
}

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory for something of every query row of a task: a head's rows start at a multiple of `lanes`.
constexpr int64_t row_slots = rows_per_task * lanes;

// The query rows of one key-value head, as far as they were computed. Arrays have room for whole vectors.
struct Rows {
  int64_t count;
  float* largest;                                // score so far, in units of log2
  float* weight;                                 // sum of weights so far
  const int64_t* seen;                           // positions before this one are visible to the row
  const float* const* mask;                      // or null
  float decay[round_up(rows_per_task, lanes)];   // what earlier sums are multiplied by when a block is added,
  float factor[round_up(rows_per_task, lanes)];  // and what the block's sums are multiplied by
};

// A block's scores become weights relative to the block's largest of each row, and `rows` takes them in. `finish` gets
// them, a vector at a time, with what lies beyond `count` as zeros.
template <typename Finish>
inline void softmax(Rows& rows, float (*scores)[most_positions], int64_t first, int64_t count, Finish finish) {
  const int64_t end = round_up(count, lanes);
  for (int64_t base = 0; base < rows.count; base += lanes) {
    const int64_t n = rows.count - base < lanes ? rows.count - base : lanes;
    Floats folded[lanes];
    for (int64_t r = 0; r < lanes; ++r) {
      folded[r] = broadcast(nothing_seen);
      if (r >= n) continue;
      float* row = scores[base + r];
      if (const float* mask = rows.mask[base + r]) {
        for (int64_t p = 0; p < count; ++p) row[p] += mask[first + p] * log2_of_e;
      }
      const int64_t seen = rows.seen[base + r] - first;
      for (int64_t p = seen < 0 ? 0 : seen < count ? seen : count; p < end; ++p) row[p] = masked;
      for (int64_t p = 0; p < end; p += lanes) folded[r] = larger(folded[r], load(row + p));
    }
    const Floats largest = n == 1 ? broadcast(largest_of(folded[0])) : largest_each(folded),
                 before = load(rows.largest + base), now = larger(largest, before);
    alignas(64) float block_largest[lanes];
    store(block_largest, largest);
    for (int64_t r = 0; r < lanes; ++r) {
      folded[r] = Floats{};
      if (r >= n) continue;
      for (int64_t p = 0; p < end; p += lanes) {
        const Floats weight = exp2(load(scores[base + r] + p) - block_largest[r]);
        folded[r] += weight;
        finish(base + r, p, weight);
      }
    }
    const Floats decay = exp2(before - now), factor = exp2(largest - now);
    const Floats total = n == 1 ? broadcast(sum(folded[0])) : sum_each(folded);
    store(rows.decay + base, decay);
    store(rows.factor + base, factor);
    store(rows.weight + base, load(rows.weight + base) * decay + total * factor);
    store(rows.largest + base, now);
  }
}

// Asks for the memory of a row of keys or values that is wanted later: `ahead` elements behind `row`, which may be past
// the end of the cache. Tasks compute on one block for longer than processors look ahead by themselves.
template <typename Element>
inline void prefetch(const Element* row, int64_t ahead, int64_t head_size) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(ahead) * sizeof(Element);
  const uintptr_t bytes = static_cast<uintptr_t>(head_size) * sizeof(Element);
  for (uintptr_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(first + at), 0, 2);
}

template <typename Element>
void prefetch_block(const CacheSide& side, int64_t head, int64_t first, int64_t count, int64_t head_size) {
  const Element* row = static_cast<const Element*>(side.data) + head * side.head_stride + first * side.position_stride;
  for (int64_t p = 0; p < count; ++p) prefetch(row + p * side.position_stride, 0, head_size);
}

template <typename Element>
const Element* elements(const CacheSide& side, int64_t head, int64_t first) {
  return static_cast<const Element*>(side.data) + head * side.head_stride + first * side.position_stride;
}

// The scales and zero points (or zeros) of a block of an int8 cache.
void load_scales(const CacheSide& side, int64_t head, int64_t first, int64_t count, float* scales, float* zeros) {
  const int64_t step = side.scale_position_stride, at = head * side.scale_head_stride + first * step;
  for (int64_t p = 0; p < count; ++p) scales[p] = side.scales[at + p * step];
  for (int64_t p = 0; p < count; ++p) zeros[p] = side.zero_points ? side.zero_points[at + p * step] : 0.0f;
  for (int64_t p = count; p < round_up(count, lanes); ++p) scales[p] = zeros[p] = 0.0f;
}

// Computes in floats, with any cache.
class Floating {
 public:
  explicit Floating(const Attention& attention)
      : a_(attention),
        width_(round_up(a_.head_size, lanes)),
        positions_(block_floats / width_ < 64 ? block_floats / width_ / 16 * 16 : 64) {}

  int64_t positions() const { return positions_; }
  int64_t width() const { return width_; }

  // A row of sums, in the order of a head's elements.
  const float* in_order(const float* sums) { return sums; }

  void prefetch_first(int64_t head, int64_t first, int64_t count) {
    const CacheSide* sides[] = {&a_.keys, &a_.values};
    for (const CacheSide* side : sides) {
      if (a_.type == CacheType::fp32) prefetch_block<float>(*side, head, first, count, a_.head_size);
      if (a_.type == CacheType::fp16) prefetch_block<uint16_t>(*side, head, first, count, a_.head_size);
      if (a_.type == CacheType::int8) prefetch_block<int8_t>(*side, head, first, count, a_.head_size);
    }
  }

  void set_query(int64_t row, const float* from) {
    copy_row(from, a_.scale * log2_of_e, a_.head_size, query_ + row * width_, width_);
  }

  // Adds a block of positions to the rows of one key-value head: `sums` [rows, width].
  void add(int64_t head, int64_t first, int64_t count, int64_t first_row, Rows& state, float* sums) {
    const int64_t rows = state.count;
    const float* query = query_ + first_row * width_;
    const bool bytes = a_.type == CacheType::int8;
    Block keys = unpack(a_.keys, head, first, count, bytes);
    int64_t r = 0;
    if (rows > few_rows) {
      transpose_keys(keys, count);
      for (; r + tile_rows <= rows; r += tile_rows) score_columns<tile_rows>(query + r * width_, count, scores_[r]);
      for (; r < rows; ++r) score_columns<1>(query + r * width_, count, scores_[r]);
    }
    for (; r + score_rows <= rows; r += score_rows, keys.ahead = 0) {
      score<score_rows>(query + r * width_, keys, count, scores_[r]);
    }
    for (; r < rows; ++r, keys.ahead = 0) score<1>(query + r * width_, keys, count, scores_[r]);
    if (bytes) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p < count; p += lanes) {
          store(scores_[r] + p, load(scores_[r] + p) * load(scales_ + p));
        }
      }
    }
    Block values = unpack(a_.values, head, first, count, bytes);
    if (bytes) {
      softmax(state, scores_, first, count,
              [&](int64_t r, int64_t p, Floats weight) { store(scores_[r] + p, weight * load(scales_ + p)); });
    } else {
      softmax(state, scores_, first, count,
              [&](int64_t r, int64_t p, Floats weight) { store(scores_[r] + p, weight); });
    }
    for (r = 0; r + tile_rows <= rows; r += tile_rows, values.ahead = 0) {
      add_values<tile_rows, tile_vectors>(values, count, r, state, sums);
    }
    for (; r < rows; ++r, values.ahead = 0) add_values<1, 8>(values, count, r, state, sums);
  }

 private:
  static constexpr int64_t block_floats = 8192;  // keys or values of a block: 32 KB
  static constexpr int64_t few_rows = 8;  // up to so many, sums across lanes cost less than to transpose the keys
  static constexpr int score_rows = many_registers ? 4 : 2;
  static constexpr int tile_rows = 4;
  static constexpr int tile_vectors = many_registers ? 4 : 2;

  struct Block {
    const float* rows;
    int64_t stride;
    int64_t ahead;  // from a row to the one of the next block; 0: not to be fetched
  };

  template <typename Element, typename Load>
  void unpack_rows(const Element* from, int64_t stride, int64_t count, Load load_vector) {
    const int64_t whole = a_.head_size / lanes * lanes, ahead = positions_ * stride;
    float* to = unpacked_;
    for (int64_t p = 0; p < count; ++p, from += stride, to += width_) {
      prefetch(from, ahead, a_.head_size);
      for (int64_t d = 0; d < whole; d += lanes) store(to + d, load_vector(from + d, p));
      if (whole == a_.head_size) continue;
      Element rest[lanes] = {};
      for (int64_t d = whole; d < a_.head_size; ++d) rest[d - whole] = from[d];
      store(to + whole, load_vector(rest, p));
      for (int64_t d = a_.head_size; d < width_; ++d) to[d] = 0.0f;  // a zero point makes something else of the padding
    }
  }

  // Keys or values as floats; without their scales, which go to `scales_`.
  Block unpack(const CacheSide& side, int64_t head, int64_t first, int64_t count, bool bytes) {
    const int64_t stride = side.position_stride;
    if (bytes) {
      load_scales(side, head, first, count, scales_, zeros_);
      unpack_rows(elements<int8_t>(side, head, first), stride, count,
                  [this](const int8_t* p, int64_t position) { return load_int8(p) - zeros_[position]; });
    } else if (a_.type == CacheType::fp16) {
      unpack_rows(elements<uint16_t>(side, head, first), stride, count,
                  [](const uint16_t* p, int64_t) { return load_half(p); });
    } else {
      const float* from = elements<float>(side, head, first);
      if (a_.head_size % lanes == 0) return {from, stride, positions_ * stride};
      unpack_rows(from, stride, count, [](const float* p, int64_t) { return load(p); });
    }
    return {unpacked_, width_, 0};
  }

  // Element d of all positions at transposed_ + d * positions_. The last position stands in for those beyond.
  CRAYON_APART void transpose_keys(Block keys, int64_t count) {
    const int64_t width = width_, positions = positions_;
    for (int64_t p = 0; p < count; p += lanes) {
      for (int64_t d = 0; d < width; d += lanes) {
        Floats v[lanes];
        for (int i = 0; i < lanes; ++i) v[i] = load(keys.rows + (p + i < count ? p + i : count - 1) * keys.stride + d);
        transpose(v);
        for (int i = 0; i < lanes; ++i) store(transposed_ + (d + i) * positions + p, v[i]);
      }
    }
  }

  // The scores of some rows, with transposed keys.
  template <int rows>
  void score_columns(const float* query, int64_t count, float* scores) {
    int64_t p = 0;
    for (; p + (tile_vectors - 1) * lanes < count; p += tile_vectors * lanes) {
      score_tile<rows, tile_vectors>(query, transposed_ + p, scores + p);
    }
    for (; p < count; p += lanes) score_tile<rows, 1>(query, transposed_ + p, scores + p);
  }

  template <int rows, int vectors>
  CRAYON_APART void score_tile(const float* query, const float* columns, float* scores) {
    const int64_t width = width_, positions = positions_;
    Floats sums[rows][vectors] = {};
    for (int64_t d = 0; d < width; ++d, columns += positions) {
      Floats key[vectors];
      for (int i = 0; i < vectors; ++i) key[i] = load(columns + i * lanes);
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < vectors; ++i) sums[r][i] += query[r * width + d] * key[i];
      }
    }
    CRAYON_UNROLL for (int r = 0; r < rows; ++r) {
      CRAYON_UNROLL for (int i = 0; i < vectors; ++i) store(scores + r * most_positions + i * lanes, sums[r][i]);
    }
  }

  // The scores of some rows: sums across lanes. The last position stands in for those beyond.
  template <int rows>
  CRAYON_APART void score(const float* query, Block keys, int64_t count, float* scores) {
    constexpr int at_once = rows == 1 && many_registers ? 16 : 4;  // positions
    const int64_t width = width_;
    for (int64_t p = 0; p < count; p += round_up(lanes, at_once)) {
      Floats folded[rows][round_up(lanes, at_once) / 4];
      for (int64_t i = 0; i < round_up(lanes, at_once); i += at_once) {
        const float* key[at_once];
        key[0] = keys.rows + (p + i < count ? p + i : count - 1) * keys.stride;
        for (int j = 1; j < at_once; ++j) key[j] = key[j - 1] + (p + i + j < count ? keys.stride : 0);
        if (keys.ahead) {
          for (int j = 0; j < at_once; ++j) prefetch(key[j], keys.ahead, width);
        }
        Floats sums[rows][at_once] = {};
        for (int64_t d = 0; d < width; d += lanes) {
          Floats q[rows];
          for (int r = 0; r < rows; ++r) q[r] = load(query + r * width + d);
          for (int j = 0; j < at_once; ++j) {
            const Floats k = load(key[j] + d);
            for (int r = 0; r < rows; ++r) sums[r][j] += q[r] * k;
          }
        }
        for (int r = 0; r < rows; ++r) {
          for (int j = 0; j < at_once; j += 4) {
            folded[r][(i + j) / 4] = fold_four({sums[r][j], sums[r][j + 1], sums[r][j + 2], sums[r][j + 3]}, plus);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < round_up(lanes, at_once); i += lanes) {
          Floats part[groups];
          for (int g = 0; g < groups; ++g) part[g] = folded[r][i / 4 + g];
          store(scores + r * most_positions + p + i, fold_groups(part, plus));
        }
      }
    }
  }

  template <int rows, int vectors>
  void add_values(Block values, int64_t count, int64_t row, const Rows& state, float* sums) {
    int64_t d = 0;
    for (; d + vectors * lanes <= width_; d += vectors * lanes) {
      value_tile<rows, vectors>(values, d, count, row, state, sums);
    }
    if constexpr (rows == 1) {
      for (; d + 4 * lanes <= width_; d += 4 * lanes) value_tile<rows, 4>(values, d, count, row, state, sums);
    }
    for (; d < width_; d += lanes) value_tile<rows, 1>(values, d, count, row, state, sums);
  }

  template <int rows, int vectors>
  CRAYON_APART void value_tile(Block block, int64_t d, int64_t count, int64_t row, const Rows& state, float* sums) {
    const float* values = block.rows + d;
    Floats total[rows][vectors] = {};
    const float* weights = scores_[row];
    for (int64_t p = 0; p < count; ++p, values += block.stride) {
      if (block.ahead) prefetch(values, block.ahead, vectors * lanes);
      Floats value[vectors];
      for (int i = 0; i < vectors; ++i) value[i] = load(values + i * lanes);
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < vectors; ++i) total[r][i] += weights[r * most_positions + p] * value[i];
      }
    }
    CRAYON_UNROLL for (int r = 0; r < rows; ++r) {
      const float decay = state.decay[row + r], factor = state.factor[row + r];
      float* to = sums + (row + r) * width_ + d;
      CRAYON_UNROLL for (int i = 0; i < vectors; ++i) {
        store(to + i * lanes, load(to + i * lanes) * decay + total[r][i] * factor);
      }
    }
  }

  const Attention& a_;
  const int64_t width_, positions_;
  alignas(64) float query_[rows_per_task * largest_head_size];
  alignas(64) float unpacked_[block_floats];
  alignas(64) float transposed_[block_floats];
  alignas(64) float scores_[rows_per_task][most_positions];  // and the weights
  alignas(64) float scales_[most_positions], zeros_[most_positions];
};

#if defined(CRAYON_DOT)
// Computes in integers, with an int8 cache.
class Integral {
 public:
  explicit Integral(const Attention& attention) : a_(attention), width_(round_up(a_.head_size, vector_bytes)) {}

  int64_t positions() const { return most_positions; }
  int64_t width() const { return width_; }

  // `interleave` leaves the values' columns in an order of its own.
  const float* in_order(const float* sums) {
    for (int64_t d = 0; d < width_; d += vector_bytes) {
      for (int64_t i = 0; i < vector_bytes; i += 4) {
        const float* from = sums + d + i % 16 / 4 * lanes + i / 16 * 4;
        *reinterpret_cast<LooseQuad*>(row_ + d + i) = *reinterpret_cast<const LooseQuad*>(from);
      }
    }
    return row_;
  }

  void prefetch_first(int64_t head, int64_t first, int64_t count) {
    prefetch_block<int8_t>(a_.keys, head, first, count, a_.head_size);
    prefetch_block<int8_t>(a_.values, head, first, count, a_.head_size);
  }

  void set_query(int64_t row, const float* from) {
    const int64_t width = width_;
    copy_row(from, 1.0f, a_.head_size, row_, width);
    Floats magnitude = {};
    for (int64_t d = 0; d < width; d += lanes) {
      const Floats v = load(row_ + d);
      magnitude = larger(magnitude, larger(v, -v));
    }
    const float most_magnitude = largest_of(magnitude);
    const float inverse = most_magnitude > 0.0f ? most / most_magnitude : 0.0f;
    int8_t* coarse = query_ + row * planes * width;
    int8_t* fine = coarse + width;
    Ints coarse_sum = {}, fine_sum = {};
    for (int64_t d = 0; d < width; d += lanes) {
      const Ints whole = to_ints(load(row_ + d) * inverse);
      const Ints high = (whole + 64) >> 7, low = whole - (high << 7);
      store_narrow(coarse + d, high);
      store_narrow(fine + d, low);
      coarse_sum += high;
      fine_sum += low;
    }
    const float coarse_total = sum(__builtin_convertvector(coarse_sum, Floats));
    const float fine_total = sum(__builtin_convertvector(fine_sum, Floats));
    QueryRow& q = rows_[row];
    q.scale = most_magnitude / most * a_.scale * log2_of_e;
    q.sum = coarse_total * 128.0f + fine_total;
    q.start[0] = -unsigned_offset * static_cast<int32_t>(coarse_total);
    q.start[1] = -unsigned_offset * static_cast<int32_t>(fine_total);
  }

  void add(int64_t head, int64_t first, int64_t count, int64_t first_row, Rows& state, float* sums) {
    const int64_t rows = state.count;
    load_scales(a_.keys, head, first, count, scales_, zeros_);
    transpose_keys(elements<int8_t>(a_.keys, head, first), count);
    int64_t r = 0;
    for (; r + score_rows <= rows; r += score_rows) score<score_rows>(first_row, r, count);
    for (; r < rows; ++r) score<1>(first_row, r, count);

    load_scales(a_.values, head, first, count, scales_, zeros_);
    Floats most_scale = {};
    for (int64_t p = 0; p < count; p += lanes) most_scale = larger(most_scale, load(scales_ + p));
    const float value_scale = largest_of(most_scale) / most, inverse = value_scale > 0.0f ? 1.0f / value_scale : 0.0f;
    for (int64_t p = 0; p < count; p += lanes) store(scales_ + p, load(scales_ + p) * inverse);
    interleave_values(elements<int8_t>(a_.values, head, first), count);
    softmax(state, scores_, first, count, [&](int64_t r, int64_t p, Floats weight) {
      const Ints whole = to_ints(weight * load(scales_ + p));
      store_narrow(weights_[r][0] + p, whole >> 7);
      store_narrow(weights_[r][1] + p, whole & 127);
      const Floats offset = __builtin_convertvector(whole, Floats) * load(zeros_ + p);
      offsets_[r] = p > 0 ? offsets_[r] + offset : offset;
    });
    for (r = 0; r < rows; ++r) state.factor[r] *= value_scale;
    for (r = 0; r + value_rows <= rows; r += value_rows) add_values<value_rows>(count, r, state, sums);
    for (; r < rows; ++r) add_values<1>(count, r, state, sums);
  }

 private:
  static constexpr int planes = 2;
  static constexpr float most = 127 * 128;  // the largest whole number of a query or a weight
  static constexpr int score_rows = many_registers ? 4 : 2;
  static constexpr int score_vectors = 2;
  static constexpr int value_rows = many_registers ? 2 : 1;

  struct QueryRow {
    float scale;
    float sum;              // of the whole numbers
    int32_t start[planes];  // where sums start, so that `unsigned_offset` cancels
  };

  // Row p of the block, `width_` bytes that can be read; the last one stands in for those beyond.
  const int8_t* row(const int8_t* from, int64_t stride, int64_t p, int64_t count, int i) {
    from += (p + i < count ? p + i : count - 1) * stride;
    prefetch(from, most_positions * stride, a_.head_size);
    if (width_ == a_.head_size) return from;
    for (int64_t d = 0; d < a_.head_size; ++d) padded_[i][d] = from[d];
    return padded_[i];
  }

  // Bytes 4 j..4 j + 3 of positions p..p + lanes - 1 at keys_ + p * width_ + j * vector_bytes.
  CRAYON_APART void transpose_keys(const int8_t* from, int64_t count) {
    const int64_t width = width_, stride = a_.keys.position_stride;
    for (int64_t p = 0; p < count; p += lanes) {
      const int8_t* rows[lanes];
      for (int i = 0; i < lanes; ++i) rows[i] = row(from, stride, p, count, i);
      for (int64_t d = 0; d < width; d += vector_bytes) {
        Floats v[lanes];
        for (int i = 0; i < lanes; ++i) v[i] = reinterpret_cast<Floats>(as_first(load_bytes(rows[i] + d)));
        transpose(v);
        for (int i = 0; i < lanes; ++i) {
          store_bytes(bytes_ + p * width + d * lanes + i * vector_bytes, reinterpret_cast<Bytes>(v[i]));
        }
      }
    }
  }

  template <int rows>
  void score(int64_t first_row, int64_t row, int64_t count) {
    int64_t p = 0;
    for (; p + (score_vectors - 1) * lanes < count; p += score_vectors * lanes) {
      score_tile<rows, score_vectors>(first_row + row, p, scores_[row] + p);
    }
    for (; p < count; p += lanes) score_tile<rows, 1>(first_row + row, p, scores_[row] + p);
  }

  template <int rows, int vectors>
  CRAYON_APART void score_tile(int64_t first_row, int64_t p, float* scores) {
    Ints sums[rows][planes][vectors];
    for (int r = 0; r < rows; ++r) {
      for (int k = 0; k < planes; ++k) {
        for (int i = 0; i < vectors; ++i) sums[r][k][i] = rows_[first_row + r].start[k] - Ints{};
      }
    }
    const int64_t width = width_;
    const int8_t* query = query_ + first_row * planes * width;
    const int8_t* keys = bytes_ + p * width;
    for (int64_t d = 0; d < width; d += 4) {
      Bytes key[vectors];
      for (int i = 0; i < vectors; ++i) key[i] = load_bytes(keys + (i * width + d) * lanes);
      for (int r = 0; r < rows; ++r) {
        for (int k = 0; k < planes; ++k) {
          const Bytes q = broadcast_bytes(query + (r * planes + k) * width + d);
          for (int i = 0; i < vectors; ++i) sums[r][k][i] = dot(sums[r][k][i], key[i], q);
        }
      }
    }
    CRAYON_UNROLL for (int i = 0; i < vectors; ++i) {
      const Floats scale = load(scales_ + p + i * lanes), zero = load(zeros_ + p + i * lanes);
      CRAYON_UNROLL for (int r = 0; r < rows; ++r) {
        const QueryRow& q = rows_[first_row + r];
        const Floats whole = __builtin_convertvector((sums[r][0][i] << 7) + sums[r][1][i], Floats);
        store(scores + r * most_positions + i * lanes, (whole - zero * q.sum) * (scale * q.scale));
      }
    }
  }

  // Columns of positions p..p + 3 at bytes_ + p * width_, as `interleave` orders them.
  CRAYON_APART void interleave_values(const int8_t* from, int64_t count) {
    const int64_t width = width_, stride = a_.values.position_stride;
    for (int64_t p = 0; p < count; p += 4) {
      const int8_t* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = row(from, stride, p, count, i);
      for (int64_t d = 0; d < width; d += vector_bytes) {
        Bytes v[4];
        for (int i = 0; i < 4; ++i) v[i] = load_bytes(rows[i] + d);
        interleave(v);
        for (int i = 0; i < 4; ++i) store_bytes(bytes_ + p * width + d * 4 + i * vector_bytes, v[i]);
      }
    }
  }

  template <int rows>
  CRAYON_APART void add_values(int64_t count, int64_t row, const Rows& state, float* sums) {
    for (int64_t d = 0; d < width_; d += vector_bytes) {
      Ints total[rows][planes][4] = {};
      for (int64_t p = 0; p < count; p += 4) {
        const int8_t* values = bytes_ + p * width_ + d * 4;
        Bytes value[4];
        for (int i = 0; i < 4; ++i) value[i] = load_bytes(values + i * vector_bytes);
        for (int r = 0; r < rows; ++r) {
          for (int k = 0; k < planes; ++k) {
            const Bytes weight = broadcast_bytes(weights_[row + r][k] + p);
            for (int i = 0; i < 4; ++i) total[r][k][i] = dot(total[r][k][i], weight, value[i]);
          }
        }
      }
      CRAYON_UNROLL for (int r = 0; r < rows; ++r) {
        const float decay = state.decay[row + r], factor = state.factor[row + r], offset = sum(offsets_[row + r]);
        CRAYON_UNROLL for (int i = 0; i < 4; ++i) {
          const Floats whole = __builtin_convertvector((total[r][0][i] << 7) + total[r][1][i], Floats);
          float* to = sums + (row + r) * width_ + d + i * lanes;
          store(to, load(to) * decay + (whole - offset) * factor);
        }
      }
    }
  }

  const Attention& a_;
  const int64_t width_;
  QueryRow rows_[rows_per_task];
  alignas(64) int8_t query_[rows_per_task * planes * largest_head_size];
  alignas(64) int8_t bytes_[most_positions * largest_head_size];  // transposed keys, then interleaved values
  alignas(64) int8_t padded_[lanes][largest_head_size];
  alignas(64) float row_[largest_head_size];
  alignas(64) float scores_[rows_per_task][most_positions];
  alignas(64) int8_t weights_[rows_per_task][planes][most_positions];
  alignas(64) float scales_[most_positions], zeros_[most_positions];
  Floats offsets_[rows_per_task];  // weights times zero points
};
#endif

// The first float of a query head's row in `query` and in `output`.
int64_t head_row(const AttentionTask& task, int64_t head, int64_t row) {
  const Attention& a = *task.attention;
  const int64_t group = a.query_heads / a.cache_heads;
  return (row / group * a.query_heads + (task.first_head + head) * group + row % group) * a.head_size;
}

template <typename Arithmetic>
void attend_with(const AttentionTask& task) {
  const Attention& a = *task.attention;
  const int64_t group = a.query_heads / a.cache_heads;
  Arithmetic arithmetic(a);
  const int64_t width = arithmetic.width();
  const int64_t slots = round_up(task.rows, lanes);  // of a head
  alignas(64) float sums[rows_per_task * largest_head_size];
  alignas(64) float largest[row_slots], weight[row_slots];
  int64_t seen[rows_per_task];  // the same for all heads
  const float* mask[rows_per_task];

  int64_t last = task.first_position;  // exclusive: no row sees more
  for (int64_t i = 0; i < task.rows; ++i) {
    const int64_t token = (task.first_row + i) / group;
    seen[i] = a.causal ? a.start + token + 1 : a.visible;
    mask[i] = a.mask ? a.mask + token * a.mask_stride : nullptr;
    if (seen[i] > last) last = seen[i];
  }
  if (last > task.last_position) last = task.last_position;
  for (int64_t h = 0; h < task.heads; ++h) {
    const int64_t count =
        last - task.first_position < arithmetic.positions() ? last - task.first_position : arithmetic.positions();
    arithmetic.prefetch_first(task.first_head + h, task.first_position, count);
    for (int64_t i = 0; i < task.rows; ++i) {
      arithmetic.set_query(h * task.rows + i, a.query + head_row(task, h, task.first_row + i));
    }
  }
  for (int64_t i = 0; i < task.heads * task.rows * width; i += lanes) store(sums + i, Floats{});
  for (int64_t i = 0; i < task.heads * slots; i += lanes) {
    store(largest + i, broadcast(nothing_seen));
    store(weight + i, Floats{});
  }

  for (int64_t first = task.first_position; first < last; first += arithmetic.positions()) {
    const int64_t count = last - first < arithmetic.positions() ? last - first : arithmetic.positions();
    for (int64_t h = 0; h < task.heads; ++h) {
      const int64_t row = h * task.rows;
      Rows rows;
      rows.count = task.rows;
      rows.largest = largest + h * slots, rows.weight = weight + h * slots;
      rows.seen = seen, rows.mask = mask;
      arithmetic.add(task.first_head + h, first, count, row, rows, sums + row * width);
    }
  }

  for (int64_t h = 0; h < task.heads; ++h) {
    for (int64_t i = 0; i < task.rows; ++i) {
      const int64_t at = h * task.rows + i;
      const float total = weight[h * slots + i];
      float factor = total > 0.0f ? 1.0f / total : 0.0f;  // a mask may hide everything
      float* to = a.output + head_row(task, h, task.first_row + i);
      if (task.partial_sums) {
        to = task.partial_sums + at * a.head_size;
        factor = 1.0f;
        task.partial_largest[at] = largest[h * slots + i];
        task.partial_weights[at] = total;
      }
      copy_row(arithmetic.in_order(sums + at * width), factor, a.head_size, to, a.head_size);
    }
  }
}

void attend(const AttentionTask& task) {
#if defined(CRAYON_DOT)
  if (task.attention->type == CacheType::int8) return attend_with<Integral>(task);
#endif
  attend_with<Floating>(task);
}

void to_half(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_half(to + i, load(from + i));
  if (i == count) return;
  float rest[lanes] = {};
  uint16_t half[lanes];
  for (int64_t j = i; j < count; ++j) rest[j - i] = from[j];
  store_half(half, load(rest));
  for (int64_t j = i; j < count; ++j) to[j] = half[j - i];
}

float to_int8(const float* from, int8_t* to, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(from[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  const float magic = 0x1.8p23f;  // rounds to nearest even
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = from[i] * inverse + magic;
    to[i] = static_cast<int8_t>(shifted - magic);
  }
  return largest > 0.0f ? largest / 127.0f : 1.0f;
}

float exp2_of(float x) { return exp2(broadcast(x))[0]; }

}  // namespace

#define CRAYON_JOIN_(a, b) a##b
#define CRAYON_JOIN(a, b) CRAYON_JOIN_(a, b)
extern const AttentionKernels CRAYON_JOIN(attention_, CRAYON_KERNELS) = {attend, to_half, to_int8, exp2_of};

}  // namespace crayon
