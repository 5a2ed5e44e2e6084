// Products of bfloat16 pairs by the tiles of AMX.
#pragma once

#include "amx.h"
#include "attention_tile.h"

namespace vjepa {
namespace {

template <class Engine>
struct Tiled : Pairs {
  static constexpr int64_t kAlong = kTile;
  static constexpr int64_t kAcross = kTile;
  static constexpr int64_t kTogether = 2 * kTile;
  static constexpr int64_t kGroup = 2 * kTile;
  static constexpr int64_t kBackQueries = 256;
  static constexpr int64_t kBackKeys = 128;
  Engine tiles;

  // R x C tiles of out.
  template <int R, int C>
  VJEPA_AVX_INLINE void block(bool add, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                              int64_t units, float *out, int64_t out_stride) {
    const auto down = [&](int64_t r) { return out + r * kTile * out_stride; };
    if (add) {
      tiles.template load<0>(down(0), out_stride);
      if constexpr (C > 1) tiles.template load<1>(down(0) + kTile, out_stride);
      if constexpr (R > 1) tiles.template load<2>(down(1), out_stride);
      if constexpr (R > 1 && C > 1) tiles.template load<3>(down(1) + kTile, out_stride);
    } else {
      tiles.template zero<0>();
      if constexpr (C > 1) tiles.template zero<1>();
      if constexpr (R > 1) tiles.template zero<2>();
      if constexpr (R > 1 && C > 1) tiles.template zero<3>();
    }
    for (int64_t u = 0; u < units; u += kTile) {
      tiles.template load<4>(a + u, a_stride);
      tiles.template load<6>(b + u * b_stride, b_stride);
      tiles.template dot<0, 4, 6>();
      if constexpr (C > 1) {
        tiles.template load<7>(b + u * b_stride + kTile, b_stride);
        tiles.template dot<1, 4, 7>();
      }
      if constexpr (R > 1) {
        tiles.template load<5>(a + kTile * a_stride + u, a_stride);
        tiles.template dot<2, 5, 6>();
        if constexpr (C > 1) tiles.template dot<3, 5, 7>();
      }
    }
    tiles.template store<0>(down(0), out_stride);
    if constexpr (C > 1) tiles.template store<1>(down(0) + kTile, out_stride);
    if constexpr (R > 1) tiles.template store<2>(down(1), out_stride);
    if constexpr (R > 1 && C > 1) tiles.template store<3>(down(1) + kTile, out_stride);
  }

  // C columns of tiles of out, which have b in the nearest cache while the rows go by.
  template <int C>
  VJEPA_AVX_INLINE void columns(int64_t rows, bool add, const float *a, int64_t a_stride, const float *b,
                                int64_t b_stride, int64_t units, float *out, int64_t out_stride) {
    int64_t r = 0;
    for (; r + 2 * kTile <= rows; r += 2 * kTile) {
      block<2, C>(add, a + r * a_stride, a_stride, b, b_stride, units, out + r * out_stride, out_stride);
    }
    if (r < rows) block<1, C>(add, a + r * a_stride, a_stride, b, b_stride, units, out + r * out_stride, out_stride);
  }
};

// As `multiply` of attention_tile.h; rows and units are multiples of kTile.
template <Start S, int Rows = kRows, class Engine>
VJEPA_AVX void multiply(Tiled<Engine> &m, int64_t rows, int64_t lines, const float *a, int64_t a_stride, const float *b,
                        int64_t b_stride, int64_t units, float *out, int64_t out_stride,
                        const float *factors = nullptr) {
  constexpr bool add = S != Start::zero;
  if constexpr (S == Start::rescale) {
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 times = _mm512_set1_ps(factors[r]);
      for (int64_t c = 0; c < lines; ++c) {
        float *line = out + r * out_stride + c * kLine;
        _mm512_storeu_ps(line, _mm512_mul_ps(_mm512_loadu_ps(line), times));
      }
    }
  }
  int64_t c = 0;
  for (; c + 2 <= lines; c += 2) {
    m.template columns<2>(rows, add, a, a_stride, b + c * kTile, b_stride, units, out + c * kTile, out_stride);
  }
  if (c < lines)
    m.template columns<1>(rows, add, a, a_stride, b + c * kTile, b_stride, units, out + c * kTile, out_stride);
}

}  // namespace
}  // namespace vjepa
