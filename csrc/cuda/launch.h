// What every launch over a chunk table does around the kernel: one block for each chunk, on the device of the tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../capi.h"
#include "../include/vjepa/cuda_error.h"

namespace vjepa {

constexpr int64_t kMaximumGrid = 2147483647;  // blocks along x

// Calls launch(blocks) with `device` as the current device.
template <class Launch>
int32_t launch_chunks(const void *tensors, const vjepa_chunk *chunks, int64_t num_chunks, int32_t device,
                      const Launch &launch) {
  if (num_chunks < 0 || num_chunks > kMaximumGrid) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (num_chunks == 0) return VJEPA_OK;
  if (!tensors || !chunks) return VJEPA_ERROR_NULL_POINTER;
  int previous = 0;
  if (const int32_t status = cuda_status(cudaGetDevice(&previous))) return status;
  if (const int32_t status = cuda_status(cudaSetDevice(device))) return status;
  launch(static_cast<unsigned>(num_chunks));
  const int32_t launched = cuda_status(cudaGetLastError());
  const int32_t restored = cuda_status(cudaSetDevice(previous));
  return launched ? launched : restored;
}

}  // namespace vjepa
