// AdamW with moving average on a GPU: one block per chunk, one launch for all parameters of a device.
#include <cuda_runtime.h>

#include <algorithm>

#include "../include/vjepa/adamw.h"
#include "../include/vjepa/adamw_check.h"
#include "launch.h"

namespace vjepa {
namespace {

struct Groups {
  vjepa_adamw_group rows[VJEPA_MAXIMUM_GROUPS];
};

__global__ void __launch_bounds__(kBlockThreads)
    adamw_kernel(const vjepa_adamw_tensor *tensors, const __grid_constant__ vjepa_grid grid,
                 const __grid_constant__ Groups groups, vjepa_adamw_scalars scalars, double momentum) {
  const Chunk chunk = find_chunk(tensors, grid, blockIdx.x);
  const vjepa_adamw_tensor &tensor = tensors[chunk.tensor];
  // Powers and divisions in float64 are slow on most GPUs: one thread computes them for its block.
  __shared__ AdamwStep step;
  if (threadIdx.x == 0) step = adamw_step(tensor, groups.rows[tensor.group], scalars, momentum);
  __syncthreads();
  adamw_chunk(tensor, chunk, step, threadIdx.x, kBlockThreads);
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_adamw_cuda(const vjepa_adamw_tensor *tensors, const vjepa_grid *grid,
                                    const vjepa_adamw_group *groups, int64_t num_groups,
                                    const vjepa_adamw_scalars *given, double momentum, int32_t device, void *stream) {
  const vjepa_adamw_scalars scalars = given ? *given : vjepa_adamw_scalars{};
  if (num_groups > VJEPA_MAXIMUM_GROUPS) return VJEPA_ERROR_GROUP;
  if (const int32_t status = adamw_check_groups(groups, num_groups, scalars, momentum)) return status;
  Groups copied{};
  std::copy(groups, groups + num_groups, copied.rows);
  return launch_chunks(tensors, grid, device, [&](unsigned blocks) {
    adamw_kernel<<<blocks, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(tensors, *grid, copied, scalars,
                                                                                  momentum);
  });
}
