/* The part of the C ABI that serves matrix products of float32 on a CPU with tiles (AMX); statuses as in capi.h.
 *
 * Each float32 is the sum of three bfloat16, x = x0 + x1 + x2, and a product of two is that of six pairs of them,
 * summed in float32: x0 y0 + x0 y1 + x1 y0 + x1 y1 + x0 y2 + x2 y0. What is left out is below 2^-24 of the product, and
 * there are fewer roundings than in a chain of float32. Infinities and NaN among the operands come out as float32's
 * own product gives them. Finite numbers whose product or sum exceeds the largest number, or comes within 2^-7 of it,
 * make infinity or NaN. What is below the smallest normal number counts as 0, and so do parts and products that are:
 * numbers below 2^-102 lose their last bits. Sums are made in an order that depends on `depth` alone; no result depends
 * on `threads`.
 */
#ifndef VJEPA_CAPI_PRODUCT_H
#define VJEPA_CAPI_PRODUCT_H

#include "capi.h"

#define VJEPA_TILES 1             /* AMX, which the system lets this process use */
#define VJEPA_TILES_IN_SOFTWARE 2 /* the same numbers, much slower, with AVX-512: for tests */

#ifdef __cplusplus
extern "C" {
#endif

/* A matrix that is read; strides count elements. One of the two is 1, unless there is one row or column only. */
typedef struct vjepa_operand {
  const float *data;
  int64_t row_stride;
  int64_t column_stride;
} vjepa_operand;

/* out [rows, columns] = a [rows, depth] b [depth, columns] + bias; out must not overlap with what is read. */
typedef struct vjepa_product {
  vjepa_operand a;
  vjepa_operand b;
  const float *bias; /* [columns] or null */
  float *out;
  int64_t out_stride; /* from row to row, at least `columns` */
  int64_t rows;
  int64_t columns;
  int64_t depth;
  int64_t accumulate;   /* not 0: out is added to what it holds */
  int64_t instructions; /* VJEPA_TILES or VJEPA_TILES_IN_SOFTWARE */
} vjepa_product;

/* Those of VJEPA_TILES and VJEPA_TILES_IN_SOFTWARE that can be asked for here; asks the system for leave to use tiles.
 */
VJEPA_API int32_t vjepa_product_instructions(void);

/* All checks come before the first write. The memory of the largest products' parts, at most 10 MB and 0.6 MB for each
 * thread, is kept for the next. */
VJEPA_API int32_t vjepa_product_cpu(const vjepa_product *product, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
