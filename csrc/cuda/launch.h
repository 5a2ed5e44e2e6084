// What every launch does around its kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../capi.h"
#include "../include/vjepa/cuda_error.h"
#include "../include/vjepa/grid.h"

namespace vjepa {

// Calls work(), which returns a status, with `device` as the current device, and makes the one before it current again.
template <class Work>
int32_t on_device(int32_t device, const Work &work) {
  int previous = 0;
  if (const int32_t status = cuda_status(cudaGetDevice(&previous))) return status;
  if (const int32_t status = cuda_status(cudaSetDevice(device))) return status;
  const int32_t done = work();
  const int32_t restored = cuda_status(cudaSetDevice(previous));
  return done ? done : restored;
}

// Calls launch(blocks) on `device` with one block for each chunk.
template <class Launch>
int32_t launch_chunks(const void *tensors, const vjepa_grid *grid, int32_t device, const Launch &launch) {
  if (const int32_t status = check_grid(tensors, grid)) return status;
  if (grid->num_chunks == 0) return VJEPA_OK;
  return on_device(device, [&] {
    launch(static_cast<unsigned>(grid->num_chunks));
    return cuda_status(cudaGetLastError());
  });
}

}  // namespace vjepa
