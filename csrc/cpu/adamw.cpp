// AdamW with moving average on a CPU, and the CUDA kernel executed on the host.
#include "../include/vjepa/adamw.h"

#include <vector>

#include "../include/vjepa/adamw_check.h"
#include "loops.h"
#include "parallel.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerPiece = 1 << 14;  // elements; 0.6 MB of traffic, 40 microseconds
constexpr float kMaximumStep = 1e18f;          // an int64 holds it

// Elements [begin, end) of a tensor.
void adamw_piece(const vjepa_adamw_tensor &tensor, int64_t begin, int64_t end, const AdamwStep &step, bool streamed) {
  const AdamwLoop update = adamw_loop(tensor.grad_dtype);
  const EmaLoop follow = ema_loop(VJEPA_FLOAT32);
  const vjepa_ema_tensor average = adamw_average(tensor);
  for_blocks(begin, end, [&](int64_t first, int64_t last) {
    if (!step.skip) {
      update(tensor, first, last, step);
      copy_block(tensor.param, tensor.param_copy, tensor.copy_dtype, first, last, streamed);
    }
    if (tensor.shadow) {
      follow(average, first, last, step.average);
      copy_block(tensor.shadow, tensor.shadow_copy, tensor.copy_dtype, first, last, streamed);
    }
  });
  if (streamed) finish_streams();
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_adamw_check(const vjepa_adamw_tensor *tensors, int64_t count) {
  if (count < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (count > 0 && !tensors) return VJEPA_ERROR_NULL_POINTER;
  Spans spans;
  for (int64_t k = 0; k < count; ++k) {
    const vjepa_adamw_tensor &tensor = tensors[k];
    const bool has_copy = tensor.copy_dtype != VJEPA_NONE;
    if (!is_float_dtype(tensor.grad_dtype) || (has_copy && !is_copy_dtype(tensor.copy_dtype))) return VJEPA_ERROR_DTYPE;
    spans.add(tensor.param, tensor.numel, sizeof(float), true);
    if (tensor.grad) {
      spans.add(tensor.grad, tensor.numel, dtype_bytes(tensor.grad_dtype), false);
      spans.add(tensor.exp_avg, tensor.numel, sizeof(float), true);
      spans.add(tensor.exp_avg_sq, tensor.numel, sizeof(float), true);
    }
    if (tensor.shadow) spans.add(tensor.shadow, tensor.numel, sizeof(float), true);
    if (has_copy) spans.add(tensor.param_copy, tensor.numel, dtype_bytes(tensor.copy_dtype), true);
    if (has_copy && tensor.shadow) spans.add(tensor.shadow_copy, tensor.numel, dtype_bytes(tensor.copy_dtype), true);
  }
  return spans.status();
}

extern "C" int32_t vjepa_adamw_cpu(const vjepa_adamw_tensor *tensors, int64_t count, const vjepa_adamw_group *groups,
                                   int64_t num_groups, const vjepa_adamw_scalars *given, double momentum,
                                   int32_t threads) {
  const vjepa_adamw_scalars scalars = given ? *given : vjepa_adamw_scalars{};
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (const int32_t status = adamw_check_groups(groups, num_groups, scalars, momentum)) return status;
  for (int64_t k = 0; k < count; ++k) {
    if (tensors[k].group < 0 || tensors[k].group >= num_groups) return VJEPA_ERROR_GROUP;
    const float *step = tensors[k].step;
    if (step && !(*step >= 0.0f && *step < kMaximumStep)) return VJEPA_ERROR_GROUP;
  }
  std::vector<AdamwStep> steps;
  steps.reserve(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) {
    steps.push_back(adamw_step(tensors[k], groups[tensors[k].group], scalars, momentum));
  }
  const bool streamed = total_numel(tensors, count) >= kStreamed;
  parallel_for_tensors(tensors, count, kMinimumPerPiece, threads, [&](int64_t k, int64_t begin, int64_t end) {
    adamw_piece(tensors[k], begin, end, steps[k], streamed);
  });
  for (int64_t k = 0; k < count; ++k) {
    if (tensors[k].step && !found_inf(scalars)) *tensors[k].step += 1.0f;
  }
  return VJEPA_OK;
}

extern "C" int32_t vjepa_adamw_cuda_on_host(const vjepa_adamw_tensor *tensors, const vjepa_grid *grid,
                                            const vjepa_adamw_group *groups, int64_t num_groups,
                                            const vjepa_adamw_scalars *given, double momentum) {
  const vjepa_adamw_scalars scalars = given ? *given : vjepa_adamw_scalars{};
  if (const int32_t status = check_grid(tensors, grid)) return status;
  if (num_groups > VJEPA_MAXIMUM_GROUPS) return VJEPA_ERROR_GROUP;
  if (const int32_t status = adamw_check_groups(groups, num_groups, scalars, momentum)) return status;
  for (int64_t block = 0; block < grid->num_chunks; ++block) {
    const Chunk chunk = find_chunk(tensors, *grid, block);
    const vjepa_adamw_tensor &tensor = tensors[chunk.tensor];
    const AdamwStep step = adamw_step(tensor, groups[tensor.group], scalars, momentum);
    for (int64_t lane = 0; lane < kBlockThreads; ++lane) adamw_chunk(tensor, chunk, step, lane, kBlockThreads);
  }
  return VJEPA_OK;
}
