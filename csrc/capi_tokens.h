/* The part of the C ABI that serves the token operators on a CPU; statuses and dtypes as in capi.h.
 *
 * Sets of tokens: `indices` [total], `offsets` [sets + 1] into them, `clips` [sets]. Every index must lie in
 * 0..length-1 and every clip in 0..batch-1, or VJEPA_ERROR_INDEX is returned before anything is written. Rows are
 * `features` elements side by side; strides count elements. Results do not depend on `threads`.
 */
#ifndef VJEPA_CAPI_TOKENS_H
#define VJEPA_CAPI_TOKENS_H

#include "capi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vjepa_sets {
  const int64_t *indices;
  const int32_t *offsets;
  const int64_t *clips;
  int64_t total;
  int64_t sets;
  int64_t batch;
  int64_t length;
} vjepa_sets;

/* Where the rows of a [batch, length, features] table lie. */
typedef struct vjepa_rows {
  const void *data;
  int64_t clip_stride;
  int64_t token_stride;
  int32_t dtype;
} vjepa_rows;

/* Context and target sets that the predictor sees together, set by set: [sets + 1] offsets each, ids in 0..length-1. */
typedef struct vjepa_halves {
  const int64_t *context_indices;
  const int32_t *context_offsets;
  const int64_t *target_indices;
  const int32_t *target_offsets;
  const int64_t *kind; /* [sets]; set s uses the mask token kind mod kinds */
  int64_t sets;
  int64_t kinds;
  int64_t length;
} vjepa_halves;

/* out[i] = the row of table that token i names; [total, features], dtype of table. */
VJEPA_API int32_t vjepa_gather_cpu(const vjepa_sets *sets, const vjepa_rows *table, int64_t features, void *out,
                                   int32_t threads);

/* out [batch, length, features] = the sum of the rows of values [total, features] that name a token, in their order, in
 * float32; dtype and row stride of values as given. */
VJEPA_API int32_t vjepa_sum_named_cpu(const vjepa_sets *sets, const void *values, int64_t stride, int32_t dtype,
                                      int64_t features, void *out, int32_t threads);

/* out [batch, length, features] = the last row of values that names a token, `fill` [features] where none does. */
VJEPA_API int32_t vjepa_scatter_cpu(const vjepa_sets *sets, const void *values, int64_t stride, const void *fill,
                                    int32_t dtype, int64_t features, void *out, int32_t threads);

/* Its adjoint: grad_values [total, features], zero where a later row named the same token, and unless it is null
 * grad_fill [features], the float32 sum of the rows that nobody named. */
VJEPA_API int32_t vjepa_scatter_backward_cpu(const vjepa_sets *sets, const vjepa_rows *grad, int64_t features,
                                             void *grad_values, float *grad_fill, int32_t threads);

/* distances[i] = mean |prediction_i - layer_norm(named row of table)|, [total]; statistics [total, 2]: mean and rstd.
 */
VJEPA_API int32_t vjepa_l1_cpu(const vjepa_sets *sets, const vjepa_rows *table, const void *prediction, int64_t stride,
                               int32_t dtype, int64_t features, double eps, float *distances, float *statistics,
                               int32_t threads);

/* grad [total, features] = sign(prediction - layer_norm(row)) * shares[i] / features, dtype of prediction. */
VJEPA_API int32_t vjepa_l1_backward_cpu(const vjepa_sets *sets, const vjepa_rows *table, const void *prediction,
                                        int64_t stride, int32_t dtype, int64_t features, const float *statistics,
                                        const float *shares, void *grad, int32_t threads);

/* out = per set its context tokens [features], then its mask token for each target token, all plus their positions;
 * with the ids and offsets of what is packed so. mask_tokens [kinds, features], positions and out are in `others`,
 * which is float32 or the dtype of context. */
VJEPA_API int32_t vjepa_predictor_tokens_cpu(const vjepa_halves *halves, const void *context, int64_t context_stride,
                                             int32_t dtype, const void *mask_tokens, const void *positions,
                                             int64_t position_stride, int32_t others, int64_t features, void *out,
                                             int64_t *out_indices, int32_t *out_offsets, int32_t threads);

/* Its adjoint for context (in dtype) and mask tokens (float32), of grad in `others`; either may be null. */
VJEPA_API int32_t vjepa_predictor_tokens_backward_cpu(const vjepa_halves *halves, const void *grad, int64_t grad_stride,
                                                      int32_t others, int64_t features, void *grad_context,
                                                      int32_t dtype, float *grad_mask_tokens, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
