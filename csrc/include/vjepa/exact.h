// Arithmetic that rounds after each operation, to nearest even, on the host and on a device alike: no fused
// multiply-add, IEEE division and square root. All instruction sets, thread counts and CUDA then give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace vjepa {

#if defined(__CUDA_ARCH__)
VJEPA_HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
VJEPA_HOST_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
VJEPA_HOST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
VJEPA_HOST_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
VJEPA_HOST_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
VJEPA_HOST_DEVICE double subtract(double a, double b) { return __dsub_rn(a, b); }
VJEPA_HOST_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
VJEPA_HOST_DEVICE double divide(double a, double b) { return __ddiv_rn(a, b); }
VJEPA_HOST_DEVICE double square_root(double a) { return __dsqrt_rn(a); }
#else  // compiled with -ffp-contract=off
VJEPA_HOST_DEVICE float add(float a, float b) { return a + b; }
VJEPA_HOST_DEVICE float subtract(float a, float b) { return a - b; }
VJEPA_HOST_DEVICE float multiply(float a, float b) { return a * b; }
VJEPA_HOST_DEVICE float divide(float a, float b) { return a / b; }
VJEPA_HOST_DEVICE float square_root(float a) { return std::sqrt(a); }
VJEPA_HOST_DEVICE double subtract(double a, double b) { return a - b; }
VJEPA_HOST_DEVICE double multiply(double a, double b) { return a * b; }
VJEPA_HOST_DEVICE double divide(double a, double b) { return a / b; }
VJEPA_HOST_DEVICE double square_root(double a) { return std::sqrt(a); }
#endif

// base^exponent by repeated squaring; the library's pow has other last bits on each processor.
VJEPA_HOST_DEVICE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = multiply(result, base);
    base = multiply(base, base);
  }
  return result;
}

}  // namespace vjepa
