// The EMA update on a CPU, and the CUDA kernel executed on the host.
#include "../include/vjepa/ema.h"

#include "../include/vjepa/table_check.h"
#include "loops.h"
#include "parallel.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerPiece = 1 << 16;  // elements; 0.75 MB of traffic, 50 microseconds

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_ema_check(const vjepa_ema_tensor *tensors, int64_t count) {
  if (count < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (count > 0 && !tensors) return VJEPA_ERROR_NULL_POINTER;
  Spans spans;
  for (int64_t k = 0; k < count; ++k) {
    const vjepa_ema_tensor &tensor = tensors[k];
    const bool has_copy = tensor.copy_dtype != VJEPA_NONE;
    if (!is_float_dtype(tensor.source_dtype)) return VJEPA_ERROR_DTYPE;
    if (has_copy && !is_copy_dtype(tensor.copy_dtype)) return VJEPA_ERROR_DTYPE;
    spans.add(tensor.target, tensor.numel, sizeof(float), true);
    spans.add(tensor.source, tensor.numel, dtype_bytes(tensor.source_dtype), false);
    if (has_copy) spans.add(tensor.copy, tensor.numel, dtype_bytes(tensor.copy_dtype), true);
  }
  return spans.status();
}

extern "C" int32_t vjepa_ema_cpu(const vjepa_ema_tensor *tensors, int64_t count, double momentum, int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (const int32_t status = check_momentum(momentum)) return status;
  const EmaStep step = ema_step(momentum);
  const bool streamed = total_numel(tensors, count) >= kStreamed;
  parallel_for_tensors(tensors, count, kMinimumPerPiece, threads, [&](int64_t k, int64_t begin, int64_t end) {
    const vjepa_ema_tensor &tensor = tensors[k];
    const EmaLoop update = ema_loop(tensor.source_dtype);
    for_blocks(begin, end, [&](int64_t first, int64_t last) {
      update(tensor, first, last, step);
      copy_block(tensor.target, tensor.copy, tensor.copy_dtype, first, last, streamed);
    });
    if (streamed) finish_streams();
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_ema_cuda_on_host(const vjepa_ema_tensor *tensors, const vjepa_grid *grid, double momentum,
                                          const double *momentum_on_device) {
  if (const int32_t status = check_grid(tensors, grid)) return status;
  if (!momentum_on_device) {
    if (const int32_t status = check_momentum(momentum)) return status;
  }
  const EmaStep step = ema_step(momentum_on_device ? *momentum_on_device : momentum);
  for (int64_t block = 0; block < grid->num_chunks; ++block) {
    const Chunk chunk = find_chunk(tensors, *grid, block);
    for (int64_t lane = 0; lane < kBlockThreads; ++lane) {
      ema_chunk(tensors[chunk.tensor], chunk, step, lane, kBlockThreads);
    }
  }
  return VJEPA_OK;
}
