// The exact GELU and its derivative, from one exponential and a polynomial; branch-free, so that compilers vectorise
// it.
//
//   gelu(x)  = x Phi(x)           = max(x, 0) - t p           p = Phi(-t) = e M(t),   t = |x|,   e = exp(-x^2 / 2)
//   gelu'(x) = Phi(x) + x phi(x)  = q for x < 0, else 1 - q   q = p - t phi(t) = e (M(t) - t / sqrt(2 pi))
//
// M, Mills' ratio over sqrt(2 pi), falls from 1/2 to 0 slowly, which a polynomial follows; of the difference of 1 and
// erf little would be left for x below -2. gelu(inf) = inf, gelu(-inf) = 0, gelu'(inf) = 1, gelu'(-inf) = 0; NaN stays.
#pragma once

#include "dtype.h"

namespace vjepa {

struct Gelu {
  float value;
  float slope;
};

// 2^y for y <= 0, `p` being a polynomial for 2^f on [-1/2, 1/2]; 0 below 2^-126, NaN of NaN.
template <class Polynomial>
VJEPA_HOST_DEVICE float exp2_of(float y, const Polynomial &p) {
  const float bounded = y < -126.0f ? -126.0f : y;
  const float shifted = bounded + 12582912.0f;  // 1.5 2^23: rounds to an integer, which is in the low bits
  const float power = p(bounded - (shifted - 12582912.0f));
  const float scaled = float_from_bits(bits_from_float(power) + (bits_from_float(shifted) << 23));
  return y < -126.0f ? 0.0f : scaled;
}

constexpr float kHalfLog2E = 0.72134752044448170f;  // exp(-x^2 / 2) = 2^(-x^2 kHalfLog2E)
constexpr float kPhi0 = 0.39894228040143268f;       // 1 / sqrt(2 pi)

// For results of 16 bits: M(t) on [0, 5.6] with a relative error of 6.1e-5, 2^f with 2.6e-6; kernels/_triton_gelu.py
// has the same polynomial, and says what becomes of it in bfloat16 and float16. Below -5.6, gelu is less than 6.0e-8,
// the least float16, and falls to 0.
struct Narrow {
  static VJEPA_HOST_DEVICE float bounded(float t) { return t > 5.6f ? 5.6f : t; }
  static VJEPA_HOST_DEVICE float mills(float t) {
    float m = -7.7575906e-07f;
    m = m * t + 2.3870604e-05f;
    m = m * t + -0.00032209942f;
    m = m * t + 0.0025232513f;
    m = m * t + -0.012867314f;
    m = m * t + 0.045757988f;
    m = m * t + -0.1200461f;
    m = m * t + 0.24452507f;
    m = m * t + -0.39797795f;
    return m * t + 0.4999695f;
  }
  static VJEPA_HOST_DEVICE float exp2(float y) {
    return exp2_of(y, [](float f) {
      float p = 0.009570102301f;
      p = p * f + 0.05591786201f;
      p = p * f + 0.2402474483f;
      p = p * f + 0.6931218144f;
      return p * f + 0.9999992614f;
    });
  }
};

// For results of float32: M on [0, 13.25], where e leaves the normal numbers, as a polynomial in (t - 3) / (t + 3) with
// a relative error of 6.7e-9, and 2^f with 1.9e-9: less than the roundings.
struct Wide {
  static VJEPA_HOST_DEVICE float bounded(float t) { return t > 13.25f ? 13.25f : t; }
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
  static VJEPA_HOST_DEVICE float exp2(float y) {
    return exp2_of(y, [](float f) {
      float p = 0.0001534580419f;
      p = p * f + 0.001339993105f;
      p = p * f + 0.009618488985f;
      p = p * f + 0.05550328778f;
      p = p * f + 0.2402264689f;
      p = p * f + 0.6931472057f;
      return p * f + 1.000000001f;
    });
  }
};

template <class T>
struct GeluOf {
  using Precision = Narrow;
};
template <>
struct GeluOf<float> {
  using Precision = Wide;
};

// T: the dtype of the results.
template <class T>
VJEPA_HOST_DEVICE float gelu(float x) {
  using P = typename GeluOf<T>::Precision;
  const float t = P::bounded(__builtin_fabsf(x));
  return (x < 0.0f ? 0.0f : x) - t * (P::exp2(x * x * -kHalfLog2E) * P::mills(t));
}

template <class T>
VJEPA_HOST_DEVICE Gelu gelu_and_slope(float x) {
  using P = typename GeluOf<T>::Precision;
  const float t = P::bounded(__builtin_fabsf(x)), e = P::exp2(x * x * -kHalfLog2E), m = P::mills(t);
  const float q = e * (m - t * kPhi0);
  return Gelu{(x < 0.0f ? 0.0f : x) - t * (e * m), x < 0.0f ? q : 1.0f - q};
}

}  // namespace vjepa
