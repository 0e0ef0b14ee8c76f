// Products of quantized tokens with int4 and int8 weights; compiled once for each instruction set, named by
// CRAYON_KERNELS.
//
// One token: the weights are read as they lie in the file, row by row, once, and nothing else takes as long as reading
// them. A lane of a vector of 4-bit codes is eight elements, so a vector never holds a part of a group's lane; its sums
// become floats, times the scales of its groups, and are added up over the row; sixteen rows' sums are folded together.
//
// Many tokens: a panel of rows is transposed, so that a vector holds one element quadruple of each row, and stays in
// the first-level cache while all tokens pass.
//
// With w = code - 8 and x = scale (q - zero point), the products are
//   sum w x = scale * (sum over groups of s_g * (sum code * q - 8 sum q) - zero point * sum over groups of s_g * sum w)
// where all sums within a group are of integers, and exact.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of such a function, and
// it could be the one compiled for instructions that the CPU does not have.
#include "linear_kernel.h"

#include "simd.h"

namespace crayon {
namespace {

#define CRAYON_APART __attribute__((noinline))
#define CRAYON_UNROLL _Pragma("GCC unroll 16")

typedef uint8_t Unsigned __attribute__((vector_size(vector_bytes)));
typedef uint16_t Words __attribute__((vector_size(vector_bytes)));
typedef int32_t LooseInts __attribute__((vector_size(vector_bytes), aligned(4), may_alias));

constexpr int64_t piece = 2 * vector_bytes;  // elements of a vector of 4-bit codes
constexpr int64_t piece_lanes = lanes;       // lanes of eight of them

inline Ints load_ints(const int32_t* p) { return *reinterpret_cast<const LooseInts*>(p); }
inline void store_ints(int32_t* p, Ints v) { *reinterpret_cast<LooseInts*>(p) = v; }
inline Ints broadcast_int(int32_t x) { return x - Ints{}; }
inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
inline Bytes low_half(Bytes v) { return v & static_cast<int8_t>(15); }
inline Bytes high_half(Bytes v) {
  return reinterpret_cast<Bytes>(reinterpret_cast<Words>(v) >> 4) & static_cast<int8_t>(15);
}

// Adds four products of bytes to each lane. The first are 0..15.
inline Ints dot_small(Ints sums, Bytes first, Bytes second) {
#if defined(CRAYON_DOT)
  return dot(sums, first, second);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(first), reinterpret_cast<__m512i>(second));
  return sums + reinterpret_cast<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second));
  return sums + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__aarch64__)
  const int16x8_t low = vmull_s8(vget_low_s8(first), vget_low_s8(second)), high = vmull_high_s8(first, second);
  return vpadalq_s16(sums, vpaddq_s16(low, high));
#else
  const auto even = [](Bytes v) { return _mm_srai_epi16(_mm_slli_epi16(reinterpret_cast<__m128i>(v), 8), 8); };
  const auto odd = [](Bytes v) { return _mm_srai_epi16(reinterpret_cast<__m128i>(v), 8); };
  const __m128i a = _mm_madd_epi16(even(first), even(second)), b = _mm_madd_epi16(odd(first), odd(second));
  return sums + reinterpret_cast<Ints>(a) + reinterpret_cast<Ints>(b);
#endif
}

// The same for all bytes; `first` as `as_stored` makes them, which adds `stored_offset`.
#if defined(CRAYON_DOT)
constexpr int stored_offset = unsigned_offset;
inline Ints dot_any(Ints sums, Bytes first, Bytes second) { return dot(sums, first, second); }
#elif defined(__aarch64__)
constexpr int stored_offset = 0;
inline Ints dot_any(Ints sums, Bytes first, Bytes second) {
  const int16x8_t low = vmull_s8(vget_low_s8(first), vget_low_s8(second)), high = vmull_high_s8(first, second);
  return sums + vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}
#else
constexpr int stored_offset = 0;
inline Ints dot_any(Ints sums, Bytes first, Bytes second) {
#if defined(__AVX512BW__)
  const auto even = [](Bytes v) { return _mm512_srai_epi16(_mm512_slli_epi16(reinterpret_cast<__m512i>(v), 8), 8); };
  const auto odd = [](Bytes v) { return _mm512_srai_epi16(reinterpret_cast<__m512i>(v), 8); };
  const auto multiply = [](__m512i a, __m512i b) { return reinterpret_cast<Ints>(_mm512_madd_epi16(a, b)); };
#elif defined(__AVX2__)
  const auto even = [](Bytes v) { return _mm256_srai_epi16(_mm256_slli_epi16(reinterpret_cast<__m256i>(v), 8), 8); };
  const auto odd = [](Bytes v) { return _mm256_srai_epi16(reinterpret_cast<__m256i>(v), 8); };
  const auto multiply = [](__m256i a, __m256i b) { return reinterpret_cast<Ints>(_mm256_madd_epi16(a, b)); };
#else
  const auto even = [](Bytes v) { return _mm_srai_epi16(_mm_slli_epi16(reinterpret_cast<__m128i>(v), 8), 8); };
  const auto odd = [](Bytes v) { return _mm_srai_epi16(reinterpret_cast<__m128i>(v), 8); };
  const auto multiply = [](__m128i a, __m128i b) { return reinterpret_cast<Ints>(_mm_madd_epi16(a, b)); };
#endif
  return sums + multiply(even(first), even(second)) + multiply(odd(first), odd(second));
}
#endif

// Four bytes a lane, from anywhere.
template <typename Byte>
inline Floats load_lanes(const Byte* p) {
  return reinterpret_cast<Floats>(load_bytes(reinterpret_cast<const int8_t*>(p)));
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// `count` scales, each for lanes / count lanes next to each other.
template <int count>
inline Floats spread_scales(const uint16_t* p) {
  if constexpr (count == 1) {
    return broadcast(from_bfloat16(*p));
  } else {
#if defined(__AVX512F__)
    // Lane i takes scale i * count / lanes: each 128 bits have all of them, and take the bytes that they want.
    static_assert(count == 2 || count == 4);
    __m512i all;
    if constexpr (count == 4) {
      int64_t four;
      __builtin_memcpy(&four, p, sizeof four);
      all = _mm512_set1_epi64(four);
    } else {
      int32_t two;
      __builtin_memcpy(&two, p, sizeof two);
      all = _mm512_set1_epi32(two);
    }
    constexpr int none = static_cast<int>(0x80808080);
    const auto pick = [](int scale) { return (none & 0xffff) | (2 * scale + 1) << 24 | (2 * scale) << 16; };
    const int a = pick(0), b = pick(count == 4 ? 1 : 0), c = pick(count == 4 ? 2 : 1), d = pick(count - 1);
    const __m512i order = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
    return reinterpret_cast<Floats>(_mm512_shuffle_epi8(all, order));
#elif defined(__AVX2__)
    static_assert(count == 2);
    int32_t two;
    __builtin_memcpy(&two, p, sizeof two);
    constexpr int none = static_cast<int>(0x80808080);
    const int a = (none & 0xffff) | 1 << 24 | 0 << 16, b = (none & 0xffff) | 3 << 24 | 2 << 16;
    const __m256i order = _mm256_setr_epi32(a, a, a, a, b, b, b, b);
    return reinterpret_cast<Floats>(_mm256_shuffle_epi8(_mm256_set1_epi32(two), order));
#else
    static_assert(count == 1);
    return Floats{};
#endif
  }
}

// Tokens

void measure(const float* x, int64_t width, float* scale, float* inverse_scale, int32_t* zero_point) {
  Floats low = {}, high = {};
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    const Floats v = load(x + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  float least = -largest_of(-low), most = largest_of(high);
  for (; i < width; ++i) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
  }
  const float factor = least == most ? 1.0f : 255.0f / (most - least);
  const float low_end = least * factor, high_end = most * factor;
  float zero = (-128.0f + low_end) + (127.0f + high_end) > 0.0f ? -128.0f - low_end : 127.0f - high_end;
  zero = zero > -128.0f ? zero : -128.0f;
  zero = zero < 127.0f ? zero : 127.0f;
  *scale = 1.0f / factor;
  *inverse_scale = factor;
  const float magic = 0x1.8p23f;  // rounds to nearest even
  *zero_point = static_cast<int32_t>((zero + magic) - magic);
}

void to_plain(const float* x, int64_t width, float inverse_scale, int32_t zero_point, int8_t* plain, int64_t padded,
              int32_t* sum) {
  // Rounded and then shifted, as XNNPACK does; `most` before, as it takes the smaller one first.
  const Floats factor = broadcast(inverse_scale), most = broadcast(127.0f - static_cast<float>(zero_point)),
               least = broadcast(-128.0f - static_cast<float>(zero_point)), magic = broadcast(0x1.8p23f);
  const Ints zero = broadcast_int(zero_point);
  typedef int8_t Narrow __attribute__((vector_size(lanes)));
  Ints total = {};
  int64_t i = 0;
  const auto round = [&](Floats v) {
    v = v * factor;
    v = v < most ? v : most;
    v = v > least ? v : least;
    return reinterpret_cast<Ints>(v + magic) - reinterpret_cast<Ints>(magic) + zero;
  };
  for (; i + lanes <= width; i += lanes) {
    const Ints q = round(load(x + i));
    total += q;
    const Narrow bytes = __builtin_convertvector(q, Narrow);
    __builtin_memcpy(plain + i, &bytes, sizeof bytes);
  }
  int32_t all = 0;
  for (int l = 0; l < lanes; ++l) all += total[l];
  for (; i < width; ++i) {
    const int32_t q = round(broadcast(x[i]))[0];
    plain[i] = static_cast<int8_t>(q);
    all += q;
  }
  for (; i < padded; ++i) plain[i] = 0;
  *sum = -stored_offset * all;
}

void to_pairs(const int8_t* plain, int64_t width, int8_t* pairs, int64_t padded, int32_t* lane_sums) {
  for (int64_t at = 0; at < padded; at += piece, pairs += piece, lane_sums += lanes) {
    const int64_t count = width - at < piece ? width - at : piece;
    if (count == piece) {
      // Even and odd bytes of words; a lane's four even and four odd bytes are eight elements next to each other.
      const Words a = reinterpret_cast<Words>(load_bytes(plain + at)),
                  b = reinterpret_cast<Words>(load_bytes(plain + at + vector_bytes));
      const Bytes first = reinterpret_cast<Bytes>(a), second = reinterpret_cast<Bytes>(b);
      store_bytes(pairs, CRAYON_PICK(vector_bytes, first, second, 2 * i));
      store_bytes(pairs + vector_bytes, CRAYON_PICK(vector_bytes, first, second, 2 * i + 1));
    } else {
      for (int64_t i = 0; i < vector_bytes; ++i) {
        pairs[i] = 2 * i < count ? plain[at + 2 * i] : 0;
        pairs[vector_bytes + i] = 2 * i + 1 < count ? plain[at + 2 * i + 1] : 0;
      }
    }
    const Bytes ones = Bytes{} + static_cast<int8_t>(1);
    const Ints sums = dot_small(dot_small(Ints{}, ones, load_bytes(pairs)), ones, load_bytes(pairs + vector_bytes));
    store_ints(lane_sums, sums * -8);
  }
}

// int4, one token

// Rows computed side by side where short vectors would wait for their sums. Long ones need not, and memory gives one
// stream faster than four: 22 GB/s against 16 to 18 on an EPYC.
constexpr int rows_at_once = vector_bytes >= 32 ? 1 : 4;
// Into the second-level cache: into the first one, prefetches are fewer at a time, and the same CPU gave 13 GB/s.
constexpr int64_t prefetched_ahead = 16 << 10;

template <int scales>  // in a vector
CRAYON_APART void add_rows(const uint8_t* const (&codes)[rows_at_once],
                           const uint16_t* const (&group_scales)[rows_at_once], const QuantizedTokens& x,
                           int64_t lanes_per_scale, Floats* to) {
  Floats total[rows_at_once] = {};
  const int64_t pieces = x.pairs_size / piece;
  for (int64_t p = 0; p < pieces; ++p) {
    const Bytes even = load_bytes(x.pairs + p * piece), odd = load_bytes(x.pairs + p * piece + vector_bytes);
    const Ints start = load_ints(x.lane_sums + p * piece_lanes);
    const int64_t scale = scales > 1 ? p * scales : p * piece_lanes / lanes_per_scale;
    CRAYON_UNROLL
    for (int r = 0; r < rows_at_once; ++r) {
      const uint8_t* at = codes[r] + p * vector_bytes;
      __builtin_prefetch(at + prefetched_ahead, 0, 2);
      const Bytes both = load_bytes(reinterpret_cast<const int8_t*>(at));
      Ints sums = dot_small(start, low_half(both), even);
      sums = dot_small(sums, high_half(both), odd);
      total[r] += to_floats(sums) * spread_scales<scales>(group_scales[r] + scale);
    }
  }
  for (int r = 0; r < rows_at_once; ++r) to[r] = total[r];
}

// The sums over groups of rows first.. of which `lanes` are wanted, or fewer at the end of the matrix.
inline Floats row_sums(const Int4Rows& w, const QuantizedTokens& x, int64_t first) {
  const int64_t bytes = w.width / 2, groups_of_row = w.width / w.group_size, lanes_per_scale = w.group_size / 8;
  Floats folded[lanes];
  for (int base = 0; base < lanes; base += rows_at_once) {
    const uint8_t* codes[rows_at_once];
    const uint16_t* scales[rows_at_once];
    for (int r = 0; r < rows_at_once; ++r) {
      const int64_t row = first + base + r;
      const bool last = row >= w.rows - 1;
      codes[r] = last ? w.last_codes : w.codes + row * bytes;
      scales[r] = last ? w.last_scales : w.scales + row * groups_of_row;
    }
    const int count = lanes_per_scale >= lanes ? 1 : static_cast<int>(lanes / lanes_per_scale);
    if (count == 1) {
      add_rows<1>(codes, scales, x, lanes_per_scale, folded + base);
#if defined(__AVX2__)
    } else if (count == 2) {
      add_rows<2>(codes, scales, x, lanes_per_scale, folded + base);
#endif
#if defined(__AVX512F__)
    } else {
      add_rows<4>(codes, scales, x, lanes_per_scale, folded + base);
#endif
    }
  }
  return sum_each(folded);
}

inline void store_some(float* to, Floats v, int64_t count) {
  if (count >= lanes) {
    store(to, v);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = v[i];
  }
}

inline Floats load_some(const float* from, int64_t count) {
  if (count >= lanes) return load(from);
  Floats v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

void int4_token(const Int4Rows& w, const QuantizedTokens& x, int64_t first, int64_t last, float* out) {
  const Floats scale = broadcast(x.scales[0]), zero = broadcast(static_cast<float>(x.zero_points[0]));
  for (int64_t row = first; row < last; row += lanes) {
    const Floats sums = row_sums(w, x, row);
    store_some(out + row, (sums - zero * load_some(w.offsets + row, last - row)) * scale, last - row);
  }
}

void int4_offsets(const Int4Rows& w, const QuantizedTokens& ones, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row += lanes) store_some(w.offsets + row, row_sums(w, ones, row), last - row);
}

// int4, many tokens

// Sums and totals of a tile, and a vector of weights, fit the registers.
#if defined(__AVX512F__)
constexpr int tile_tokens = 12;
#elif defined(__aarch64__)
constexpr int tile_tokens = 8;
#else
constexpr int tile_tokens = 4;
#endif
constexpr int64_t tile_place = 8 * tile_tokens;  // bytes of a tile for eight elements

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

void to_tile(const int8_t* pairs, int64_t width, int8_t* tile) {
  for (int64_t place = 0; place < width / 8; ++place, tile += tile_place) {
    const int8_t* from = pairs + place / lanes * piece + place % lanes * 4;
    __builtin_memcpy(tile, from, 4);
    __builtin_memcpy(tile + 4 * tile_tokens, from + vector_bytes, 4);
  }
}

size_t int4_workspace(int64_t width, int64_t group_size) {
  const int64_t codes = round_up(width / 8, lanes) * vector_bytes, scales = width / group_size * vector_bytes;
  return static_cast<size_t>(codes + scales + 64);
}

// A panel: eight elements of each of `lanes` rows, which lie in one lane, become one vector.
void transpose_panel(const Int4Rows& w, int64_t first, uint8_t* codes, float* scales) {
  const int64_t bytes = w.width / 2, groups_of_row = w.width / w.group_size, places = w.width / 8;
  const uint8_t* rows[lanes];
  for (int r = 0; r < lanes; ++r) {
    const int64_t row = first + r;
    rows[r] = row >= w.rows - 1 ? w.last_codes : w.codes + row * bytes;
    const uint16_t* from = row >= w.rows - 1 ? w.last_scales : w.scales + row * groups_of_row;
    for (int64_t g = 0; g < groups_of_row; ++g) scales[g * lanes + r] = from_bfloat16(from[g]);
  }
  for (int64_t place = 0; place < places; place += lanes) {
    Floats square[lanes];
    for (int r = 0; r < lanes; ++r) square[r] = load_lanes(rows[r] + 4 * place);
    transpose(square);
    float* to = reinterpret_cast<float*>(codes + place * vector_bytes);
    for (int r = 0; r < lanes; ++r) store(to + r * lanes, square[r]);
  }
}

// Adds the products of a vector of weights with every token's quadruple to that token's sums.
template <int tokens>
inline void add_quadruples(Ints (&sums)[tokens], Bytes weights, const int8_t* quadruples) {
#if defined(__ARM_FEATURE_DOTPROD)
  int8x16_t four[(tokens + 3) / 4];
  CRAYON_UNROLL
  for (int t = 0; t < tokens; t += 4) four[t / 4] = vld1q_s8(quadruples + 4 * t);
#define CRAYON_ADD(t) \
  if constexpr (t < tokens) sums[t] = vdotq_laneq_s32(sums[t], weights, four[t / 4], t % 4)
  CRAYON_ADD(0);
  CRAYON_ADD(1);
  CRAYON_ADD(2);
  CRAYON_ADD(3);
  CRAYON_ADD(4);
  CRAYON_ADD(5);
  CRAYON_ADD(6);
  CRAYON_ADD(7);
  static_assert(tokens <= 8);
#undef CRAYON_ADD
#else
  CRAYON_UNROLL
  for (int t = 0; t < tokens; ++t) sums[t] = dot_small(sums[t], weights, broadcast_bytes(quadruples + 4 * t));
#endif
}

// One panel and the first `tokens` of one tile.
template <int tokens>
CRAYON_APART void multiply_tile(const Int4Rows& w, const QuantizedTokens& x, int64_t tile, int64_t row, int64_t count,
                                const uint8_t* codes, const float* scales, float* out) {
  const int64_t groups_of_row = w.width / w.group_size, places = w.group_size / 8, token = tile * tile_tokens;
  const int8_t* quadruples = x.tiles + tile * (w.width / 8) * tile_place;
  const int32_t* group_sums = x.group_sums + tile * groups_of_row * tile_tokens;
  Floats total[tokens] = {};
  for (int64_t g = 0; g < groups_of_row; ++g, group_sums += tile_tokens) {
    Ints sums[tokens];
    CRAYON_UNROLL
    for (int t = 0; t < tokens; ++t) sums[t] = broadcast_int(group_sums[t]);
    for (int64_t place = 0; place < places; ++place, codes += vector_bytes, quadruples += tile_place) {
      const Bytes both = load_bytes(reinterpret_cast<const int8_t*>(codes));
      add_quadruples<tokens>(sums, low_half(both), quadruples);
      add_quadruples<tokens>(sums, high_half(both), quadruples + 4 * tile_tokens);
    }
    const Floats scale = load(scales + g * lanes);
    CRAYON_UNROLL
    for (int t = 0; t < tokens; ++t) total[t] += to_floats(sums[t]) * scale;
  }
  const Floats offsets = load_some(w.offsets + row, count);
  for (int t = 0; t < tokens; ++t) {
    const Floats zero = broadcast(static_cast<float>(x.zero_points[token + t]));
    store_some(out + (token + t) * w.rows + row, (total[t] - zero * offsets) * broadcast(x.scales[token + t]), count);
  }
}

template <int tokens>
void multiply_last_tile(const Int4Rows& w, const QuantizedTokens& x, int64_t tile, int64_t row, int64_t count,
                        const uint8_t* codes, const float* scales, float* out) {
  if constexpr (tokens > 0) {
    if (x.tokens - tile * tile_tokens == tokens) {
      multiply_tile<tokens>(w, x, tile, row, count, codes, scales, out);
    } else {
      multiply_last_tile<tokens - 1>(w, x, tile, row, count, codes, scales, out);
    }
  }
}

void int4_tokens(const Int4Rows& w, const QuantizedTokens& x, int64_t first, int64_t last, float* out,
                 void* workspace) {
  uint8_t* codes = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  float* scales = reinterpret_cast<float*>(codes + round_up(w.width / 8, lanes) * vector_bytes);
  for (int64_t row = first; row < last; row += lanes) {
    transpose_panel(w, row, codes, scales);
    const int64_t tiles = x.tokens / tile_tokens;
    for (int64_t t = 0; t < tiles; ++t) multiply_tile<tile_tokens>(w, x, t, row, last - row, codes, scales, out);
    multiply_last_tile<tile_tokens - 1>(w, x, tiles, row, last - row, codes, scales, out);
  }
}

// int8

inline Bytes as_stored(Bytes v) { return v ^ static_cast<int8_t>(stored_offset ? -128 : 0); }

// A block of `lanes` interleaved rows: their products with some tokens, `count` of which go to each row of `out`.
template <int tokens>
CRAYON_APART void multiply_block(const int8_t* codes, int64_t places, Floats scales, Ints row_sums,
                                 const QuantizedTokens& x, int64_t token, int64_t count, float* out, int64_t stride) {
  // One token alone would wait for its own sums.
  constexpr int parts = tokens == 1 ? 4 : 1;
  Ints sums[tokens][parts] = {};
  for (int t = 0; t < tokens; ++t) sums[t][0] = broadcast_int(x.plain_sums[token + t]);
  const auto add = [&](int64_t place, int part) {
    const Bytes weights = load_bytes(codes + place * vector_bytes);
    CRAYON_UNROLL
    for (int t = 0; t < tokens; ++t) {
      const Bytes bytes = broadcast_bytes(x.plain + (token + t) * x.plain_stride + 4 * place);
      sums[t][part] = dot_any(sums[t][part], weights, bytes);
    }
  };
  int64_t place = 0;
  for (; place + parts <= places; place += parts) {
    CRAYON_UNROLL
    for (int part = 0; part < parts; ++part) add(place + part, part);
  }
  for (; place < places; ++place) add(place, 0);
  for (int t = 0; t < tokens; ++t) {
    Ints all = sums[t][0];
    for (int part = 1; part < parts; ++part) all += sums[t][part];
    const Floats exact = to_floats(all - broadcast_int(x.zero_points[token + t]) * row_sums);
    store_some(out + (token + t) * stride, exact * scales * broadcast(x.scales[token + t]), count);
  }
}

void multiply_all(const int8_t* codes, int64_t places, const float* scales, const int32_t* sums,
                  const QuantizedTokens& x, int64_t count, float* out, int64_t stride) {
  constexpr int at_once = 8;
  const Floats factors = load(scales);
  const Ints row_sums = load_ints(sums);
  int64_t token = 0;
  for (; token + at_once <= x.tokens; token += at_once) {
    multiply_block<at_once>(codes, places, factors, row_sums, x, token, count, out, stride);
  }
  for (; token < x.tokens; ++token) multiply_block<1>(codes, places, factors, row_sums, x, token, count, out, stride);
}

void interleaved_tokens(const InterleavedRows& w, const QuantizedTokens& x, int64_t first, int64_t last, float* out) {
  const int64_t places = round_up(w.width, 4) / 4;
  for (int64_t row = first; row < last; row += lanes) {
    multiply_all(w.codes + row * 4 * places, places, w.scales + row, w.sums + row, x, last - row, out + row, w.rows);
  }
}

void interleave(const int8_t* codes, int64_t rows, int64_t width, int8_t* to, int32_t* sums) {
  const int64_t places = round_up(width, 4) / 4;
  for (int64_t base = 0; base < rows; base += lanes) {
    for (int l = 0; l < lanes; ++l) {
      const int64_t row = base + l;
      int32_t sum = 0;
      int8_t* at = to + base * places * 4 + 4 * l;
      for (int64_t k = 0; k < 4 * places; ++k) {
        const int8_t code = row < rows && k < width ? codes[row * width + k] : 0;
        sum += code;
        at[k / 4 * vector_bytes + k % 4] = static_cast<int8_t>(code ^ (stored_offset ? -128 : 0));
      }
      sums[row] = sum;
    }
  }
}

// Bytes beyond the end of a row are multiplied with zeros of the token.
void int8_token(const Int8Rows& w, const QuantizedTokens& x, int64_t first, int64_t last, float* out) {
  for (int64_t row = first; row < last; ++row) {
    const int8_t* codes = row == w.rows - 1 ? w.last_codes : w.codes + row * w.width;
    Ints sums[2] = {};
    int64_t at = 0;
    const auto add = [&](int part) {
      __builtin_prefetch(codes + at + prefetched_ahead, 0, 2);
      sums[part] = dot_any(sums[part], as_stored(load_bytes(codes + at)), load_bytes(x.plain + at));
      at += vector_bytes;
    };
    while (at + 2 * vector_bytes <= w.width) {
      add(0);
      add(1);
    }
    while (at < w.width) add(0);
    int32_t product = x.plain_sums[0] - x.zero_points[0] * w.sums[row];
    const Ints all = sums[0] + sums[1];
    for (int l = 0; l < lanes; ++l) product += all[l];
    out[row] = static_cast<float>(product) * w.scales[row] * x.scales[0];
  }
}

void int8_sums(const Int8Rows& w, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int8_t* codes = w.codes + row * w.width;
    int32_t sum = 0;
    for (int64_t i = 0; i < w.width; ++i) sum += codes[i];
    w.sums[row] = sum;
  }
}

size_t int8_workspace(int64_t width) { return static_cast<size_t>(round_up(width, 4 * lanes) * lanes + 64); }

void int8_tokens(const Int8Rows& w, const QuantizedTokens& x, int64_t first, int64_t last, float* out,
                 void* workspace) {
  int8_t* panel = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  const int64_t places = round_up(w.width, 4) / 4;
  for (int64_t row = first; row < last; row += lanes) {
    const int8_t* rows[lanes];
    float scales[lanes];
    int32_t sums[lanes];
    for (int r = 0; r < lanes; ++r) {
      const int64_t here = row + r < w.rows ? row + r : w.rows - 1;
      rows[r] = here == w.rows - 1 ? w.last_codes : w.codes + here * w.width;
      scales[r] = w.scales[here];
      sums[r] = w.sums[here];
    }
    for (int64_t place = 0; place < places; place += lanes) {
      Floats square[lanes];
      for (int r = 0; r < lanes; ++r) square[r] = load_lanes(rows[r] + 4 * place);
      transpose(square);
      for (int r = 0; r < lanes; ++r) {
        store_bytes(panel + (place + r) * vector_bytes, as_stored(reinterpret_cast<Bytes>(square[r])));
      }
    }
    multiply_all(panel, places, scales, sums, x, last - row, out + row, w.rows);
  }
}

}  // namespace

#define CRAYON_JOIN_(a, b) a##b
#define CRAYON_JOIN(a, b) CRAYON_JOIN_(a, b)
extern const LinearKernels CRAYON_JOIN(linear_, CRAYON_KERNELS) = {
    lanes,          measure,      to_plain,   to_pairs,    to_tile,        tile_tokens, int4_token,         int4_tokens,
    int4_workspace, int4_offsets, int8_token, int8_tokens, int8_workspace, int8_sums,   interleaved_tokens, interleave,
};

}  // namespace crayon
