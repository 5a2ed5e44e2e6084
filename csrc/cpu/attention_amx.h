// Products by the tiles of AMX: of pairs of bfloat16, or of float32 as three of them.
#pragma once

#include "amx.h"
#include "attention_tile.h"

namespace vjepa {
namespace {

template <class Engine, class Numbers>  // Pairs or Triples
struct Tiled : Numbers {
  static constexpr bool kAside = true;
  static constexpr int64_t kAlong = kTile;
  static constexpr int64_t kAcross = kTile;
  static constexpr int64_t kTogether = 2 * kTile;
  static constexpr int64_t kGroup = 2 * kTile;
  static constexpr int64_t kBackQueries = 256;
  static constexpr int64_t kBackKeys = 128;
  Engine tiles;

  template <int R>
  VJEPA_AVX_INLINE void load_a(const Operand &a, int64_t plane, int64_t u) {
    const float *from = a.data + plane * a.plane + u;
    tiles.template load<4>(from, a.stride);
    if constexpr (R > 1) tiles.template load<5>(from + kTile * a.stride, a.stride);
  }
  template <int C>
  VJEPA_AVX_INLINE void load_b(const Operand &b, int64_t plane, int64_t u) {
    const float *from = b.data + u * b.stride + plane * b.plane;
    tiles.template load<6>(from, b.stride);
    if constexpr (C > 1) tiles.template load<7>(from + kTile, b.stride);
  }
  template <int R, int C, class Meanwhile>
  VJEPA_AVX_INLINE void dots(Meanwhile &meanwhile) {
    tiles.template dot<0, 4, 6>();
    if constexpr (C > 1) tiles.template dot<1, 4, 7>();
    if constexpr (R > 1) tiles.template dot<2, 5, 6>();
    if constexpr (R > 1 && C > 1) tiles.template dot<3, 5, 7>();
    meanwhile.step();
  }

  // R x C tiles of out.
  template <int R, int C, class Meanwhile>
  VJEPA_AVX_INLINE void block(bool add, const Operand &a, const Operand &b, int64_t units, float *out,
                              int64_t out_stride, Meanwhile &meanwhile) {
    float *below = out + kTile * out_stride;
    if (add) {
      tiles.template load<0>(out, out_stride);
      if constexpr (C > 1) tiles.template load<1>(out + kTile, out_stride);
      if constexpr (R > 1) tiles.template load<2>(below, out_stride);
      if constexpr (R > 1 && C > 1) tiles.template load<3>(below + kTile, out_stride);
    } else {
      tiles.template zero<0>();
      if constexpr (C > 1) tiles.template zero<1>();
      if constexpr (R > 1) tiles.template zero<2>();
      if constexpr (R > 1 && C > 1) tiles.template zero<3>();
    }
    for (int64_t u = 0; u < units; u += kTile) {
      if constexpr (Numbers::kPlanes == 3) {  // the six largest products of the parts, the small ones first
        load_a<R>(a, 2, u), load_b<C>(b, 0, u), dots<R, C>(meanwhile);
        load_a<R>(a, 1, u), dots<R, C>(meanwhile);
        load_b<C>(b, 1, u), dots<R, C>(meanwhile);
        load_a<R>(a, 0, u), dots<R, C>(meanwhile);
        load_b<C>(b, 2, u), dots<R, C>(meanwhile);
        load_b<C>(b, 0, u), dots<R, C>(meanwhile);
      } else {
        load_a<R>(a, 0, u), load_b<C>(b, 0, u), dots<R, C>(meanwhile);
      }
    }
    tiles.template store<0>(out, out_stride);
    if constexpr (C > 1) tiles.template store<1>(out + kTile, out_stride);
    if constexpr (R > 1) tiles.template store<2>(below, out_stride);
    if constexpr (R > 1 && C > 1) tiles.template store<3>(below + kTile, out_stride);
  }

  // C columns of tiles of out, which have b in the nearest cache while the rows go by.
  template <int C, class Meanwhile>
  VJEPA_AVX_INLINE void columns(int64_t rows, bool add, Operand a, const Operand &b, int64_t units, float *out,
                                int64_t out_stride, Meanwhile &meanwhile) {
    int64_t r = 0;
    for (; r + 2 * kTile <= rows; r += 2 * kTile, a.data += 2 * kTile * a.stride) {
      block<2, C>(add, a, b, units, out + r * out_stride, out_stride, meanwhile);
    }
    if (r < rows) block<1, C>(add, a, b, units, out + r * out_stride, out_stride, meanwhile);
  }
};

// As `multiply` of attention_tile.h; rows and units are multiples of kTile.
template <Start S, int Rows = kRows, class Engine, class Numbers, class Meanwhile>
VJEPA_AVX void multiply(Tiled<Engine, Numbers> &m, int64_t rows, int64_t lines, const Operand &a, Operand b,
                        int64_t units, float *out, int64_t out_stride, const float *factors, Meanwhile &meanwhile) {
  if constexpr (S == Start::rescale) {
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 times = _mm512_set1_ps(factors[r]);
      for (int64_t c = 0; c < lines; ++c) {
        float *line = out + r * out_stride + c * kLine;
        _mm512_storeu_ps(line, _mm512_mul_ps(_mm512_loadu_ps(line), times));
      }
    }
  }
  constexpr bool add = S != Start::zero;
  int64_t c = 0;
  for (; c + 2 <= lines; c += 2, b.data += 2 * kTile, out += 2 * kTile) {
    m.template columns<2>(rows, add, a, b, units, out, out_stride, meanwhile);
  }
  if (c < lines) m.template columns<1>(rows, add, a, b, units, out, out_stride, meanwhile);
}

}  // namespace
}  // namespace vjepa
