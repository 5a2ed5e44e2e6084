// Which elements of which tensor a CUDA block works on, and how many blocks may work.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "macros.h"
#include "pack.h"

namespace vjepa {

constexpr int64_t kMaximumGrid = 2147483647;  // blocks along x

// Elements [begin, end) of one tensor; begin is a multiple of a pack.
struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

// By bisection: a table of all chunks would be hundreds of times as long as one of first chunks, which a cache holds.
template <class Tensor>
VJEPA_HOST_DEVICE Chunk find_chunk(const Tensor *tensors, const vjepa_grid &grid, int64_t block) {
  int64_t tensor = 0, next = grid.count;  // first_chunks[tensor] <= block < first_chunks[next]
  while (next - tensor > 1) {
    const int64_t middle = tensor + (next - tensor) / 2;
    (grid.first_chunks[middle] <= block ? tensor : next) = middle;
  }
  const int64_t begin = (block - grid.first_chunks[tensor]) * grid.elements;
  const int64_t end = begin + grid.elements, numel = tensors[tensor].numel;
  return Chunk{tensor, begin, end < numel ? end : numel};
}

inline int32_t check_grid(const void *tensors, const vjepa_grid *grid) {
  if (!grid) return VJEPA_ERROR_NULL_POINTER;
  if (grid->count < 0 || grid->num_chunks < 0 || grid->num_chunks > kMaximumGrid) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (grid->elements <= 0 || grid->elements % kPack) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (grid->num_chunks > 0 && grid->count == 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  return grid->num_chunks > 0 && (!tensors || !grid->first_chunks) ? VJEPA_ERROR_NULL_POINTER : VJEPA_OK;
}

}  // namespace vjepa
