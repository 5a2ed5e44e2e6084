// What an EMA table must satisfy before any of it is touched. Host only.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "ema.h"

namespace vjepa {

inline uintptr_t dtype_bytes(int32_t dtype) { return dtype == VJEPA_FLOAT32 ? 4 : 2; }

inline bool is_aligned(const void *pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline int32_t ema_check_momentum(double momentum) {
  return momentum >= 0.0 && momentum <= 1.0 ? VJEPA_OK : VJEPA_ERROR_MOMENTUM;
}

inline int32_t ema_check(const vjepa_ema_tensor *tensors, int64_t count) {
  if (count < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (count > 0 && !tensors) return VJEPA_ERROR_NULL_POINTER;
  for (int64_t k = 0; k < count; ++k) {
    const vjepa_ema_tensor &tensor = tensors[k];
    const bool has_copy = tensor.copy_dtype != VJEPA_NONE;
    if (tensor.numel < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
    if (tensor.source_dtype < VJEPA_FLOAT32 || tensor.source_dtype > VJEPA_FLOAT16) return VJEPA_ERROR_DTYPE;
    if (has_copy && tensor.copy_dtype != VJEPA_BFLOAT16 && tensor.copy_dtype != VJEPA_FLOAT16) return VJEPA_ERROR_DTYPE;
    if (tensor.numel == 0) continue;
    if (!tensor.target || !tensor.source || (has_copy && !tensor.copy)) return VJEPA_ERROR_NULL_POINTER;
    if (!is_aligned(tensor.target, sizeof(float))) return VJEPA_ERROR_ALIGNMENT;
    if (!is_aligned(tensor.source, dtype_bytes(tensor.source_dtype))) return VJEPA_ERROR_ALIGNMENT;
    if (has_copy && !is_aligned(tensor.copy, dtype_bytes(tensor.copy_dtype))) return VJEPA_ERROR_ALIGNMENT;
  }
  return VJEPA_OK;
}

// Whether every pointer of the tensor is aligned for packs; chunks begin at multiples of a pack.
inline bool ema_packable(const vjepa_ema_tensor &tensor) {
  return is_aligned(tensor.target, kPackBytes * sizeof(float)) &&
         is_aligned(tensor.source, kPackBytes * dtype_bytes(tensor.source_dtype)) &&
         (tensor.copy_dtype == VJEPA_NONE || is_aligned(tensor.copy, kPackBytes * dtype_bytes(tensor.copy_dtype)));
}

}  // namespace vjepa
