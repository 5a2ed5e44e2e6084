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

#define VJEPA_ABI_VERSION 5
#define VJEPA_MAXIMUM_GROUPS 32 /* of a CUDA launch: 2 KiB of the 4 KiB of a kernel's arguments */

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
  VJEPA_ERROR_MOMENTUM = 6,
  VJEPA_ERROR_NO_CUDA = 7, /* the library was built without its CUDA part */
  VJEPA_ERROR_CUDA = 8,    /* the CUDA runtime refused; vjepa_cuda_error() says what */
  VJEPA_ERROR_OVERLAP = 9,
  VJEPA_ERROR_GROUP = 10,
  VJEPA_ERROR_INDEX = 11, /* a token or a clip does not exist, or lengths are not those of the tokens */
  VJEPA_ERROR_SCALE = 12,
  VJEPA_ERROR_INSTRUCTIONS = 13, /* asked for what vjepa_attention_instructions() or the like does not tell */
  VJEPA_ERROR_MEMORY = 14,
  VJEPA_ERROR_STRIDES = 15
} vjepa_status;

typedef enum vjepa_dtype { VJEPA_NONE = -1, VJEPA_FLOAT32 = 0, VJEPA_BFLOAT16 = 1, VJEPA_FLOAT16 = 2 } vjepa_dtype;

/* The rows of tables of tensors: 64-bit words only, so that a caller writes a table as one array of integers. Pointers
 * need the alignment of their element type only. What is written must overlap with nothing else in the table. */

/* One tensor of an EMA update. */
typedef struct vjepa_ema_tensor {
  float *target;        /* [numel] float32, read and written */
  const void *source;   /* [numel] source_dtype, read */
  void *copy;           /* [numel] copy_dtype, written with the rounded new target; null if copy_dtype is VJEPA_NONE */
  int64_t numel;        /* elements, >= 0 */
  int64_t source_dtype; /* VJEPA_FLOAT32, VJEPA_BFLOAT16 or VJEPA_FLOAT16 */
  int64_t copy_dtype;   /* VJEPA_NONE, VJEPA_BFLOAT16 or VJEPA_FLOAT16 */
} vjepa_ema_tensor;

/* One parameter of an optimizer step, with all that belongs to it. */
typedef struct vjepa_adamw_tensor {
  float *param; /* [numel] float32, read and written, as are exp_avg, exp_avg_sq and shadow */
  const void
      *grad; /* [numel] grad_dtype, read; null: param, moments (which may be null too) and step stay as they are */
  float *exp_avg;
  float *exp_avg_sq;
  float *shadow;      /* the moving average of the parameter, or null */
  void *param_copy;   /* [numel] copy_dtype, written with the rounded parameter; null if copy_dtype is VJEPA_NONE */
  void *shadow_copy;  /* the same of the shadow; null if there is none */
  float *step;        /* null, or how many steps were done before; read when the work is done, not the group's */
  int64_t numel;      /* elements, >= 0 */
  int64_t grad_dtype; /* VJEPA_FLOAT32, VJEPA_BFLOAT16 or VJEPA_FLOAT16 */
  int64_t copy_dtype; /* VJEPA_NONE, VJEPA_BFLOAT16 or VJEPA_FLOAT16 */
  int64_t group;      /* index of the group whose numbers it takes */
} vjepa_adamw_tensor;

/* Numbers that parameters share. */
typedef struct vjepa_adamw_group {
  double lr;    /* >= 0 */
  double beta1; /* 0 <= beta < 1 */
  double beta2;
  double eps;               /* >= 0 */
  double weight_decay;      /* >= 0 */
  int64_t step;             /* how many steps were done before, of tensors that do not say; >= 0 */
  const float *lr_address;  /* null, or where to read lr when the work is done, in memory of the tensors' device */
  const float *grad_factor; /* null, or where to read what gradients are multiplied by: unscaling times clipping */
} vjepa_adamw_group;

/* Where to read numbers of the whole step when the work is done, in memory of the tensors' device; each may be null. */
typedef struct vjepa_adamw_scalars {
  const float *found_inf; /* not 0: parameters, moments and param copies stay; shadows still follow */
  const double *momentum; /* of the shadows, instead of the argument, and not checked */
} vjepa_adamw_scalars;

/* How the tensors of a table are divided among the blocks of a CUDA launch: each into chunks of at most `elements`. */
typedef struct vjepa_grid {
  const int64_t *first_chunks; /* [count + 1] chunks of all tensors before each, and of all, where the tensors are */
  int64_t count;               /* tensors */
  int64_t num_chunks;          /* first_chunks[count], the blocks of the launch */
  int64_t elements;            /* a positive multiple of 4 */
} vjepa_grid;

VJEPA_API int32_t vjepa_abi_version(void);

/* Compiler, CUDA version, architectures, instruction sets, as one line of JSON; never a date. */
VJEPA_API const char *vjepa_build_info(void);

/* The sentence for a vjepa_status. */
VJEPA_API const char *vjepa_status_string(int32_t status);

/* The CUDA runtime's words for this thread's last VJEPA_ERROR_CUDA; "" if there was none. */
VJEPA_API const char *vjepa_cuda_error(void);

/* The threads of the CPU functions are from now on those of an OpenMP runtime, `gomp_parallel` being its function
 * void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned); null: threads of their own, as at first. For the
 * whole process; a child made by fork must set null, because no threads live on there. */
VJEPA_API int32_t vjepa_set_team(void *gomp_parallel);

/* Whether tensors can be updated as they are, of a table in host memory that may speak of another memory: what the
 * functions below cannot see for themselves, or would have to look for at each update. */
VJEPA_API int32_t vjepa_ema_check(const vjepa_ema_tensor *tensors, int64_t count);

/* target <- momentum * target + (1 - momentum) * source, in float32, for `count` tensors in host memory, which were
 * checked; the new targets, rounded to nearest even, also go to the copies. The result does not depend on `threads`
 * (>= 1). */
VJEPA_API int32_t vjepa_ema_cpu(const vjepa_ema_tensor *tensors, int64_t count, double momentum, int32_t threads);

/* The same update on a GPU, in one launch: `tensors`, which were checked, and the grid's first_chunks lie in the memory
 * of CUDA device `device`, as do all tensors; `stream` is a cudaStream_t. If `momentum_on_device` is not null, the
 * momentum is read from there when the launch runs, and not checked. Asynchronous. */
VJEPA_API int32_t vjepa_ema_cuda(const vjepa_ema_tensor *tensors, const vjepa_grid *grid, double momentum,
                                 const double *momentum_on_device, int32_t device, void *stream);

/* What vjepa_ema_cuda does, executed on the host: every block and every thread of its grid in turn, through the same
 * device code. For tests. */
VJEPA_API int32_t vjepa_ema_cuda_on_host(const vjepa_ema_tensor *tensors, const vjepa_grid *grid, double momentum,
                                         const double *momentum_on_device);

/* Writes `count` words from host memory, read before it returns, to the memory of CUDA device `device`, in the order of
 * `stream`. The words travel as arguments of launches: nothing waits, and a CUDA graph can capture it. */
VJEPA_API int32_t vjepa_write_cuda(int64_t *to, const int64_t *from, int64_t count, int32_t device, void *stream);

/* What vjepa_write_cuda does, executed on the host. For tests. */
VJEPA_API int32_t vjepa_write_cuda_on_host(int64_t *to, const int64_t *from, int64_t count);

/* vjepa_ema_check for parameters. */
VJEPA_API int32_t vjepa_adamw_check(const vjepa_adamw_tensor *tensors, int64_t count);

/* AdamW, moving average and copies of `count` parameters in host memory, which were checked, in one pass;
 * csrc/include/vjepa/adamw.h says what is computed. `scalars` may be null. The tensors' own steps are counted unless
 * found_inf is set. The result does not depend on `threads` (>= 1). */
VJEPA_API int32_t vjepa_adamw_cpu(const vjepa_adamw_tensor *tensors, int64_t count, const vjepa_adamw_group *groups,
                                  int64_t num_groups, const vjepa_adamw_scalars *scalars, double momentum,
                                  int32_t threads);

/* The same step on a GPU, in one launch: `tensors`, which were checked, and the grid's first_chunks lie in the memory
 * of CUDA device `device`, as does all that they, `scalars` and the groups point to; `groups` (at most
 * VJEPA_MAXIMUM_GROUPS, as many as the tensors name) and `scalars` themselves lie in host memory and are copied into
 * the launch. Steps are not counted. Asynchronous. */
VJEPA_API int32_t vjepa_adamw_cuda(const vjepa_adamw_tensor *tensors, const vjepa_grid *grid,
                                   const vjepa_adamw_group *groups, int64_t num_groups,
                                   const vjepa_adamw_scalars *scalars, double momentum, int32_t device, void *stream);

/* What vjepa_adamw_cuda does, executed on the host; see vjepa_ema_cuda_on_host. */
VJEPA_API int32_t vjepa_adamw_cuda_on_host(const vjepa_adamw_tensor *tensors, const vjepa_grid *grid,
                                           const vjepa_adamw_group *groups, int64_t num_groups,
                                           const vjepa_adamw_scalars *scalars, double momentum);

/* Gradient norms. A tensor of one; those of a group follow one another. */
typedef struct vjepa_norm_tensor {
  const void *values; /* [numel] dtype, read; aligned to its element type */
  int64_t numel;      /* elements, >= 0 */
  int64_t dtype;      /* VJEPA_FLOAT32, VJEPA_BFLOAT16 or VJEPA_FLOAT16 */
  int64_t group;      /* not below that of the tensor before */
} vjepa_norm_tensor;

/* Elements whose squares are summed together before their sum is added to others: the order of the sum depends on it.
 */
#define VJEPA_NORM_CHUNK 65536

/* norms[g] <- square root of the sum of the squares of all elements of group g, for 0 <= g < num_groups; summed in
 * float64, rounded once; 0 of a group without elements. The result does not depend on `threads` (>= 1). */
VJEPA_API int32_t vjepa_norms_cpu(const vjepa_norm_tensor *tensors, int64_t count, int64_t num_groups, float *norms,
                                  int32_t threads);

/* Whether vjepa_norms_cuda can read these tensors, `tensors` itself in host memory. */
VJEPA_API int32_t vjepa_norms_check(const vjepa_norm_tensor *tensors, int64_t count, int64_t num_groups);

/* The norms on a GPU, in one launch for the chunks and one for each 32 groups; nothing is launched, and nothing
 * written, if there is no chunk. `tensors`, which were checked, and the grid's first_chunks lie on the device, as do
 * `partials` [num_chunks] and `norms` [num_groups]; `offsets` [num_groups + 1], the first chunk of each group and in
 * the end the number of chunks, lies in host memory and is copied into the launches. The bits are those of
 * vjepa_norms_cpu if the grid's chunks are of VJEPA_NORM_CHUNK elements. Asynchronous. */
VJEPA_API int32_t vjepa_norms_cuda(const vjepa_norm_tensor *tensors, const vjepa_grid *grid, const int64_t *offsets,
                                   int64_t num_groups, double *partials, float *norms, int32_t device, void *stream);

/* What vjepa_norms_cuda does, executed on the host; see vjepa_ema_cuda_on_host. */
VJEPA_API int32_t vjepa_norms_cuda_on_host(const vjepa_norm_tensor *tensors, const vjepa_grid *grid,
                                           const int64_t *offsets, int64_t num_groups, double *partials, float *norms);

#ifdef __cplusplus
}
#endif

#endif
