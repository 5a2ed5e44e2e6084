// The norms on a GPU: one block per chunk sums its squares, then one block per group sums the group's chunks.
#include <cuda_runtime.h>

#include <algorithm>

#include "../include/vjepa/gradient_norm.h"
#include "launch.h"

namespace vjepa {
namespace {

// The sum of a block's sums, in its first thread.
__device__ __forceinline__ double tree(double *sums) {
  for (int64_t half = kNormSums / 2; half > 0; half /= 2) {
    __syncthreads();
    norm_fold(sums, half, threadIdx.x, kBlockThreads);
  }
  return sums[0];
}

__global__ void __launch_bounds__(kBlockThreads)
    chunk_kernel(const vjepa_norm_tensor *tensors, const __grid_constant__ vjepa_grid grid, double *partials) {
  __shared__ alignas(32) double sums[kNormSums];
  const Chunk chunk = find_chunk(tensors, grid, blockIdx.x);
  norm_lane(tensors[chunk.tensor], chunk, threadIdx.x, sums);
  const double sum = tree(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kBlockThreads)
    group_kernel(const double *partials, NormOffsets offsets, float *norms) {
  __shared__ double sums[kNormSums];
  norm_partials(partials, offsets.first[blockIdx.x], offsets.first[blockIdx.x + 1], threadIdx.x, kBlockThreads, sums);
  const double sum = tree(sums);
  if (threadIdx.x == 0) norms[blockIdx.x] = norm_of(sum);
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_norms_cuda(const vjepa_norm_tensor *tensors, const vjepa_grid *grid, const int64_t *offsets,
                                    int64_t num_groups, double *partials, float *norms, int32_t device, void *stream) {
  if (const int32_t status = check_grid(tensors, grid)) return status;
  if (const int32_t status = norms_check_offsets(offsets, num_groups, grid->num_chunks)) return status;
  if ((grid->num_chunks > 0 && !partials) || (num_groups > 0 && !norms)) return VJEPA_ERROR_NULL_POINTER;
  return launch_chunks(tensors, grid, device, [&](unsigned blocks) {
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    chunk_kernel<<<blocks, kBlockThreads, 0, on>>>(tensors, *grid, partials);
    for (int64_t done = 0; done < num_groups; done += kNormGroups) {
      const int64_t now = std::min(kNormGroups, num_groups - done);
      NormOffsets part = {};
      std::copy(offsets + done, offsets + done + now + 1, part.first);
      group_kernel<<<static_cast<unsigned>(now), kBlockThreads, 0, on>>>(partials, part, norms + done);
    }
  });
}
