// The EMA update on a GPU: one block per chunk, one launch for all tensors of a device.
#include <cuda_runtime.h>

#include "../include/vjepa/cuda_error.h"
#include "../include/vjepa/ema.h"
#include "../include/vjepa/ema_check.h"

namespace vjepa {
namespace {

constexpr int64_t kMaximumGrid = 2147483647;  // blocks along x

__global__ void __launch_bounds__(kEmaThreads)
    ema_kernel(const vjepa_ema_tensor *tensors, const vjepa_chunk *chunks, EmaStep step) {
  ema_walk(tensors, chunks, step, blockIdx.x, threadIdx.x, kEmaThreads);
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_ema_cuda(const vjepa_ema_tensor *tensors, const vjepa_chunk *chunks, int64_t num_chunks,
                                  double momentum, int32_t device, void *stream) {
  if (num_chunks < 0 || num_chunks > kMaximumGrid) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (const int32_t status = ema_check_momentum(momentum)) return status;
  if (num_chunks == 0) return VJEPA_OK;
  if (!tensors || !chunks) return VJEPA_ERROR_NULL_POINTER;
  int previous = 0;
  if (const int32_t status = cuda_status(cudaGetDevice(&previous))) return status;
  if (const int32_t status = cuda_status(cudaSetDevice(device))) return status;
  ema_kernel<<<static_cast<unsigned>(num_chunks), kEmaThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tensors, chunks, ema_step(momentum));
  const int32_t launched = cuda_status(cudaGetLastError());
  const int32_t restored = cuda_status(cudaSetDevice(previous));
  return launched ? launched : restored;
}
