/* crayon_native: runs ExecuTorch programs of language models without torch.
 *
 * Plain C, so that one library serves every Python version, Kotlin and Swift. No function throws, aborts or prints on
 * bad input: each returns a status, and fills `error` (which may be null) with what is wrong.
 *
 * A program is a file with methods, and its weights. A cache is one sequence of tokens: the memory that its keys and
 * values take. Methods of several programs can run over one cache in turn, a base model's and an adapter's, as long as
 * both plan this memory the same way. All functions may be called from any thread; they wait for each other where they
 * must, and one step computes at a time, on one pool of threads. A cache must not be used by two threads at once.
 */
#ifndef CRAYON_NATIVE_H
#define CRAYON_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define CRAYON_NATIVE_API __declspec(dllexport)
#else
#define CRAYON_NATIVE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a caller compiled for another number would go wrong. */
#define CRAYON_NATIVE_ABI 2

typedef enum crayon_native_status {
  CRAYON_NATIVE_OK = 0,
  CRAYON_NATIVE_BAD_ARGUMENT = 1, /* the caller's mistake: a null pointer, a token outside the vocabulary, no tokens */
  CRAYON_NATIVE_NO_FILE = 2,      /* a file is missing or cannot be read */
  CRAYON_NATIVE_BAD_PROGRAM = 3,  /* not a .pte, damaged, or with methods of another kind than a language model's */
  CRAYON_NATIVE_BAD_DATA = 4,     /* a .ptd that is damaged, or does not hold what the program asks for */
  CRAYON_NATIVE_NO_METHOD = 5,    /* the program has no method of this name */
  CRAYON_NATIVE_NO_OPERATOR = 6,  /* the program needs an operator or a delegate that this build has not */
  CRAYON_NATIVE_NO_MEMORY = 7,
  CRAYON_NATIVE_CACHE_FULL = 8, /* more tokens than the context length */
  CRAYON_NATIVE_FAILED = 9      /* ExecuTorch failed while it computed */
} crayon_native_status;

typedef struct crayon_native_error {
  int32_t status;
  int32_t executorch; /* ExecuTorch's own code, 0 where it was not the one that refused */
  char message[1016];
} crayon_native_error;

typedef struct crayon_native_options {
  size_t size;             /* sizeof(crayon_native_options), so that later fields can be told from garbage */
  const char* program;     /* a file, or what messages shall call `program_bytes` */
  const char* const* data; /* .ptd files; may be null */
  size_t data_count;
  const uint8_t* program_bytes; /* the program, if it is not in a file; copied. May be null */
  size_t program_size;
} crayon_native_options;

typedef struct crayon_native_program crayon_native_program;
typedef struct crayon_native_cache crayon_native_cache;

/* What a step returns: pointers into memory of the cache, good until its next step or its end. */
typedef struct crayon_native_step_result {
  const float* logits; /* of the last token: [vocab_size] */
  int64_t vocab_size;
  const float* tap_sum;  /* the tap's sum over the tokens of this step: [tap_size]; null if the method has no tap */
  const float* tap_last; /* the tap of the last token: [tap_size]; null if the method has no tap */
  int64_t tap_size;
} crayon_native_step_result;

CRAYON_NATIVE_API int32_t crayon_native_abi(void);
CRAYON_NATIVE_API const char* crayon_native_instruction_set(void);

/* Starts the process's one pool of threads; 0: as many as there are fast cores, and where there are slow ones too
 * (big.LITTLE) they stay on the fast ones. The first call decides; crayon_native_use starts it with 0 where nobody did.
 * A later call for another number changes it while no program is open, and is BAD_ARGUMENT otherwise. */
CRAYON_NATIVE_API int32_t crayon_native_start(int32_t threads, crayon_native_error* error);
CRAYON_NATIVE_API int32_t crayon_native_threads(void);

/* Maps the files; nothing is computed yet. Weights of linear layers in int4 groups are used where they lie, those of
 * adapters in int8 are copied, and what XNNPACK computes with it packs in memory. Programs whose weights have the same
 * names in their .ptd must have the same weights under them: what was computed of one of them serves all. */
CRAYON_NATIVE_API int32_t crayon_native_open(const crayon_native_options* options, crayon_native_program** program,
                                             crayon_native_error* error);
/* Caches that run the program go on working; its memory is freed with the last of them. */
CRAYON_NATIVE_API void crayon_native_close(crayon_native_program* program);

/* The names of the program's methods, one a line, into `names` (cut if `bytes` are too few). */
CRAYON_NATIVE_API int32_t crayon_native_methods(crayon_native_program* program, char* names, size_t bytes,
                                                crayon_native_error* error);

/* The integer that a constant method returns, such as get_max_context_len. */
CRAYON_NATIVE_API int32_t crayon_native_constant(crayon_native_program* program, const char* method, int64_t* value,
                                                 crayon_native_error* error);

/* Reserves the memory for keys and values that the program plans. It takes none before it is written. */
CRAYON_NATIVE_API int32_t crayon_native_new_cache(crayon_native_program* program, crayon_native_cache** cache,
                                                  crayon_native_error* error);
CRAYON_NATIVE_API void crayon_native_free_cache(crayon_native_cache* cache);

/* Chooses what the next steps run, and makes it ready the first time. What the cache holds stays. `program` may be
 * another than the cache was made for: BAD_PROGRAM if it plans keys and values otherwise. */
CRAYON_NATIVE_API int32_t crayon_native_use(crayon_native_cache* cache, crayon_native_program* program,
                                            const char* method, crayon_native_error* error);

/* Feeds `count` tokens from `position` on: a prefill, or with count 1 a decode. */
CRAYON_NATIVE_API int32_t crayon_native_step(crayon_native_cache* cache, const int64_t* tokens, int64_t count,
                                             int64_t position, crayon_native_step_result* result,
                                             crayon_native_error* error);

/* Records the time of every operator of the steps from here on; with a null path writes what was recorded to the path
 * of the call before, as an ETDump, and stops. Steps are slower meanwhile. */
CRAYON_NATIVE_API int32_t crayon_native_trace(crayon_native_cache* cache, const char* path, crayon_native_error* error);

#ifdef __cplusplus
}
#endif
#endif
