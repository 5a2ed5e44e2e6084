"""GELU and its derivative inside Triton kernels: of float32 by erf, for 16-bit results by one exponential and a polynomial.

    gelu(x)  = x Phi(x)                = max(x, 0) - t p            p = Phi(-t) = e M(t),   t = |x|,   e = exp(-x^2 / 2)
    gelu'(x) = Phi(x) + x phi(x)       = q for x < 0, else 1 - q    q = p - t phi(t) = e (M(t) - t / sqrt(2 pi))

M, Mills' ratio over sqrt(2 pi), falls from 1/2 to 0.07 on [0, END]. A polynomial of degree 9 has a relative error of at
most 6.1e-5 there, 1.3e-4 with the roundings of its float32 operations, and so has gelu(x) for x >= -END, where rounding to
float16 takes up to 4.9e-4 and to bfloat16 3.9e-3; gelu'(x) has an absolute error of at most 4e-5. Below -END, t is END:
what is then left of gelu, less than 6.0e-8, the least float16, falls to 0 with a relative error of at most 3.2e-2. Of all
numbers of bfloat16 from -END on, 0.2% get another neighbour than the nearest, with PyTorch 1.4%, whose 1 + erf cancels; of
those of float16, 3.0% and 0.9%. gelu(inf) = inf, gelu(-inf) = 0, and NaN stays NaN.

On sm_90, a hidden feature takes 18 instructions, 0.14 clocks of an SM, for gelu and 20 for both functions, one of them on
the exp unit; by erf 34 and 42, and half as many registers again. A product of depth 384 keeps the matrix unit busy for 0.19.
"""

from __future__ import annotations

import triton
import triton.language as tl

END: tl.constexpr = tl.constexpr(5.6)
HALF_LOG2_E: tl.constexpr = tl.constexpr(0.72134752044448170)  # exp(-x^2 / 2) = 2^(-x^2 HALF_LOG2_E)
PHI_0: tl.constexpr = tl.constexpr(0.39894228040143268)  # 1 / sqrt(2 pi)
SQRT_HALF: tl.constexpr = tl.constexpr(0.70710678118654752)
# M(t) = sum_n Mn t^n, of least relative error on [0, END]
M0: tl.constexpr = tl.constexpr(0.4999695)
M1: tl.constexpr = tl.constexpr(-0.39797795)
M2: tl.constexpr = tl.constexpr(0.24452507)
M3: tl.constexpr = tl.constexpr(-0.1200461)
M4: tl.constexpr = tl.constexpr(0.045757988)
M5: tl.constexpr = tl.constexpr(-0.012867314)
M6: tl.constexpr = tl.constexpr(0.0025232513)
M7: tl.constexpr = tl.constexpr(-0.00032209942)
M8: tl.constexpr = tl.constexpr(2.3870604e-05)
M9: tl.constexpr = tl.constexpr(-7.7575906e-07)


@triton.jit
def _parts(x):
    """t, e and M(t)."""
    t = tl.minimum(tl.abs(x), END)
    mills = ((((M9 * t + M8) * t + M7) * t + M6) * t + M5) * t + M4
    mills = (((mills * t + M3) * t + M2) * t + M1) * t + M0
    return t, tl.exp2(x * x * -HALF_LOG2_E), mills


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """gelu(x) of float32 x; EXACT: as accurate as float32 is, not as 16-bit results are."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    else:
        t, e, mills = _parts(x)
        return tl.maximum(x, 0.0) - t * e * mills


@triton.jit
def gelu_and_slope(x, EXACT: tl.constexpr):
    """gelu(x) and gelu'(x), which share the exponential."""
    if EXACT:
        below = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        return x * below, below + x * PHI_0 * tl.exp(-0.5 * x * x)
    else:
        t, e, mills = _parts(x)
        q = e * (mills - t * PHI_0)
        return tl.maximum(x, 0.0) - t * e * mills, tl.where(x < 0.0, q, 1.0 - q)
