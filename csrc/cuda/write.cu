// Writes a table to the memory of a GPU.
#include "../include/vjepa/write.h"

#include <cuda_runtime.h>

#include "launch.h"

namespace vjepa {
namespace {

__global__ void __launch_bounds__(kBlockThreads)
    write_kernel(int64_t *to, const __grid_constant__ Words words, int64_t count) {
  write_words(to, words, count, threadIdx.x, kBlockThreads);
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_write_cuda(int64_t *to, const int64_t *from, int64_t count, int32_t device, void *stream) {
  return on_device(device, [&] {
    return write_in_pieces(to, from, count, [&](int64_t *piece, const Words &words, int64_t some) {
      write_kernel<<<1, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(piece, words, some);
      return cuda_status(cudaGetLastError());
    });
  });
}
