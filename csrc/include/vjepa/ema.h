// Exponential moving average, one body for every processor:  t <- m * t + (1 - m) * s   in float32.
//
// Memory traffic per element: 8 bytes of target, 2 or 4 of source, 2 of copy; 3 FLOP. Difference, product and sum are
// rounded apart (no fused multiply-add), so that all instruction sets, thread counts and CUDA give the same bits.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "dtype.h"
#include "macros.h"

namespace vjepa {

constexpr int64_t kEmaPack = 4;      // elements a CUDA thread moves at a time: 16 bytes of float32
constexpr int kEmaThreads = 256;     // threads of a CUDA block
constexpr uintptr_t kPackBytes = 4;  // a pack of T is aligned to kPackBytes * sizeof(T)

struct NoCopy {};

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
#if defined(__CUDA_ARCH__)
  return __fadd_rn(base, __fmul_rn(step.factor, __fsub_rn(source, target)));
#else
  return base + step.factor * (source - target);  // compiled with -ffp-contract=off
#endif
}

template <class T>
VJEPA_HOST_DEVICE void store_copy(T *copy, int64_t i, float value) {
  copy[i] = from_float<T>(value);
}

VJEPA_HOST_DEVICE void store_copy(NoCopy *, int64_t, float) {}

// Elements [begin, end) of a tensor, one after the other: the CPU's inner loop.
template <class Source, class Copy>
VJEPA_HOST_DEVICE void ema_range(const vjepa_ema_tensor &tensor, int64_t begin, int64_t end, EmaStep step) {
  float *__restrict target = tensor.target;
  const Source *__restrict source = static_cast<const Source *>(tensor.source);
  Copy *__restrict copy = static_cast<Copy *>(tensor.copy);
  for (int64_t i = begin; i < end; ++i) {
    const float value = ema_value(target[i], to_float(source[i]), step);
    target[i] = value;
    store_copy(copy, i, value);
  }
}

template <class T>
struct alignas(kPackBytes * sizeof(T)) Pack {
  T values[kEmaPack];
};

template <class T>
VJEPA_HOST_DEVICE void store_copy_pack(T *copy, int64_t i, const Pack<float> &values) {
  Pack<T> rounded;
  for (int64_t j = 0; j < kEmaPack; ++j) rounded.values[j] = from_float<T>(values.values[j]);
  *reinterpret_cast<Pack<T> *>(copy + i) = rounded;
}

VJEPA_HOST_DEVICE void store_copy_pack(NoCopy *, int64_t, const Pack<float> &) {}

// The part of a chunk that thread `lane` of a block of `lanes` threads does: packs while all pointers allow it, single
// elements for the tail and for misaligned tensors.
template <class Source, class Copy>
VJEPA_HOST_DEVICE void ema_chunk(const vjepa_ema_tensor &tensor, const vjepa_chunk &chunk, EmaStep step, int64_t lane,
                                 int64_t lanes) {
  float *target = tensor.target;
  const Source *source = static_cast<const Source *>(tensor.source);
  Copy *copy = static_cast<Copy *>(tensor.copy);
  int64_t tail = chunk.begin;
  if (chunk.packed) {
    tail = chunk.end - (chunk.end - chunk.begin) % kEmaPack;
    for (int64_t i = chunk.begin + lane * kEmaPack; i < tail; i += lanes * kEmaPack) {
      Pack<float> t = *reinterpret_cast<const Pack<float> *>(target + i);
      const Pack<Source> s = *reinterpret_cast<const Pack<Source> *>(source + i);
      for (int64_t j = 0; j < kEmaPack; ++j) {
        t.values[j] = ema_value(t.values[j], to_float(s.values[j]), step);
      }
      *reinterpret_cast<Pack<float> *>(target + i) = t;
      store_copy_pack(copy, i, t);
    }
  }
  for (int64_t i = tail + lane; i < chunk.end; i += lanes) {
    const float value = ema_value(target[i], to_float(source[i]), step);
    target[i] = value;
    store_copy(copy, i, value);
  }
}

// Calls visitor.run<Source, Copy>() for the dtypes of `tensor`, which ema_check has accepted.
template <class Source, class Visitor>
VJEPA_HOST_DEVICE void ema_visit_copy(const vjepa_ema_tensor &tensor, const Visitor &visitor) {
  if (tensor.copy_dtype == VJEPA_BFLOAT16) {
    visitor.template run<Source, bfloat16>();
  } else if (tensor.copy_dtype == VJEPA_FLOAT16) {
    visitor.template run<Source, float16>();
  } else {
    visitor.template run<Source, NoCopy>();
  }
}

template <class Visitor>
VJEPA_HOST_DEVICE void ema_visit(const vjepa_ema_tensor &tensor, const Visitor &visitor) {
  if (tensor.source_dtype == VJEPA_FLOAT32) {
    ema_visit_copy<float>(tensor, visitor);
  } else if (tensor.source_dtype == VJEPA_BFLOAT16) {
    ema_visit_copy<bfloat16>(tensor, visitor);
  } else {
    ema_visit_copy<float16>(tensor, visitor);
  }
}

struct EmaChunkVisitor {
  const vjepa_ema_tensor &tensor;
  const vjepa_chunk &chunk;
  EmaStep step;
  int64_t lane;
  int64_t lanes;

  template <class Source, class Copy>
  VJEPA_HOST_DEVICE void run() const {
    ema_chunk<Source, Copy>(tensor, chunk, step, lane, lanes);
  }
};

// Thread `lane` of block `block` of the CUDA grid: one chunk per block.
VJEPA_HOST_DEVICE void ema_walk(const vjepa_ema_tensor *tensors, const vjepa_chunk *chunks, EmaStep step, int64_t block,
                                int64_t lane, int64_t lanes) {
  const vjepa_chunk &chunk = chunks[block];
  const vjepa_ema_tensor &tensor = tensors[chunk.tensor];
  ema_visit(tensor, EmaChunkVisitor{tensor, chunk, step, lane, lanes});
}

}  // namespace vjepa
