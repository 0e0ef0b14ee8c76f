// The part of attention that is compiled once for each instruction set.
#pragma once

#include "attention.h"
#include "instruction_set.h"

namespace crayon {

// One piece of work: the same query rows of some key-value heads, over a range of positions.
struct AttentionTask {
  const Attention* attention;
  int64_t first_head;  // of the key-value heads
  int64_t heads;
  int64_t first_row;  // row of a head = token * group + (query head within the group)
  int64_t rows;       // of each head; heads * rows is at most `rows_per_task`
  int64_t first_position;
  int64_t last_position;  // exclusive
  // Null: the result is complete and goes to attention->output. Else the unfinished result of this range goes here:
  // weighted sums [heads, rows, head_size], the largest score and the sum of weights of every row, scores in units of
  // log2.
  float* partial_sums;
  float* partial_largest;
  float* partial_weights;
};

constexpr int64_t rows_per_task = 32;

struct AttentionKernels {
  void (*attend)(const AttentionTask& task);
  void (*to_half)(const float* from, uint16_t* to, int64_t count);
  float (*to_int8)(const float* from, int8_t* to, int64_t count);  // returns the scale
  float (*exp2)(float x);
};

extern const AttentionKernels CRAYON_EACH(attention_);

}  // namespace crayon
