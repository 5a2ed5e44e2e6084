// Exponential moving average, one body for every processor:  t <- m * t + (1 - m) * s   in float32.
//
// Memory traffic per element: 8 bytes of target, 2 or 4 of source, 2 of copy; 3 FLOP. Difference, product and sum are
// rounded apart (no fused multiply-add), so that all instruction sets, thread counts and CUDA give the same bits.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "dtype.h"
#include "exact.h"
#include "grid.h"
#include "macros.h"
#include "pack.h"

namespace vjepa {

// The convex combination as a step from the nearer end, base + factor * (s - t): exact at m = 0 and m = 1, and a target
// equal to its source stays what it is, which float32 weights that do not sum to 1 would not grant.
struct EmaStep {
  float factor;      // 1 - m from the target, -m from the source
  bool from_source;  // m < 1/2
};

VJEPA_HOST_DEVICE EmaStep ema_step(double momentum) {
  const bool from_source = momentum < 0.5;
  return EmaStep{static_cast<float>(from_source ? -momentum : 1.0 - momentum), from_source};
}

VJEPA_HOST_DEVICE float ema_value(float target, float source, EmaStep step) {
  const float base = step.from_source ? source : target;
  return add(base, multiply(step.factor, subtract(source, target)));
}

// Targets of elements [begin, end), one after the other: the inner loop of a CPU.
template <class Source>
VJEPA_HOST_DEVICE void ema_range(const vjepa_ema_tensor &tensor, int64_t begin, int64_t end, EmaStep step) {
  float *__restrict target = tensor.target;
  const Source *__restrict source = static_cast<const Source *>(tensor.source);
  for (int64_t i = begin; i < end; ++i) target[i] = ema_value(target[i], to_float(source[i]), step);
}

// kCount elements from element i on.
template <int64_t kCount>
VJEPA_HOST_DEVICE void ema_some(const vjepa_ema_tensor &tensor, int64_t i, EmaStep step) {
  Some<kCount> t = load<kCount>(tensor.target, i);
  const Some<kCount> s = load<kCount>(tensor.source, tensor.source_dtype, i);
  for (int64_t j = 0; j < kCount; ++j) t.values[j] = ema_value(t.values[j], s.values[j], step);
  store(tensor.target, i, t);
  store(tensor.copy, tensor.copy_dtype, i, t);
}

VJEPA_HOST_DEVICE bool ema_packable(const vjepa_ema_tensor &tensor) {
  return packable(tensor.target, VJEPA_FLOAT32) && packable(tensor.source, tensor.source_dtype) &&
         packable(tensor.copy, tensor.copy_dtype);
}

// The part of a chunk that thread `lane` of a block of `lanes` threads does: packs while all pointers allow it, single
// elements for the tail and for misaligned tensors.
VJEPA_HOST_DEVICE void ema_chunk(const vjepa_ema_tensor &tensor, const Chunk &chunk, EmaStep step, int64_t lane,
                                 int64_t lanes) {
  int64_t tail = chunk.begin;
  if (ema_packable(tensor)) {
    tail = chunk.end - (chunk.end - chunk.begin) % kPack;
    for (int64_t i = chunk.begin + lane * kPack; i < tail; i += lanes * kPack) ema_some<kPack>(tensor, i, step);
  }
  for (int64_t i = tail + lane; i < chunk.end; i += lanes) ema_some<1>(tensor, i, step);
}

}  // namespace vjepa
