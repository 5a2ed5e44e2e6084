/* The C ABI of libvjepa_native: raw pointers, sizes, a stream, a thread count. No PyTorch, no Python.
 *
 * Every function returns a vjepa_status; nothing throws, nothing allocates memory that the caller must free. Pointers
 * are borrowed for the duration of the call (CPU) or until the stream has passed the launch (CUDA).
 * kernels/_native.py mirrors the structures and prototypes of this file; VJEPA_ABI_VERSION changes whenever they do.
 */
#ifndef VJEPA_CAPI_H
#define VJEPA_CAPI_H

#include <stdint.h>

#if defined(_WIN32)
#define VJEPA_API __declspec(dllexport)
#else
#define VJEPA_API __attribute__((visibility("default")))
#endif

#define VJEPA_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum vjepa_status {
  VJEPA_OK = 0,
  VJEPA_ERROR_NULL_POINTER = 1,
  VJEPA_ERROR_NEGATIVE_SIZE = 2,
  VJEPA_ERROR_DTYPE = 3,
  VJEPA_ERROR_ALIGNMENT = 4,
  VJEPA_ERROR_THREADS = 5,
  VJEPA_ERROR_CAPACITY = 6,
  VJEPA_ERROR_MOMENTUM = 7,
  VJEPA_ERROR_NO_CUDA = 8, /* the library was built without its CUDA part */
  VJEPA_ERROR_CUDA = 9     /* the CUDA runtime refused; vjepa_cuda_error() says what */
} vjepa_status;

typedef enum vjepa_dtype { VJEPA_NONE = -1, VJEPA_FLOAT32 = 0, VJEPA_BFLOAT16 = 1, VJEPA_FLOAT16 = 2 } vjepa_dtype;

/* One tensor of an EMA update. Pointers need the alignment of their element type only. */
typedef struct vjepa_ema_tensor {
  float *target;        /* [numel] float32, read and written */
  const void *source;   /* [numel] source_dtype, read */
  void *copy;           /* [numel] copy_dtype, written with the rounded new target; null if copy_dtype is VJEPA_NONE */
  int64_t numel;        /* elements, >= 0 */
  int32_t source_dtype; /* VJEPA_FLOAT32, VJEPA_BFLOAT16 or VJEPA_FLOAT16 */
  int32_t copy_dtype;   /* VJEPA_NONE, VJEPA_BFLOAT16 or VJEPA_FLOAT16 */
} vjepa_ema_tensor;

/* A piece of one tensor: the unit of work of one CUDA block. */
typedef struct vjepa_chunk {
  int64_t tensor; /* row of the tensor table */
  int64_t begin;  /* first element */
  int64_t end;    /* one past the last element */
  int64_t packed; /* 1 if every pointer of the tensor is aligned for four elements at a time, else 0 */
} vjepa_chunk;

VJEPA_API int32_t vjepa_abi_version(void);

/* Compiler, CUDA version, architectures, instruction sets, as one line of JSON; never a date. */
VJEPA_API const char *vjepa_build_info(void);

/* The sentence for a vjepa_status. */
VJEPA_API const char *vjepa_status_string(int32_t status);

/* The CUDA runtime's words for this thread's last VJEPA_ERROR_CUDA; "" if there was none. */
VJEPA_API const char *vjepa_cuda_error(void);

/* target <- momentum * target + (1 - momentum) * source, in float32, for `count` tensors in host memory; the new
 * targets, rounded to nearest even, also go to the copies. The result does not depend on `threads` (>= 1). */
VJEPA_API int32_t vjepa_ema_cpu(const vjepa_ema_tensor *tensors, int64_t count, double momentum, int32_t threads);

/* Splits `count` tensors into chunks of at most `chunk_elements` (a positive multiple of 4), in order. Writes the
 * number of chunks to *num_chunks and, if `chunks` is not null, the chunks themselves (capacity: how many fit). */
VJEPA_API int32_t vjepa_ema_plan(const vjepa_ema_tensor *tensors, int64_t count, int64_t chunk_elements,
                                 vjepa_chunk *chunks, int64_t capacity, int64_t *num_chunks);

/* The same update on a GPU, in one launch: `tensors` and `chunks` (made by vjepa_ema_plan) lie in the memory of CUDA
 * device `device`, as do all tensors; `stream` is a cudaStream_t. Asynchronous. */
VJEPA_API int32_t vjepa_ema_cuda(const vjepa_ema_tensor *tensors, const vjepa_chunk *chunks, int64_t num_chunks,
                                 double momentum, int32_t device, void *stream);

/* What vjepa_ema_cuda does, executed on the host: every block and every thread of its grid in turn, through the same
 * device code. For tests. */
VJEPA_API int32_t vjepa_ema_cuda_on_host(const vjepa_ema_tensor *tensors, const vjepa_chunk *chunks, int64_t num_chunks,
                                         double momentum);

#ifdef __cplusplus
}
#endif

#endif
