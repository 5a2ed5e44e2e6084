// The exact GELU and its derivative, from one exponential and polynomials; branch-free, so that compilers vectorise it.
//
//   gelu(x)  = x Phi(x)           = max(x, 0) - t p           p = Phi(-t),   t = |x|
//   gelu'(x) = Phi(x) + x phi(x)  = q for x < 0, else 1 - q   q = p - t phi(t)
//
// p is not taken from 1 and erf, of whose difference little is left for x below -2. gelu(inf) = inf, gelu'(inf) = 1,
// gelu'(-inf) = 0; NaN stays. Where products and sums are fused, the last bit of a float32 is another.
#pragma once

#include "dtype.h"

namespace vjepa {

struct Gelu {
  float value;
  float slope;
};

// 2^y for -126 <= y <= 0, `p` being a polynomial for 2^f on [-1/2, 1/2].
template <class Polynomial>
VJEPA_HOST_DEVICE float exp2_of(float y, const Polynomial &p) {
  const float shifted = y + 12582912.0f;  // 1.5 2^23: rounds to an integer, which is in the low bits
  const float power = p(y - (shifted - 12582912.0f));
  return float_from_bits(bits_from_float(power) + (bits_from_float(shifted) << 23));
}

VJEPA_HOST_DEVICE float bounded(float t, float end) { return t > end ? end : t; }  // NaN stays

VJEPA_HOST_DEVICE float positive_part(float x) { return x < 0.0f ? 0.0f : x; }

constexpr float kHalfLog2E = 0.72134752044448170f;  // exp(-x^2 / 2) = 2^(-x^2 kHalfLog2E)
constexpr float kPhi0 = 0.39894228040143268f;       // 1 / sqrt(2 pi)

// For results of 16 bits: log2 p is nearly a parabola; a polynomial of degree 8 on [0, 9] gives p with a relative error
// of 6.0e-6, 2^f has 2.6e-6. q = p w(t): the error of w times p is at most 3.2e-5. Below -9, gelu is -1e-18.
template <class T>
struct GeluOf {
  static VJEPA_HOST_DEVICE float tail(float t) {
    float y = 7.46315915e-08f;
    y = y * t + -3.65573903e-06f;
    y = y * t + 7.94370324e-05f;
    y = y * t + -0.0010200445f;
    y = y * t + 0.00875085159f;
    y = y * t + -0.0543046239f;
    y = y * t + -0.458241578f;
    y = y * t + -1.15129496f;
    y = y * t + -0.999996588f;
    return exp2_of(y, [](float f) {
      float p = 0.009570102301f;
      p = p * f + 0.05591786201f;
      p = p * f + 0.2402474483f;
      p = p * f + 0.6931218144f;
      return p * f + 0.9999992614f;
    });
  }
  static VJEPA_HOST_DEVICE float value(float x) {
    const float t = bounded(__builtin_fabsf(x), 9.0f);
    return positive_part(x) - t * tail(t);
  }
  static VJEPA_HOST_DEVICE Gelu both(float x) {
    const float t = bounded(__builtin_fabsf(x), 9.0f), p = tail(t);
    float w = 0.0112411775f;
    w = w * t + -0.0936304271f;
    w = w * t + -0.646748663f;
    w = w * t + -0.795773471f;
    w = w * t + 0.999935906f;
    const float q = p * w;
    return Gelu{positive_part(x) - t * p, x < 0.0f ? q : 1.0f - q};
  }
};

// For results of float32: p = e M(t) and q = e (M(t) - t / sqrt(2 pi)) with e = exp(-t^2 / 2). M, Mills' ratio over
// sqrt(2 pi), as a polynomial in (t - 3) / (t + 3) on [0, 12.9] with a relative error of 6.7e-9, and 2^f with 1.9e-9:
// less than the roundings. Below -12.9, gelu is -3e-37.
template <>
struct GeluOf<float> {
  static VJEPA_HOST_DEVICE float mills(float t) {
    const float u = (t - 3.0f) / (t + 3.0f);
    float m = 5.4150848083e-05f;
    m = m * u + 0.000116037369519f;
    m = m * u + -0.000339911325648f;
    m = m * u + -0.0009841827598f;
    m = m * u + 0.00290470262556f;
    m = m * u + 0.00613218306201f;
    m = m * u + -0.0462133138118f;
    m = m * u + 0.123225021697f;
    m = m * u + -0.206402617928f;
    return m * u + 0.121513947724f;
  }
  static VJEPA_HOST_DEVICE float density(float t) {
    return exp2_of(t * t * -kHalfLog2E, [](float f) {
      float p = 0.0001534580419f;
      p = p * f + 0.001339993105f;
      p = p * f + 0.009618488985f;
      p = p * f + 0.05550328778f;
      p = p * f + 0.2402264689f;
      p = p * f + 0.6931472057f;
      return p * f + 1.000000001f;
    });
  }
  static VJEPA_HOST_DEVICE float value(float x) {
    const float t = bounded(__builtin_fabsf(x), 12.9f);
    return positive_part(x) - t * (density(t) * mills(t));
  }
  static VJEPA_HOST_DEVICE Gelu both(float x) {
    const float t = bounded(__builtin_fabsf(x), 12.9f), e = density(t), m = mills(t);
    const float q = e * (m - t * kPhi0);
    return Gelu{positive_part(x) - t * (e * m), x < 0.0f ? q : 1.0f - q};
  }
};

}  // namespace vjepa
