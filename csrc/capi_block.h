/* The part of the C ABI that serves a transformer block on a CPU; statuses and dtypes as in capi.h.
 *
 * Matrices are rows of `features` elements side by side; strides count elements from row to row and may be 0 or
 * negative of what is only read. Pointers need the alignment of their element type. Everything is computed in float32;
 * sums over rows are made of the sums of VJEPA_SUM_ROWS rows at a time, and no result depends on `threads`. All checks
 * come before the first write.
 */
#ifndef VJEPA_CAPI_BLOCK_H
#define VJEPA_CAPI_BLOCK_H

#include "capi.h"

/* Rows that are summed together before their sum is added to others: the order of a sum depends on it. */
#define VJEPA_SUM_ROWS 32

#ifdef __cplusplus
extern "C" {
#endif

/* active = gelu(hidden), [count] elements of `dtype`; `active` may be `hidden`. `kept`, if not null, gets what `hidden`
 * was. */
VJEPA_API int32_t vjepa_gelu_cpu(const void *hidden, int64_t count, int32_t dtype, void *active, void *kept,
                                 int32_t threads);

/* dhidden = grad gelu'(hidden), rounded to `dtype` like all matrices: grad [rows, features] without gaps, which dhidden
 * may be; hidden with a stride of its own. If not null: active [rows, features] = gelu(hidden), and sums
 * [ceil(rows / VJEPA_SUM_ROWS), features], the sums of each VJEPA_SUM_ROWS rows of dhidden as rounded. */
VJEPA_API int32_t vjepa_gelu_backward_cpu(const void *grad, const void *hidden, int64_t hidden_stride, int64_t rows,
                                          int64_t features, int32_t dtype, void *dhidden, void *active, float *sums,
                                          int32_t threads);

/* sums[j] = the sum of column j, for a matrix of `dtype`. */
VJEPA_API int32_t vjepa_column_sums_cpu(const void *matrix, int64_t stride, int64_t rows, int64_t features,
                                        int32_t dtype, float *sums, int32_t threads);

/* A matrix that is read, with its own dtype and stride; data null: it is not there. */
typedef struct vjepa_matrix {
  const void *data;
  int64_t stride;
  int64_t dtype;
} vjepa_matrix;

/* added = residual + branch, rounded to the dtype of residual, [rows, features] without gaps; null if and only if there
 * is no branch. normed = (added - mean) rstd weight + bias, in normed_dtype; statistics [rows, 2] = mean and rstd of
 * each row, rstd = 1 / sqrt(variance + eps). weight and bias [features] may be null, for 1 and 0. */
VJEPA_API int32_t vjepa_layer_norm_cpu(const vjepa_matrix *residual, const vjepa_matrix *branch, const float *weight,
                                       const float *bias, int64_t rows, int64_t features, double eps, void *added,
                                       void *normed, int32_t normed_dtype, float *statistics, int32_t threads);

/* The gradient of what was normalised, grad_sum (which may be absent, and has the dtype of added) + rstd (g - mean(g) -
 * h mean(g h)) with g = grad_normed weight and h = (added - mean) rstd, to dresidual in the dtype of added and to
 * dbranch in branch_dtype; the sums over all rows of grad_normed h and of grad_normed to dweight and dbias [features].
 * Each of the four may be null. */
VJEPA_API int32_t vjepa_layer_norm_backward_cpu(const vjepa_matrix *grad_sum, const vjepa_matrix *grad_normed,
                                                const vjepa_matrix *added, const float *statistics, const float *weight,
                                                int64_t rows, int64_t features, void *dresidual, void *dbranch,
                                                int32_t branch_dtype, float *dweight, float *dbias, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
