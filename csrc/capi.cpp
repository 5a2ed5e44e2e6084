// Build information, status sentences, and the CUDA entry points of a build without CUDA.
#include "capi.h"

#include "cpu/parallel.h"
#include "include/vjepa/macros.h"
#include "include/vjepa/write.h"

#if defined(__clang__)
#define VJEPA_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define VJEPA_COMPILER "gcc " __VERSION__
#else
#define VJEPA_COMPILER "unknown"
#endif

namespace vjepa {
thread_local const char *last_cuda_error = "";
}

extern "C" int32_t vjepa_abi_version(void) { return VJEPA_ABI_VERSION; }

extern "C" const char *vjepa_build_info(void) {
  return "{\"version\": \"" VJEPA_VERSION "\", \"compiler\": \"" VJEPA_COMPILER
         "\", \"instruction_sets\": \"" VJEPA_INSTRUCTION_SETS "\", \"cuda\": \"" VJEPA_CUDA_VERSION
         "\", \"cuda_archs\": \"" VJEPA_CUDA_ARCHS "\"}";
}

extern "C" const char *vjepa_status_string(int32_t status) {
  switch (status) {
    case VJEPA_OK:
      return "success";
    case VJEPA_ERROR_NULL_POINTER:
      return "a pointer to at least one element is null";
    case VJEPA_ERROR_NEGATIVE_SIZE:
      return "a size is negative, too large or not a multiple of what it must be";
    case VJEPA_ERROR_DTYPE:
      return "a dtype is none of those that the kernel reads or writes";
    case VJEPA_ERROR_ALIGNMENT:
      return "a pointer is not aligned to its element type";
    case VJEPA_ERROR_THREADS:
      return "the number of threads is less than 1";
    case VJEPA_ERROR_MOMENTUM:
      return "momentum is not between 0 and 1";
    case VJEPA_ERROR_NO_CUDA:
      return "the library was built without its CUDA part";
    case VJEPA_ERROR_INDEX:
      return "a token or a clip does not exist, or lengths are not those of the tokens";
    case VJEPA_ERROR_SCALE:
      return "the scale is not a positive, finite number";
    case VJEPA_ERROR_INSTRUCTIONS:
      return "this processor, or this build of the library, lacks the instructions";
    case VJEPA_ERROR_MEMORY:
      return "there is not enough memory";
    case VJEPA_ERROR_STRIDES:
      return "neither rows nor columns of a matrix are side by side, or rows that are written overlap";
    case VJEPA_ERROR_CUDA:
      return "the CUDA runtime refused";
    case VJEPA_ERROR_OVERLAP:
      return "a tensor that is written shares memory with another one";
    case VJEPA_ERROR_GROUP:
      return "a tensor names no group that is there, or lr, betas, eps, weight decay or step of a group is out of "
             "range";
    default:
      return "unknown status";
  }
}

extern "C" const char *vjepa_cuda_error(void) { return vjepa::last_cuda_error; }

extern "C" int32_t vjepa_set_team(void *gomp_parallel) {
  vjepa::team.store(reinterpret_cast<vjepa::Team>(gomp_parallel), std::memory_order_relaxed);
  return VJEPA_OK;
}

extern "C" int32_t vjepa_write_cuda_on_host(int64_t *to, const int64_t *from, int64_t count) {
  return vjepa::write_in_pieces(to, from, count, [](int64_t *piece, const vjepa::Words &words, int64_t some) {
    for (int64_t lane = 0; lane < vjepa::kBlockThreads; ++lane) {
      vjepa::write_words(piece, words, some, lane, vjepa::kBlockThreads);
    }
    return VJEPA_OK;
  });
}

#if !defined(VJEPA_WITH_CUDA)
extern "C" int32_t vjepa_ema_cuda(const vjepa_ema_tensor *, const vjepa_grid *, double, const double *, int32_t,
                                  void *) {
  return VJEPA_ERROR_NO_CUDA;
}
extern "C" int32_t vjepa_adamw_cuda(const vjepa_adamw_tensor *, const vjepa_grid *, const vjepa_adamw_group *, int64_t,
                                    const vjepa_adamw_scalars *, double, int32_t, void *) {
  return VJEPA_ERROR_NO_CUDA;
}
extern "C" int32_t vjepa_write_cuda(int64_t *, const int64_t *, int64_t, int32_t, void *) {
  return VJEPA_ERROR_NO_CUDA;
}
extern "C" int32_t vjepa_norms_cuda(const vjepa_norm_tensor *, const vjepa_grid *, const int64_t *, int64_t, double *,
                                    float *, int32_t, void *) {
  return VJEPA_ERROR_NO_CUDA;
}
#endif
