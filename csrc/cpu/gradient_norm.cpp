// The norms on a CPU, and the CUDA kernels executed on the host.
#include "../include/vjepa/gradient_norm.h"

#include <algorithm>
#include <vector>

#include "../include/vjepa/table_check.h"
#include "lanes.h"
#include "parallel.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerPiece = 1 << 17;  // elements; 0.5 MB of traffic, 30 microseconds

static_assert(kLanes == kRow, "the CPU adds in the order of the CUDA kernel");

// sums[a] <- sum of the squares of values[a], values[a + kRow] ... of a run of `count` elements.
template <class T>
VJEPA_HOST_DEVICE void squares(const T *__restrict values, int64_t count, double *sums) {
  double kept[kRow] = {};
  for_lanes(count, [&](int64_t lane, int64_t i) { kept[lane] += square(values[i]); });
  std::copy(kept, kept + kRow, sums);
}

// A macro, because a compiler clones functions, not templates.
#define VJEPA_CLONES(suffix, T)                                                                            \
  VJEPA_MULTIVERSION void squares_##suffix(const void *values, int64_t begin, int64_t end, double *sums) { \
    squares(static_cast<const T *>(values) + begin, end - begin, sums);                                    \
  }
VJEPA_CLONES(f32, float)
VJEPA_CLONES(bf16, bfloat16)
VJEPA_CLONES(f16, float16)
#undef VJEPA_CLONES

using SquaresLoop = void (*)(const void *values, int64_t begin, int64_t end, double *sums);
constexpr SquaresLoop kSquaresLoops[3] = {squares_f32, squares_bf16, squares_f16};  // in the order of vjepa_dtype

VJEPA_MULTIVERSION double fold(double *sums, int64_t width) {
  for (int64_t half = width / 2; half > 0; half /= 2) norm_fold(sums, half, 0, 1);
  return sums[0];
}

double chunk_sum(const vjepa_norm_tensor &tensor, int64_t begin, int64_t end) {
  double sums[kNormSums];
  int64_t used = 0, width = kRow;
  for (int64_t first = begin; first < end; first += kRun, used += kRow) {
    kSquaresLoops[tensor.dtype](tensor.values, first, std::min(first + kRun, end), sums + used);
  }
  while (width < used) width *= 2;
  std::fill(sums + used, sums + width, 0.0);  // beyond width all are 0, and 0 changes no sum
  return fold(sums, width);
}
static_assert(VJEPA_NORM_CHUNK == kNormSums / kRow * kRun, "each run of a chunk has sums of its own");

// norms[g] of the chunks from offsets[g] to offsets[g + 1].
void finish(const double *partials, const int64_t *offsets, int64_t num_groups, float *norms) {
  double sums[kNormSums];
  for (int64_t g = 0; g < num_groups; ++g) {
    norm_partials(partials, offsets[g], offsets[g + 1], 0, 1, sums);
    norms[g] = norm_of(fold(sums, kNormSums));
  }
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_norms_check(const vjepa_norm_tensor *tensors, int64_t count, int64_t num_groups) {
  if (count < 0 || num_groups < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (count > 0 && !tensors) return VJEPA_ERROR_NULL_POINTER;
  int64_t group = 0;
  for (int64_t k = 0; k < count; ++k) {
    const vjepa_norm_tensor &tensor = tensors[k];
    if (!is_float_dtype(tensor.dtype)) return VJEPA_ERROR_DTYPE;
    if (tensor.group < group || tensor.group >= num_groups) return VJEPA_ERROR_GROUP;
    group = tensor.group;
    if (tensor.numel < 0 || tensor.numel > kMaximumNumel) return VJEPA_ERROR_NEGATIVE_SIZE;
    if (tensor.numel > 0 && !tensor.values) return VJEPA_ERROR_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(tensor.values) % static_cast<uintptr_t>(dtype_bytes(tensor.dtype))) {
      return VJEPA_ERROR_ALIGNMENT;
    }
  }
  return VJEPA_OK;
}

extern "C" int32_t vjepa_norms_cpu(const vjepa_norm_tensor *tensors, int64_t count, int64_t num_groups, float *norms,
                                   int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (const int32_t status = vjepa_norms_check(tensors, count, num_groups)) return status;
  if (num_groups > 0 && !norms) return VJEPA_ERROR_NULL_POINTER;
  std::vector<int64_t> first(static_cast<size_t>(count) + 1, 0);
  std::vector<int64_t> offsets(static_cast<size_t>(num_groups) + 1, 0);
  for (int64_t k = 0; k < count; ++k) {
    first[k + 1] = first[k] + (tensors[k].numel + VJEPA_NORM_CHUNK - 1) / VJEPA_NORM_CHUNK;
    offsets[tensors[k].group + 1] = first[k + 1];
  }
  for (int64_t g = 0; g < num_groups; ++g) offsets[g + 1] = std::max(offsets[g], offsets[g + 1]);  // the empty ones too
  std::vector<double> partials(static_cast<size_t>(first[count]));
  parallel_for_tensors(tensors, count, kMinimumPerPiece, threads, [&](int64_t k, int64_t begin, int64_t end) {
    // a chunk belongs to the piece that has its first element
    for (int64_t c = (begin + VJEPA_NORM_CHUNK - 1) / VJEPA_NORM_CHUNK; c * VJEPA_NORM_CHUNK < end; ++c) {
      const int64_t last = std::min<int64_t>((c + 1) * VJEPA_NORM_CHUNK, tensors[k].numel);
      partials[first[k] + c] = chunk_sum(tensors[k], c * VJEPA_NORM_CHUNK, last);
    }
  });
  finish(partials.data(), offsets.data(), num_groups, norms);
  return VJEPA_OK;
}

extern "C" int32_t vjepa_norms_cuda_on_host(const vjepa_norm_tensor *tensors, const vjepa_grid *grid,
                                            const int64_t *offsets, int64_t num_groups, double *partials,
                                            float *norms) {
  if (const int32_t status = check_grid(tensors, grid)) return status;
  if (const int32_t status = norms_check_offsets(offsets, num_groups, grid->num_chunks)) return status;
  if ((grid->num_chunks > 0 && !partials) || (num_groups > 0 && !norms)) return VJEPA_ERROR_NULL_POINTER;
  double sums[kNormSums];
  const auto tree = [&] {
    for (int64_t half = kNormSums / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < kBlockThreads; ++lane) norm_fold(sums, half, lane, kBlockThreads);
    }
    return sums[0];
  };
  for (int64_t block = 0; block < grid->num_chunks; ++block) {
    const Chunk chunk = find_chunk(tensors, *grid, block);
    for (int64_t lane = 0; lane < kBlockThreads; ++lane) norm_lane(tensors[chunk.tensor], chunk, lane, sums);
    partials[block] = tree();
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    for (int64_t lane = 0; lane < kBlockThreads; ++lane) {
      norm_partials(partials, offsets[g], offsets[g + 1], lane, kBlockThreads, sums);
    }
    norms[g] = norm_of(tree());
  }
  return VJEPA_OK;
}
