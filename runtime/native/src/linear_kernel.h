// The part of linear layers that is compiled once for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "instruction_set.h"

namespace crayon {

// Tokens whose elements were rounded to int8: x = scale * (q - zero point).
struct QuantizedTokens {
  int64_t tokens = 0, width = 0;
  const float* scales = nullptr;         // [tokens]
  const int32_t* zero_points = nullptr;  // [tokens]

  // For int4 weights and one token, in whole pieces of 2 * vector_bytes elements, the last one filled up with zeros: of
  // each piece first the even elements, then the odd ones, as int4 weights lie in their bytes.
  const int8_t* pairs = nullptr;
  int64_t pairs_size = 0;
  // -8 times the sum of every eight elements (a lane of `pairs`): weights are stored with 8 added. [pairs_size / 8]
  const int32_t* lane_sums = nullptr;

  // For int4 weights and more tokens, in tiles of `tile_tokens`: for every eight elements the four even ones of each
  // token, then the four odd ones. [tiles, width / 8, 2, tile_tokens, 4]
  const int8_t* tiles = nullptr;
  // The lane sums over the groups of the weights. [tiles, groups, tile_tokens]
  const int32_t* group_sums = nullptr;

  // For int8 weights, in order, filled up to a multiple of four with zeros. null: there are none.
  const int8_t* plain = nullptr;  // [tokens, plain_stride]
  int64_t plain_stride = 0;
  const int32_t* plain_sums = nullptr;  // [tokens]: what a sum of products starts from
};

// Rows of int4 weights as they lie in a file: two in a byte, the even element in its lower half, each with 8 added; one
// bfloat16 scale for a group.
struct Int4Rows {
  const uint8_t* codes = nullptr;    // [rows, width / 2]
  const uint16_t* scales = nullptr;  // [rows, width / group_size]
  // The last row, for reading beyond its end.
  const uint8_t* last_codes = nullptr;
  const uint16_t* last_scales = nullptr;
  float* offsets = nullptr;  // [rows]: the sum of the row's weights
  int64_t rows = 0, width = 0, group_size = 0;
};

// Rows of int8 weights as they lie in a file, with one scale each.
struct Int8Rows {
  const int8_t* codes = nullptr;       // [rows, width]
  const float* scales = nullptr;       // [rows]
  const int8_t* last_codes = nullptr;  // the last row, for reading beyond its end
  int32_t* sums = nullptr;             // [rows]: of the row's codes
  int64_t rows = 0, width = 0;
};

// The same for few rows or narrow ones, interleaved: of as many rows as a vector has lanes, four elements of each in
// turn.
struct InterleavedRows {
  const int8_t* codes = nullptr;  // [rows / lanes, width / 4, lanes, 4], filled up with zeros
  const float* scales = nullptr;  // [rows], filled up with zeros to a multiple of lanes
  const int32_t* sums = nullptr;  // [rows]: of the row's codes, filled up likewise
  int64_t rows = 0, width = 0;
};

struct LinearKernels {
  int lanes;
  // The scale and zero point of a token: XNNPACK's rule (xnn_f32_qd8_asymmetric_quantization_params).
  void (*measure)(const float* x, int64_t width, float* scale, float* inverse_scale, int32_t* zero_point);
  void (*to_plain)(const float* x, int64_t width, float inverse_scale, int32_t zero_point, int8_t* plain,
                   int64_t padded, int32_t* sum);
  void (*to_pairs)(const int8_t* plain, int64_t width, int8_t* pairs, int64_t padded, int32_t* lane_sums);
  // Puts a token's pairs into its place of a tile.
  void (*to_tile)(const int8_t* pairs, int64_t width, int8_t* tile);
  int64_t tile_tokens;

  // Rows `first`.. up to `last` of the output [tokens, rows] of which `out` is the beginning.
  void (*int4_token)(const Int4Rows& weights, const QuantizedTokens& x, int64_t first, int64_t last, float* out);
  // The same for many tokens. `workspace`: `int4_workspace` bytes.
  void (*int4_tokens)(const Int4Rows& weights, const QuantizedTokens& x, int64_t first, int64_t last, float* out,
                      void* workspace);
  size_t (*int4_workspace)(int64_t width, int64_t group_size);
  void (*int4_offsets)(const Int4Rows& weights, const QuantizedTokens& ones, int64_t first, int64_t last);

  void (*int8_token)(const Int8Rows& weights, const QuantizedTokens& x, int64_t first, int64_t last, float* out);
  void (*int8_tokens)(const Int8Rows& weights, const QuantizedTokens& x, int64_t first, int64_t last, float* out,
                      void* workspace);
  size_t (*int8_workspace)(int64_t width);
  void (*int8_sums)(const Int8Rows& weights, int64_t first, int64_t last);

  void (*interleaved_tokens)(const InterleavedRows& weights, const QuantizedTokens& x, int64_t first, int64_t last,
                             float* out);
  // From [rows, width] to the form of InterleavedRows.
  void (*interleave)(const int8_t* codes, int64_t rows, int64_t width, int8_t* to, int32_t* sums);
};

extern const LinearKernels CRAYON_EACH(linear_);

}  // namespace crayon
