// AdamW, the moving average of what it makes of the parameters, and low-precision copies of both, one body for every
// processor. g gradient, p parameter, a and q moments, s shadow, k step from 1; all float32 but g and the copies:
//
//   g <- factor g,   p <- p (1 - lr weight_decay)
//   a <- b1 a + (1 - b1) g,   q <- b2 q + (1 - b2) g^2
//   p <- p - lr / (1 - b1^k) a / (sqrt(q) / sqrt(1 - b2^k) + eps)
//   s <- m s + (1 - m) p
//
// Memory traffic per element: read p, a, q, s, g (20 bytes), write p, a, q, s and two copies (20 bytes); 17 FLOP.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "ema.h"
#include "exact.h"
#include "grid.h"
#include "macros.h"
#include "pack.h"

namespace vjepa {

// The numbers of a group at a step, computed in float64 and rounded once.
struct AdamwStep {
  float grad_factor;
  float decay;       // 1 - lr weight_decay
  EmaStep first;     // of exp_avg
  float beta2;       // of exp_avg_sq
  float weight2;     // 1 - beta2
  float correction;  // sqrt(1 - beta2^k)
  float eps;
  float minus_step_size;  // -lr / (1 - beta1^k)
  EmaStep average;        // of the shadow
  bool skip;              // no gradient, or an infinite one was found: the parameter stays, its shadow follows
};

VJEPA_HOST_DEVICE bool found_inf(const vjepa_adamw_scalars &scalars) {
  return scalars.found_inf && *scalars.found_inf != 0.0f;
}

VJEPA_HOST_DEVICE AdamwStep adamw_step(const vjepa_adamw_tensor &tensor, const vjepa_adamw_group &group,
                                       const vjepa_adamw_scalars &scalars, double momentum) {
  const double lr = group.lr_address ? static_cast<double>(*group.lr_address) : group.lr;
  const int64_t step = 1 + (tensor.step ? static_cast<int64_t>(*tensor.step) : group.step);
  AdamwStep numbers;
  numbers.grad_factor = group.grad_factor ? *group.grad_factor : 1.0f;
  numbers.decay = static_cast<float>(subtract(1.0, multiply(lr, group.weight_decay)));
  numbers.first = ema_step(group.beta1);
  numbers.beta2 = static_cast<float>(group.beta2);
  numbers.weight2 = static_cast<float>(subtract(1.0, group.beta2));
  numbers.correction = static_cast<float>(square_root(subtract(1.0, power(group.beta2, step))));
  numbers.eps = static_cast<float>(group.eps);
  numbers.minus_step_size = static_cast<float>(-divide(lr, subtract(1.0, power(group.beta1, step))));
  numbers.average = ema_step(scalars.momentum ? *scalars.momentum : momentum);
  numbers.skip = !tensor.grad || found_inf(scalars);
  return numbers;
}

// The order of the operations is that of PyTorch's AdamW.
VJEPA_HOST_DEVICE void adamw_update(float &param, float &exp_avg, float &exp_avg_sq, float grad,
                                    const AdamwStep &step) {
  grad = multiply(grad, step.grad_factor);
  exp_avg = ema_value(exp_avg, grad, step.first);
  exp_avg_sq = add(multiply(exp_avg_sq, step.beta2), multiply(multiply(step.weight2, grad), grad));
  const float denominator = add(divide(square_root(exp_avg_sq), step.correction), step.eps);
  param = add(multiply(param, step.decay), divide(multiply(step.minus_step_size, exp_avg), denominator));
}

// What remains of a skipped step.
VJEPA_HOST_DEVICE vjepa_ema_tensor adamw_average(const vjepa_adamw_tensor &tensor) {
  return vjepa_ema_tensor{tensor.shadow, tensor.param,  tensor.shadow_copy,
                          tensor.numel,  VJEPA_FLOAT32, tensor.copy_dtype};
}

// Parameter and moments of elements [begin, end), one after the other: the inner loop of a CPU.
template <class Grad>
VJEPA_HOST_DEVICE void adamw_range(const vjepa_adamw_tensor &tensor, int64_t begin, int64_t end,
                                   const AdamwStep &step) {
  float *__restrict param = tensor.param;
  float *__restrict exp_avg = tensor.exp_avg;
  float *__restrict exp_avg_sq = tensor.exp_avg_sq;
  const Grad *__restrict grad = static_cast<const Grad *>(tensor.grad);
  const AdamwStep numbers = step;  // not memory that the stores below might change
  for (int64_t i = begin; i < end; ++i) {
    float p = param[i], a = exp_avg[i], q = exp_avg_sq[i];
    adamw_update(p, a, q, to_float(grad[i]), numbers);
    param[i] = p;
    exp_avg[i] = a;
    exp_avg_sq[i] = q;
  }
}

// kCount elements from element i on. All is read before anything is written: nothing tells the compiler that what is
// written is not read later, and a memory-bound kernel needs its reads in flight together.
template <int64_t kCount>
VJEPA_HOST_DEVICE void adamw_some(const vjepa_adamw_tensor &tensor, int64_t i, const AdamwStep &step) {
  Some<kCount> p = load<kCount>(tensor.param, i), a = load<kCount>(tensor.exp_avg, i);
  Some<kCount> q = load<kCount>(tensor.exp_avg_sq, i);
  const Some<kCount> g = load<kCount>(tensor.grad, tensor.grad_dtype, i);
  Some<kCount> s{};
  if (tensor.shadow) s = load<kCount>(tensor.shadow, i);
  for (int64_t j = 0; j < kCount; ++j) adamw_update(p.values[j], a.values[j], q.values[j], g.values[j], step);
  store(tensor.param, i, p);
  store(tensor.exp_avg, i, a);
  store(tensor.exp_avg_sq, i, q);
  store(tensor.param_copy, tensor.copy_dtype, i, p);
  if (tensor.shadow) {
    for (int64_t j = 0; j < kCount; ++j) s.values[j] = ema_value(s.values[j], p.values[j], step.average);
    store(tensor.shadow, i, s);
    store(tensor.shadow_copy, tensor.copy_dtype, i, s);
  }
}

VJEPA_HOST_DEVICE bool adamw_packable(const vjepa_adamw_tensor &tensor) {
  return packable(tensor.param, VJEPA_FLOAT32) && packable(tensor.grad, tensor.grad_dtype) &&
         packable(tensor.exp_avg, VJEPA_FLOAT32) && packable(tensor.exp_avg_sq, VJEPA_FLOAT32) &&
         packable(tensor.shadow, VJEPA_FLOAT32) && packable(tensor.param_copy, tensor.copy_dtype) &&
         packable(tensor.shadow_copy, tensor.copy_dtype);
}

// The part of a chunk that thread `lane` of a block of `lanes` threads does: packs while all pointers allow it, single
// elements for the tail and for misaligned tensors.
VJEPA_HOST_DEVICE void adamw_chunk(const vjepa_adamw_tensor &tensor, const Chunk &chunk, const AdamwStep &step,
                                   int64_t lane, int64_t lanes) {
  if (step.skip) {
    if (tensor.shadow) ema_chunk(adamw_average(tensor), chunk, step.average, lane, lanes);
    return;
  }
  int64_t tail = chunk.begin;
  if (adamw_packable(tensor)) {
    tail = chunk.end - (chunk.end - chunk.begin) % kPack;
    for (int64_t i = chunk.begin + lane * kPack; i < tail; i += lanes * kPack) adamw_some<kPack>(tensor, i, step);
  }
  for (int64_t i = tail + lane; i < chunk.end; i += lanes) adamw_some<1>(tensor, i, step);
}

}  // namespace vjepa
