// How kernels over tables of tensors move elements: four at a time where a tensor's pointers allow it, else one by one.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "dtype.h"
#include "macros.h"

namespace vjepa {

constexpr int64_t kPack = 4;        // elements a CUDA thread moves at a time: 16 bytes of float32
constexpr int kBlockThreads = 256;  // threads of a CUDA block

VJEPA_HOST_DEVICE int64_t dtype_bytes(int64_t dtype) { return dtype == VJEPA_FLOAT32 ? 4 : 2; }

// Whether a pointer, which may be null, is aligned for a pack.
VJEPA_HOST_DEVICE bool packable(const void *pointer, int64_t dtype) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(kPack * dtype_bytes(dtype)) == 0;
}

// kCount elements, moved in one access: the pointer must be aligned to them.
template <int64_t kCount, class T = float>
struct alignas(kCount * sizeof(T)) Some {
  T values[kCount];
};

template <int64_t kCount, class T>
VJEPA_HOST_DEVICE Some<kCount> load(const T *from, int64_t i) {
  const Some<kCount, T> stored = *reinterpret_cast<const Some<kCount, T> *>(from + i);
  Some<kCount> values;
  for (int64_t j = 0; j < kCount; ++j) values.values[j] = to_float(stored.values[j]);
  return values;
}

template <int64_t kCount>
VJEPA_HOST_DEVICE Some<kCount> load(const void *from, int64_t dtype, int64_t i) {
  if (dtype == VJEPA_BFLOAT16) return load<kCount>(static_cast<const bfloat16 *>(from), i);
  if (dtype == VJEPA_FLOAT16) return load<kCount>(static_cast<const float16 *>(from), i);
  return load<kCount>(static_cast<const float *>(from), i);
}

template <int64_t kCount>
VJEPA_HOST_DEVICE void store(float *to, int64_t i, const Some<kCount> &values) {
  *reinterpret_cast<Some<kCount> *>(to + i) = values;
}

template <class T, int64_t kCount>
VJEPA_HOST_DEVICE void store_rounded(void *to, int64_t i, const Some<kCount> &values) {
  Some<kCount, T> rounded;
  for (int64_t j = 0; j < kCount; ++j) rounded.values[j] = from_float<T>(values.values[j]);
  *reinterpret_cast<Some<kCount, T> *>(static_cast<T *>(to) + i) = rounded;
}

template <int64_t kCount>
VJEPA_HOST_DEVICE void store(void *to, int64_t dtype, int64_t i, const Some<kCount> &values) {
  if (dtype == VJEPA_BFLOAT16) store_rounded<bfloat16>(to, i, values);
  if (dtype == VJEPA_FLOAT16) store_rounded<float16>(to, i, values);
}

}  // namespace vjepa
