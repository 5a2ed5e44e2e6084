// The EMA update on a GPU: one block per chunk, one launch for all tensors of a device.
#include <cuda_runtime.h>

#include "../include/vjepa/ema.h"
#include "../include/vjepa/table_check.h"
#include "launch.h"

namespace vjepa {
namespace {

__global__ void __launch_bounds__(kBlockThreads)
    ema_kernel(const vjepa_ema_tensor *tensors, const __grid_constant__ vjepa_grid grid, double momentum,
               const double *on_device) {
  const Chunk chunk = find_chunk(tensors, grid, blockIdx.x);
  const EmaStep step = ema_step(on_device ? *on_device : momentum);
  ema_chunk(tensors[chunk.tensor], chunk, step, threadIdx.x, kBlockThreads);
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_ema_cuda(const vjepa_ema_tensor *tensors, const vjepa_grid *grid, double momentum,
                                  const double *momentum_on_device, int32_t device, void *stream) {
  if (!momentum_on_device) {
    if (const int32_t status = check_momentum(momentum)) return status;
  }
  return launch_chunks(tensors, grid, device, [&](unsigned blocks) {
    ema_kernel<<<blocks, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(tensors, *grid, momentum,
                                                                                momentum_on_device);
  });
}
