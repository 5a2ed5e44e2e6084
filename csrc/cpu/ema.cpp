// The EMA update on a CPU, the chunk plan of the CUDA kernel, and that kernel executed on the host.
#include "../include/vjepa/ema.h"

#include <vector>

#include "../include/vjepa/ema_check.h"
#include "parallel.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerThread = 1 << 17;  // elements; about 1.5 MB of traffic, 100 microseconds

// A macro, because a compiler clones functions, not templates.
#define VJEPA_EMA_CLONES(name, Source, Copy)                                                               \
  VJEPA_MULTIVERSION void name(const vjepa_ema_tensor &tensor, int64_t begin, int64_t end, EmaStep step) { \
    ema_range<Source, Copy>(tensor, begin, end, step);                                                     \
  }
VJEPA_EMA_CLONES(ema_range_f32_none, float, NoCopy)
VJEPA_EMA_CLONES(ema_range_f32_bf16, float, bfloat16)
VJEPA_EMA_CLONES(ema_range_f32_f16, float, float16)
VJEPA_EMA_CLONES(ema_range_bf16_none, bfloat16, NoCopy)
VJEPA_EMA_CLONES(ema_range_bf16_bf16, bfloat16, bfloat16)
VJEPA_EMA_CLONES(ema_range_bf16_f16, bfloat16, float16)
VJEPA_EMA_CLONES(ema_range_f16_none, float16, NoCopy)
VJEPA_EMA_CLONES(ema_range_f16_bf16, float16, bfloat16)
VJEPA_EMA_CLONES(ema_range_f16_f16, float16, float16)
#undef VJEPA_EMA_CLONES

using EmaRange = void (*)(const vjepa_ema_tensor &, int64_t, int64_t, EmaStep);

// [source dtype][copy dtype + 1], in the order of vjepa_dtype; there is no float32 copy.
constexpr EmaRange kEmaRanges[3][4] = {
    {ema_range_f32_none, nullptr, ema_range_f32_bf16, ema_range_f32_f16},
    {ema_range_bf16_none, nullptr, ema_range_bf16_bf16, ema_range_bf16_f16},
    {ema_range_f16_none, nullptr, ema_range_f16_bf16, ema_range_f16_f16},
};

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_ema_cpu(const vjepa_ema_tensor *tensors, int64_t count, double momentum, int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (const int32_t status = ema_check_momentum(momentum)) return status;
  if (const int32_t status = ema_check(tensors, count)) return status;
  std::vector<int64_t> offsets(static_cast<size_t>(count) + 1, 0);  // element offset of each tensor in the whole work
  for (int64_t k = 0; k < count; ++k) offsets[k + 1] = offsets[k] + tensors[k].numel;
  const EmaStep step = ema_step(momentum);
  parallel_for(offsets[count], kMinimumPerThread, threads, [&](int64_t first, int64_t last) {
    int64_t k = std::upper_bound(offsets.begin(), offsets.end(), first) - offsets.begin() - 1;
    for (; k < count && offsets[k] < last; ++k) {
      const int64_t begin = std::max<int64_t>(first - offsets[k], 0);
      const int64_t end = std::min(last - offsets[k], tensors[k].numel);
      const EmaRange range = kEmaRanges[tensors[k].source_dtype][tensors[k].copy_dtype + 1];
      range(tensors[k], begin, end, step);
    }
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_ema_plan(const vjepa_ema_tensor *tensors, int64_t count, int64_t chunk_elements,
                                  vjepa_chunk *chunks, int64_t capacity, int64_t *num_chunks) {
  if (!num_chunks) return VJEPA_ERROR_NULL_POINTER;
  if (chunk_elements <= 0 || chunk_elements % kEmaPack) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (const int32_t status = ema_check(tensors, count)) return status;
  int64_t used = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t packed = ema_packable(tensors[k]) ? 1 : 0;
    for (int64_t begin = 0; begin < tensors[k].numel; begin += chunk_elements) {
      if (chunks) {
        if (used >= capacity) return VJEPA_ERROR_CAPACITY;
        chunks[used] = vjepa_chunk{k, begin, std::min(begin + chunk_elements, tensors[k].numel), packed};
      }
      ++used;
    }
  }
  *num_chunks = used;
  return VJEPA_OK;
}

extern "C" int32_t vjepa_ema_cuda_on_host(const vjepa_ema_tensor *tensors, const vjepa_chunk *chunks,
                                          int64_t num_chunks, double momentum) {
  if (num_chunks < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (num_chunks > 0 && (!tensors || !chunks)) return VJEPA_ERROR_NULL_POINTER;
  if (const int32_t status = ema_check_momentum(momentum)) return status;
  for (int64_t block = 0; block < num_chunks; ++block) {
    for (int64_t lane = 0; lane < kEmaThreads; ++lane) {
      ema_walk(tensors, chunks, ema_step(momentum), block, lane, kEmaThreads);
    }
  }
  return VJEPA_OK;
}
