// The CUDA runtime's last words, kept per thread for vjepa_cuda_error().
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../capi.h"

namespace vjepa {

extern thread_local const char *last_cuda_error;  // a static string of the CUDA runtime

inline int32_t cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return VJEPA_OK;
  last_cuda_error = cudaGetErrorString(error);
  return VJEPA_ERROR_CUDA;
}

}  // namespace vjepa
