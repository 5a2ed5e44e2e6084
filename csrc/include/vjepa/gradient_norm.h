// L2 norms of groups of tensors, one body for every processor:  norms[g] = sqrt(sum of x^2 over the group's tensors).
//
// A square of a float32 is exact in float64, and so is added in one rounding, fused or not. Every processor adds in one
// order: the elements of a chunk to kNormSums sums, these in a tree, then the chunks' sums of a group in the same
// way. All instruction sets, thread counts and CUDA thus give the same bits for chunks of VJEPA_NORM_CHUNK elements.
//
// Memory traffic per element: 4 or 2 bytes, read; 2 FLOP.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "dtype.h"
#include "exact.h"
#include "grid.h"
#include "macros.h"
#include "pack.h"

namespace vjepa {

constexpr int64_t kRow = 32;                          // sums that a CPU keeps in registers; 128 bytes of float32
constexpr int64_t kRowThreads = kRow / kPack;         // of a CUDA block, which read a row together
constexpr int64_t kNormSums = kBlockThreads * kPack;  // that the threads of a CUDA block keep in registers
constexpr int64_t kRun = 64 * kRow;  // neighbours whose sums are the same ones: a CPU reads straight on
constexpr int64_t kInFlight = 4;     // rows that are read before the first is needed
constexpr int64_t kNormGroups = 32;  // of one launch: 264 bytes of a kernel's arguments

// Where the chunks of some groups begin, and the last ones end.
struct NormOffsets {
  int64_t first[kNormGroups + 1];
};

template <class T>
VJEPA_HOST_DEVICE double square(T value) {
  const double x = static_cast<double>(to_float(value));
  return x * x;
}

// The step of the tree that leaves `half` sums, the part of thread `lane` of `lanes`.
VJEPA_HOST_DEVICE void norm_fold(double *sums, int64_t half, int64_t lane, int64_t lanes) {
  for (int64_t i = lane; i < half; i += lanes) sums[i] += sums[i + half];
}

// The sums that thread `lane` of a CUDA block keeps of a chunk of `values`: its pack of each row of its runs.
template <class T>
VJEPA_HOST_DEVICE void norm_lane(const T *values, const Chunk &chunk, int64_t lane, double *sums) {
  double kept[kPack] = {};
  const bool packed = reinterpret_cast<uintptr_t>(values) % (kPack * sizeof(T)) == 0;
  constexpr int64_t stride = kBlockThreads / kRowThreads * kRun;
  for (int64_t run = chunk.begin + lane / kRowThreads * kRun; run < chunk.end; run += stride) {
    const int64_t end = run + kRun < chunk.end ? run + kRun : chunk.end;
    int64_t i = run + lane % kRowThreads * kPack;
    for (; packed && i + (kInFlight - 1) * kRow + kPack <= end; i += kInFlight * kRow) {
      Some<kPack> packs[kInFlight];
      for (int64_t k = 0; k < kInFlight; ++k) packs[k] = load<kPack>(values, i + k * kRow);
      for (int64_t k = 0; k < kInFlight; ++k) {
        for (int64_t j = 0; j < kPack; ++j) kept[j] += square(packs[k].values[j]);
      }
    }
    for (; i < end; i += kRow) {
      for (int64_t j = 0; j < kPack; ++j) {
        if (i + j < end) kept[j] += square(values[i + j]);
      }
    }
  }
  for (int64_t j = 0; j < kPack; ++j) sums[lane * kPack + j] = kept[j];
}

VJEPA_HOST_DEVICE void norm_lane(const vjepa_norm_tensor &tensor, const Chunk &chunk, int64_t lane, double *sums) {
  if (tensor.dtype == VJEPA_BFLOAT16) return norm_lane(static_cast<const bfloat16 *>(tensor.values), chunk, lane, sums);
  if (tensor.dtype == VJEPA_FLOAT16) return norm_lane(static_cast<const float16 *>(tensor.values), chunk, lane, sums);
  norm_lane(static_cast<const float *>(tensor.values), chunk, lane, sums);
}

// The sums that thread `lane` of `lanes` makes of a group's chunks, [first, last) of `partials`.
VJEPA_HOST_DEVICE void norm_partials(const double *partials, int64_t first, int64_t last, int64_t lane, int64_t lanes,
                                     double *sums) {
  for (int64_t i = lane; i < kNormSums; i += lanes) {
    double sum = 0.0;
    for (int64_t p = first + i; p < last; p += kNormSums) sum += partials[p];
    sums[i] = sum;
  }
}

// What the kernel of the groups relies on. Host only.
inline int32_t norms_check_offsets(const int64_t *offsets, int64_t num_groups, int64_t num_chunks) {
  if (num_groups < 0 || num_chunks < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (!offsets) return VJEPA_ERROR_NULL_POINTER;
  if (offsets[0] != 0 || offsets[num_groups] != num_chunks) return VJEPA_ERROR_GROUP;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (offsets[g] > offsets[g + 1]) return VJEPA_ERROR_GROUP;
  }
  return VJEPA_OK;
}

VJEPA_HOST_DEVICE float norm_of(double sum) { return static_cast<float>(square_root(sum)); }

}  // namespace vjepa
