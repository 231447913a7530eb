/* The C ABI of fastokd's CPU executor: flat, versioned, C types only.
 *
 * B rows, C classes, M logits rows, S weight sources, X external rows, T terms. A plan is the output of
 * `Plan.encode()` in fastokd/graph/plan.py. Functions return FASTOKD_OK or a status. None throws, and the only global
 * state is the thread pool. All functions may be called from several threads at once, and after fork().
 */
#ifndef FASTOKD_H
#define FASTOKD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Incremented with every change of a signature, a struct, a dtype code or the plan's encoding. */
#define FASTOKD_ABI_VERSION 2
#define FASTOKD_API __attribute__((visibility("default")))

enum {
  FASTOKD_OK = 0,
  FASTOKD_PLAN_VERSION = 1,   /* the plan was encoded by another version */
  FASTOKD_PLAN_LENGTH = 2,    /* the arrays are cut short, or longer than the plan */
  FASTOKD_PLAN_COUNT = 3,     /* a count is negative or too large, or there is no logits row or no term */
  FASTOKD_PLAN_NODE = 4,      /* a node's kind, inputs or weight source are invalid */
  FASTOKD_PLAN_TERM = 5,      /* a term's nodes or flags are invalid */
  FASTOKD_PLAN_NUMBER = 6,    /* a temperature, weight, eps or label smoothing is out of range */
  FASTOKD_ARGUMENT = 7,       /* a null pointer, a negative size, or a dtype that does not fit */
  FASTOKD_NO_MEMORY = 8,
  FASTOKD_UNKNOWN_ISA = 9     /* no such instruction set in this build, or not on this machine */
};

enum { FASTOKD_FLOAT32 = 0, FASTOKD_FLOAT64 = 1, FASTOKD_BFLOAT16 = 2, FASTOKD_FLOAT16 = 3, FASTOKD_INT64 = 4 };

/* A matrix: the address of its first element, and strides in elements. Its shape follows from the call. */
typedef struct {
  void *data;
  int64_t row_stride;
  int64_t column_stride;
  int32_t dtype;
  int32_t reserved;
} fastokd_tensor;

typedef struct fastokd_plan fastokd_plan;

FASTOKD_API int32_t fastokd_abi_version(void);

/* One sentence for a status; never NULL. */
FASTOKD_API const char *fastokd_status_message(int32_t status);

/* The name of the index-th instruction set of this build that this machine supports, best first; NULL at the end. */
FASTOKD_API const char *fastokd_isa(int32_t index);

/* Decode and check a plan. `isa` is a name of fastokd_isa, or NULL for the best. *plan is NULL unless FASTOKD_OK. */
FASTOKD_API int32_t fastokd_plan_create(const int64_t *ints, int64_t num_ints, const double *floats, int64_t num_floats,
                                        const char *isa, fastokd_plan **plan);
FASTOKD_API void fastokd_plan_destroy(fastokd_plan *plan);

/* Number of values per row that the forward pass keeps for the backward pass; 0 for NULL. */
FASTOKD_API int64_t fastokd_plan_num_stats(const fastokd_plan *plan);

/* tensors: M logits [B, C] of one dtype, S weights [B, K], X externals [B, C], then the target: int64 [B] or [B, C].
 * The compute type is double for float64 logits, else float. term_weights [B, T] are of that type, with a row stride of 0
 * if all rows share them; otherwise a term whose weight is 0 adds 0, even if its value is non-finite. rows [B],
 * terms [T, B] and stats [num_stats, B] are contiguous and of that type. A label out of range gives NaN in its row. */
FASTOKD_API int32_t fastokd_forward(const fastokd_plan *plan, int64_t batch, int64_t classes, const fastokd_tensor *tensors,
                                    const fastokd_tensor *term_weights, void *rows, void *terms, void *stats,
                                    int32_t num_threads);

/* grad_rows: [B] in the compute type, row_stride counts. grads: M + S contiguous matrices in the dtypes of the logits
 * and the weights, NULL where no gradient is needed. */
FASTOKD_API int32_t fastokd_backward(const fastokd_plan *plan, int64_t batch, int64_t classes, const fastokd_tensor *tensors,
                                     const fastokd_tensor *term_weights, const void *stats,
                                     const fastokd_tensor *grad_rows, void *const *grads, int32_t num_threads);

/* Forward and backward in one call, which reads the logits from memory only once. */
FASTOKD_API int32_t fastokd_forward_backward(const fastokd_plan *plan, int64_t batch, int64_t classes,
                                             const fastokd_tensor *tensors, const fastokd_tensor *term_weights, void *rows,
                                             void *terms, void *stats, const fastokd_tensor *grad_rows, void *const *grads,
                                             int32_t num_threads);

/* For tests of the stated error bounds: out[i] = exp (function 0) or log (1) of in[i], in float32 or float64. */
FASTOKD_API int32_t fastokd_math(const char *isa, int32_t function, int32_t dtype, const void *in, void *out, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
