// Products of packed panels: at most two by two tiles of sums at a time, and what is done with them at the end.
#pragma once

#include "product_pack.h"

namespace vjepa {
namespace {

constexpr int64_t kPair = 2;  // panels whose tiles of sums stay in registers together

// What becomes of sums.
struct Finish {
  float *out;
  int64_t out_stride;
  int64_t rows, columns;  // of out, from here on
  const float *bias;      // of these columns, or null
  bool add;               // to what is there
  bool special;           // infinities or NaN may be among the operands
};

// The sums of R panels of a and C panels of b in tiles 0, 1 (of the first panel of a), 2, 3; not yet stored. The
// smallest parts come first, so that each is loaded once, b's largest twice.
template <class T, int R, int C>
inline __attribute__((always_inline)) void sum_parts(T &tiles, const float *a, int64_t a_panel, const float *b,
                                                     int64_t b_panel, int64_t steps, const float*from=nullptr) {
  if(from) { tiles.template load<0>(from,16); tiles.template load<1>(from+256,16); tiles.template load<2>(from+512,16); tiles.template load<3>(from+768,16); } else {
  tiles.template zero<0>();
  if constexpr (C > 1) tiles.template zero<1>();
  if constexpr (R > 1) tiles.template zero<2>();
  if constexpr (R > 1 && C > 1) tiles.template zero<3>(); }
#define VJEPA_LOAD_A(part)                                             \
  tiles.template load<4>(a + (part)*kTileUnits, kTile);                \
  if constexpr (R > 1) tiles.template load<5>(a + a_panel + (part)*kTileUnits, kTile);
#define VJEPA_LOAD_B(part)                                             \
  tiles.template load<6>(b + (part)*kTileUnits, kTile);                \
  if constexpr (C > 1) tiles.template load<7>(b + b_panel + (part)*kTileUnits, kTile);
#define VJEPA_DOT                                                      \
  tiles.template dot<0, 4, 6>();                                       \
  if constexpr (C > 1) tiles.template dot<1, 4, 7>();                  \
  if constexpr (R > 1) tiles.template dot<2, 5, 6>();                  \
  if constexpr (R > 1 && C > 1) tiles.template dot<3, 5, 7>();
  for (; steps > 0; --steps, a += kStepUnits, b += kStepUnits) {
    VJEPA_LOAD_A(2)
    VJEPA_LOAD_B(0)
    VJEPA_DOT
    VJEPA_LOAD_A(1)
    VJEPA_DOT
    VJEPA_LOAD_B(1)
    VJEPA_DOT
    VJEPA_LOAD_A(0)
    VJEPA_DOT
    VJEPA_LOAD_B(2)
    VJEPA_DOT
    VJEPA_LOAD_B(0)
    VJEPA_DOT
  }
#undef VJEPA_LOAD_A
#undef VJEPA_LOAD_B
#undef VJEPA_DOT
}

template <class T, int R, int C>
inline void store_sums(T &tiles, float *to, int64_t stride) {
  tiles.template store<0>(to, stride);
  if constexpr (C > 1) tiles.template store<1>(to + kTile, stride);
  if constexpr (R > 1) tiles.template store<2>(to + kTile * stride, stride);
  if constexpr (R > 1 && C > 1) tiles.template store<3>(to + kTile * stride + kTile, stride);
}

// A number that is not finite among the operands decides the sum, but times the lower parts of another, which may be 0
// or of the other sign, it is NaN. The products of the first parts have what float32's product has there.
template <class T>
void sum_first_parts(T &tiles, const float *a, const float *b, int64_t steps, float *to) {
  tiles.template zero<0>();
  for (; steps > 0; --steps, a += kStepUnits, b += kStepUnits) {
    tiles.template load<4>(a, kTile);
    tiles.template load<6>(b, kTile);
    tiles.template dot<0, 4, 6>();
  }
  tiles.template store<0>(to, kPair * kTile);
}

constexpr int64_t kSums = kPair * kTile;  // rows and columns of sums that are finished together

VJEPA_AVX inline void finish(const Finish &how, const float *sums, const float *first_parts) {
  const __m512 largest = _mm512_set1_ps(3.4028235e38f);
  for (int64_t c = 0; c < kSums && c < how.columns; c += kTile) {
    const __mmask16 lanes = first_lanes(how.columns - c);
    const __m512 bias = how.bias ? _mm512_maskz_loadu_ps(lanes, how.bias + c) : _mm512_setzero_ps();
    for (int64_t r = 0; r < kSums && r < how.rows; ++r) {
      float *out = how.out + r * how.out_stride + c;
      __m512 sum = _mm512_load_ps(sums + r * kSums + c);
      if (how.special) {
        const __m512 first = _mm512_load_ps(first_parts + r * kSums + c);
        const __mmask16 decided = _mm512_cmp_ps_mask(_mm512_abs_ps(first), largest, _CMP_NLE_UQ);
        sum = _mm512_mask_mov_ps(sum, decided, first);
      }
      if (how.bias) sum = _mm512_add_ps(sum, bias);
      if (how.add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, out), sum);
      _mm512_mask_storeu_ps(out, lanes, sum);
    }
  }
}

template <class T, int R, int C>
void product_of_panels(T &tiles, const float *a, int64_t a_panel, const float *b, int64_t b_panel, int64_t steps,
                       const Finish &how) {
  sum_parts<T, R, C>(tiles, a, a_panel, b, b_panel, steps);
  if (how.rows >= R * kTile && how.columns >= C * kTile && !how.bias && !how.add && !how.special) {
    return store_sums<T, R, C>(tiles, how.out, how.out_stride);
  }
  alignas(64) float sums[kSums * kSums], first_parts[kSums * kSums];
  store_sums<T, R, C>(tiles, sums, kSums);
  if (how.special) {
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t c = 0; c < C; ++c) {
        sum_first_parts(tiles, a + r * a_panel, b + c * b_panel, steps, first_parts + kTile * (r * kSums + c));
      }
    }
  }
  finish(how, sums, first_parts);
}

}  // namespace
}  // namespace vjepa
