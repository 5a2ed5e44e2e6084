/* The part of the C ABI that serves attention on a CPU; statuses and dtypes as in capi.h.
 *
 * Packed sequences: those of the queries and those of the keys follow one another without gaps, the queries of sequence
 * s see its keys alone. What is returned depends neither on `threads` nor on how often it is computed.
 */
#ifndef VJEPA_CAPI_ATTENTION_H
#define VJEPA_CAPI_ATTENTION_H

#include "capi.h"

#define VJEPA_ATTENTION_HEAD_DIM 256 /* the widest head */
#define VJEPA_AVX512 1               /* AVX-512 F, BW, DQ and VL: products in float32 */
#define VJEPA_AVX512_BF16 2          /* and products of bfloat16, summed in float32 */
#define VJEPA_AMX_BF16 4             /* those by tiles, and products of float32 as of three bfloat16 for each */
#define VJEPA_AMX_IN_SOFTWARE 8 /* the same numbers, slowly, for tests: not told of, there with VJEPA_AVX512_BF16 */

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vjepa_attention {
  const int64_t *lengths;    /* [sequences] queries of each */
  const int64_t *kv_lengths; /* [sequences] keys of each, at least one where there are queries */
  int64_t sequences;
  int64_t tokens;    /* the sum of lengths */
  int64_t kv_tokens; /* the sum of kv_lengths */
  int64_t heads;
  int64_t head_dim;     /* 1 to VJEPA_ATTENTION_HEAD_DIM */
  int64_t dtype;        /* of all tensors, VJEPA_FLOAT32 or VJEPA_BFLOAT16 */
  int64_t instructions; /* of vjepa_attention_instructions(), those to be used */
  double scale;         /* positive and finite */
} vjepa_attention;

/* A tensor [tokens or kv_tokens, heads, head_dim], the features of a head side by side; strides count elements. */
typedef struct vjepa_heads {
  const void *data;
  int64_t token_stride;
  int64_t head_stride;
} vjepa_heads;

/* Those of VJEPA_AVX512 and the following that this processor has and this library was built for; 0: none. */
VJEPA_API int32_t vjepa_attention_instructions(void);

/* out [tokens, heads, head_dim] = softmax(scale q k^T) v inside each sequence, in the dtype of the tensors, and its
 * log-sum-exp, lse [heads, tokens]; `given` are q, k and v. */
VJEPA_API int32_t vjepa_attention_cpu(const vjepa_attention *attention, const vjepa_heads *given, void *out, float *lse,
                                      int32_t threads);

/* Its gradients, contiguous like out, in the dtype of the tensors; `given` are q, k, v, out and the gradient of out. */
VJEPA_API int32_t vjepa_attention_backward_cpu(const vjepa_attention *attention, const vjepa_heads *given,
                                               const float *lse, void *grad_q, void *grad_k, void *grad_v,
                                               int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
